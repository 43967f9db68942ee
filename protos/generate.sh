#!/usr/bin/env bash
# Generates the Python code of every .proto file under protos/ (run it as `make protos`).
#
#   protos/generate.sh [OUT_DIR]      OUT_DIR defaults to the repository root
#
# The tools are old on purpose: generated code refuses any runtime older than its generator and is accepted by
# newer ones (https://protobuf.dev/support/cross-version-runtime-guarantee), so these pins are the lower bounds
# of grpcio and protobuf in pyproject.toml. They live in a virtual environment of their own, .venv-protos.
set -euo pipefail
cd "$(dirname "$0")/.."

GRPCIO_TOOLS=1.71.2
MYPY_PROTOBUF=3.7.0
GOOGLEAPIS=1.66.0

out=${1:-.}
tools=${PROTOS_VENV:-.venv-protos}
stamp="$tools/.grpcio-tools-$GRPCIO_TOOLS-mypy-protobuf-$MYPY_PROTOBUF-googleapis-$GOOGLEAPIS"
if [ ! -e "$stamp" ]; then
  "${PYTHON:-python3}" -m venv --clear "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check \
    "grpcio-tools==$GRPCIO_TOOLS" "mypy-protobuf==$MYPY_PROTOBUF" "googleapis-common-protos==$GOOGLEAPIS"
  touch "$stamp"
fi

includes=$("$tools/bin/python" -c 'import google.rpc.status_pb2 as m; print(m.__file__.removesuffix("google/rpc/status_pb2.py"))')
mapfile -t sources < <(find protos -name '*.proto' | sort)
mkdir -p "$out"
PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -I. -I"$includes" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" "${sources[@]}"

header="# Made by protos/generate.sh with grpcio-tools $GRPCIO_TOOLS and mypy-protobuf $MYPY_PROTOBUF; edit the .proto file instead."
for source in "${sources[@]}"; do
  for file in "$out/${source%.proto}"_pb2.py "$out/${source%.proto}"_pb2.pyi \
    "$out/${source%.proto}"_pb2_grpc.py "$out/${source%.proto}"_pb2_grpc.pyi; do
    printf '%s\n%s\n' "$header" "$(cat "$file")" > "$file"
  done
done

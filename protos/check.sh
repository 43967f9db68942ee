#!/usr/bin/env bash
# Lints the contract and refuses a change that would break callers (run it as `make protos-check`).
#
#   protos/check.sh            lint, and compare with the released contract, protos/released.binpb
#   protos/check.sh --release  make the present contract the released one
#
# buf wants all sources in one workspace, google/rpc/status.proto among them, which comes with
# googleapis-common-protos; so a workspace is put together, without a network.
set -euo pipefail
cd "$(dirname "$0")/.."

released="$PWD/protos/released.binpb"
workspace=$(mktemp -d)
trap 'rm -rf "$workspace"' EXIT
includes=$("${PYTHON:-python3}" -c 'import google.rpc.status_pb2 as m; print(m.__file__.removesuffix("google/rpc/status_pb2.py"))')
mkdir -p "$workspace/protos" "$workspace/googleapis/google/rpc"
cp -r protos/rlaif "$workspace/protos/"
cp "$includes/google/rpc/status.proto" "$workspace/googleapis/google/rpc/"
cp protos/buf.yaml "$workspace/"
cd "$workspace"

if [ "${1:-}" = --release ]; then
  buf build protos -o "$released"
  exit
fi
buf lint
buf breaking protos --against "$released"

#!/usr/bin/env bash
# What the tests of this folder need: clients from PyPI and npm into .cache/foreign, Debian's packages if we may.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
folder=.cache/foreign

get() {
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target "$folder/$1" "$2"
}
get grpclib grpclib==0.4.9
get openrlhf openrlhf==0.11.2  # their own dependencies are large, and their reward clients need none of them
get verl verl==0.9.1
if command -v npm > /dev/null; then
    npm install --silent --no-audit --no-fund --prefix "$folder/node" \
        @grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1 grpc-health-check@2.1.0
fi
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends nghttp2-client nghttp2-proxy \
        nginx-light haproxy python3-grpcio python3-protobuf protobuf-compiler protobuf-compiler-grpc \
        libprotobuf-dev > /dev/null
fi

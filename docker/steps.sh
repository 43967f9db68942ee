#!/bin/sh
# The steps of the Dockerfile, one per call, so that they also run without Docker:
#
#   docker/steps.sh system                 Python and a user, on a Debian or Ubuntu base (root)
#   docker/steps.sh dependencies DIR       virtual environment DIR with the pinned dependencies; TORCH picks the build
#   docker/steps.sh package DIR            this project into DIR, from the current folder
#   docker/steps.sh verify DIR             the installed command answers, its parts import and its data is there
set -eu

python_fits() {
  command -v python3 >/dev/null && python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

case "$1" in
  system)
    if ! python_fits; then
      apt-get update
      apt-get install --yes --no-install-recommends python3 python3-venv
      rm -rf /var/lib/apt/lists/*
    fi
    python_fits || { echo "the base image has no Python 3.11 or newer; choose another BASE" >&2; exit 1; }
    if ! id rlaif >/dev/null 2>&1; then
      groupadd --gid 10001 rlaif
      useradd --create-home --uid 10001 --gid 10001 rlaif
    fi
    ;;
  dependencies)
    python3 -m venv "$2"
    "$2/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "${TORCH:?torch or torch==VERSION}"
    "$2/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
' > "$2/requirements.txt"
    "$2/bin/python" -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r "$2/requirements.txt"
    ;;
  package)
    "$2/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --no-deps .
    ;;
  verify)
    cd /
    "$2/bin/python" -m pip check
    "$2/bin/rlaif" --version
    "$2/bin/python" -c 'import labeler, policy_trainer, protos.rlaif.reward.v1.reward_pb2_grpc, reward_server, tinyworld'
    "$2/bin/rlaif" serve --help >/dev/null
    "$2/bin/rlaif" train ppo --help >/dev/null
    ;;
  *)
    echo "unknown step $1" >&2
    exit 2
    ;;
esac

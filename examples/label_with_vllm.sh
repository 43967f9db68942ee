#!/usr/bin/env bash
# Label real pairs through vLLM's OpenAI server, then let TRL's trainers take a step on the result.
#
#   examples/label_with_vllm.sh DATA_DIR OUTPUT_DIR
#
# DATA_DIR holds hh_helpful_1000.jsonl (rows with messages, chosen, rejected). The judge is a tiny Llama with random
# weights, so the labels mean nothing; the server, the requests, the pairs and the dataset are real.
# LIMIT (200), PORT (8791), MAX_RATIONALE_TOKENS (64), PYTHON (.venv-vllm/bin/python) can be set.
set -euo pipefail
data=${1:?usage: $0 DATA_DIR OUTPUT_DIR}
out=${2:?usage: $0 DATA_DIR OUTPUT_DIR}
port=${PORT:-8791}
here=$(dirname "$0")
mkdir -p "$out"

python "$here/make_tiny_llama.py" --text "$data/hh_helpful_1000.jsonl" --output_dir "$out/tiny-llama"

"$here/serve_tiny_vllm.sh" "$out/tiny-llama" "$port" >"$out/vllm.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
until curl -sf "http://127.0.0.1:$port/health" >/dev/null; do
  kill -0 $server 2>/dev/null || { tail -n 20 "$out/vllm.log" >&2; exit 1; }
  sleep 1
done

rlaif label pairs --judge "openai:tiny-llama@http://127.0.0.1:$port/v1" \
  --dataset "$data/hh_helpful_1000.jsonl" --limit "${LIMIT:-200}" --max_rationale_tokens "${MAX_RATIONALE_TOKENS:-64}" \
  --output_dir "$out/labels"

python "$here/trl_one_step.py" --dataset "$out/labels" --model_name_or_path "$out/tiny-llama"

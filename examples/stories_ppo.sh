#!/usr/bin/env bash
# PPO of a real pretrained story writer against a served reward model: sample, prefer, train, serve, improve.
#
#   examples/stories_ppo.sh MODEL_DIR OUTPUT_DIR
#
# MODEL_DIR is stories260K (karpathy/tinyllamas) as a Hugging Face folder, or any small causal LM that continues
# stories. The preference is synthetic (examples/stories.py says how); model, reward model, server and PPO are real.
# Every step resumes: run the same command again after an interruption.
set -euo pipefail
model=${1:?usage: $0 MODEL_DIR OUTPUT_DIR}
out=${2:?usage: $0 MODEL_DIR OUTPUT_DIR}
here=$(dirname "$0")
mkdir -p "$out"

python "$here/stories.py" openings --output_dir "$out/openings"

rlaif sample --model_name_or_path "$model" --dataset "$out/openings/train.jsonl" --output_dir "$out/candidates" \
  --num_return_sequences 8 --max_new_tokens 64

python "$here/stories.py" pairs --candidates "$out/candidates/candidates.parquet" --output "$out/pairs.jsonl"

rlaif train rm --model_name_or_path "$model" --dataset "$out/pairs.jsonl" --output_dir "$out/rm" \
  --max_length 128 --num_train_epochs 3 --learning_rate 1e-3

rm -f "$out/address"
rlaif serve --model "$out/rm" --port 0 --ready_file "$out/address" >"$out/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
until [ -s "$out/address" ]; do
  kill -0 $server 2>/dev/null || { tail -n 20 "$out/serve.log" >&2; exit 1; }
  sleep 0.2
done

rlaif train ppo --model_name_or_path "$model" --dataset "$out/openings/train.jsonl" --output_dir "$out/ppo" \
  --reward_server "$(cat "$out/address")" --max_new_tokens 48 --rollout_batch_size 64 --max_steps "${STEPS:-12}" \
  --num_ppo_epochs 2 --num_mini_batches 2 --learning_rate 3e-4 --critic_learning_rate 1e-3 --kl_coef 0.1

python "$here/stories.py" curve --run "$out/ppo"
python "$here/stories.py" compare --model "$model" --model "$out/ppo" --prompts "$out/openings/heldout.jsonl" \
  --max_new_tokens 48 --output "$out/compare.json"

"""alpaca_eval judging pairs: its default annotator, `weighted_alpaca_eval_gpt4_turbo`, with another model name.

`python judge.py URL ROWS.jsonl --in_flight 64` in an environment with alpaca_eval, and in a folder for its caches.
Each row is one request of one token with five log-probabilities.
"""

import argparse
import json
import os
from pathlib import Path

NAME = "weighted_alpaca_eval_gpt4_turbo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--in_flight", type=int, default=5)
    args = parser.parse_args()
    folder = Path.cwd() / "annotator"
    folder.mkdir(exist_ok=True)
    clients = folder / "clients.json"  # JSON is YAML
    clients.write_text(json.dumps({"default": [{"api_key": "none", "base_url": f"{args.url}/v1"}]}))
    os.environ["OPENAI_CLIENT_CONFIG_PATH"] = str(clients)  # both are read when the package is imported
    os.environ["OPENAI_MAX_CONCURRENCY"] = str(args.in_flight)

    import yaml
    from alpaca_eval import constants
    from alpaca_eval.annotators import PairwiseAnnotator

    shipped = Path(constants.EVALUATORS_CONFIG_DIR)
    config = yaml.safe_load((shipped / NAME / "configs.yaml").read_text())
    config[NAME]["prompt_template"] = str(shipped / config[NAME]["prompt_template"])
    config[NAME]["completions_kwargs"] |= {"model_name": "judge", "price_per_token": 0.0}
    (folder / "configs.yaml").write_text(yaml.safe_dump(config))

    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    pairs = [
        {"instruction": r["prompt"], "output_1": r["response_a"], "output_2": r["response_b"]} for r in rows
    ]
    annotator = PairwiseAnnotator(annotators_config=str(folder), caching_path=str(folder / "cache.json"))
    annotated = annotator.annotate_pairs(pairs)
    labelled = sum(a["preference"] is not None for a in annotated)
    print(json.dumps({"rows": len(rows), "labelled": labelled}))


if __name__ == "__main__":
    main()

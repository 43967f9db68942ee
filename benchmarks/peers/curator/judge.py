"""curator judging pairs: an `LLM` subclass with a prompt and a parser, as its documentation shows.

`python judge.py URL ROWS.jsonl --in_flight 64` in an environment with bespokelabs-curator. Each row is one request of
one token. Limits are set so high that its own rate limiter never waits; responses are not cached.
"""

import argparse
import json
from pathlib import Path

from bespokelabs import curator


class PairJudge(curator.LLM):
    """Asks which of two responses is better."""

    def prompt(self, row: dict) -> str:
        """The question about a row."""
        return (
            "Two assistants answered the same question. Which answer is better? Reply with 1 or 2 alone.\n\n"
            f"Question:\n{row['prompt']}\n\nAnswer 1:\n{row['response_a']}\n\nAnswer 2:\n{row['response_b']}"
        )

    def parse(self, row: dict, response: str) -> dict:
        """The label of a row."""
        return {"prompt": row["prompt"], "label": response.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--in_flight", type=int, default=64)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    judge = PairJudge(
        model_name="judge",
        backend="openai",
        generation_params={"max_tokens": 1, "temperature": 0.0},
        backend_params={
            "base_url": f"{args.url}/v1",
            "max_requests_per_minute": 100_000_000,
            "max_tokens_per_minute": 1_000_000_000_000,
            "max_concurrent_requests": args.in_flight,
            "invalid_finish_reasons": ["content_filter"],
        },
    )
    labels = judge(rows, working_dir=str(Path.cwd() / "curator")).dataset["label"]
    print(json.dumps({"rows": len(rows), "labelled": sum(label in ("1", "2") for label in labels)}))


if __name__ == "__main__":
    main()

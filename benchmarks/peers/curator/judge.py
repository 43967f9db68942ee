"""curator judging pairs: an `LLM` subclass with a prompt and a parser, as its documentation shows.

`python judge.py URL ROWS.jsonl --in_flight 64` in an environment with bespokelabs-curator. Each row is one request of
one token, and its label the probability that five log-probabilities give; with `--text` it is the token alone. Limits
are set so high that its own rate limiter never waits.
"""

import argparse
import json
import math
from pathlib import Path

from bespokelabs import curator


class TextJudge(curator.LLM):
    """Asks which of two responses is better; the label is the token."""

    def prompt(self, row: dict) -> str:
        """The question about a row."""
        return (
            "Two assistants answered the same question. Which answer is better? Reply with 1 or 2 alone.\n\n"
            f"Question:\n{row['prompt']}\n\nAnswer 1:\n{row['response_a']}\n\nAnswer 2:\n{row['response_b']}"
        )

    def parse(self, row: dict, response: str) -> dict:
        """The label of a row."""
        return {"prompt": row["prompt"], "label": float(response.strip() == "1")}


class SoftJudge(TextJudge):
    """The same; the label is P("1") among "1" and "2"."""

    return_completions_object = True

    def parse(self, row: dict, response: dict) -> dict:
        """The label of a row."""
        mass = {"1": 0.0, "2": 0.0}
        for entry in response["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            label = entry["token"].strip()
            if label in mass:
                mass[label] += math.exp(entry["logprob"])
        return {"prompt": row["prompt"], "label": mass["1"] / (mass["1"] + mass["2"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--text", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    logprobs = {} if args.text else {"logprobs": True, "top_logprobs": 5}
    judge = (TextJudge if args.text else SoftJudge)(
        model_name="judge",
        backend="openai",
        generation_params={"max_tokens": 1, "temperature": 0.0, **logprobs},
        backend_params={
            "base_url": f"{args.url}/v1",
            "max_requests_per_minute": 100_000_000,
            "max_tokens_per_minute": 1_000_000_000_000,
            "max_concurrent_requests": args.in_flight,
            "invalid_finish_reasons": ["content_filter"],
        },
    )
    labels = judge(rows, working_dir=str(Path.cwd() / "curator")).dataset["label"]
    print(json.dumps({"rows": len(rows), "labelled": sum(0.0 <= label <= 1.0 for label in labels)}))


if __name__ == "__main__":
    main()

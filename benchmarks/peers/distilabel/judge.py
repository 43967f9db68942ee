"""distilabel judging pairs: a pipeline of its pairwise task over its OpenAI client.

`python judge.py URL ROWS.jsonl --in_flight 64` in an environment with distilabel. Each row is one request of one
token. The task sends a batch at a time, so the batch size is its number of requests in flight.
"""

import argparse
import json
from pathlib import Path

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import PrometheusEval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--in_flight", type=int, default=50)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    data = [{"instruction": r["prompt"], "generations": [r["response_a"], r["response_b"]]} for r in rows]
    with Pipeline(name="judge") as pipeline:
        load = LoadDataFromDicts(data=data, batch_size=args.in_flight)
        llm = OpenAILLM(
            model="judge",
            base_url=f"{args.url}/v1",
            api_key="none",
            generation_kwargs={"max_new_tokens": 1, "temperature": 0.0},
        )
        judge = PrometheusEval(
            llm=llm, mode="relative", rubric="helpfulness", input_batch_size=args.in_flight
        )
        load >> judge
    distiset = pipeline.run(use_cache=False)
    labels = distiset["default"]["train"]["result"]
    print(json.dumps({"rows": len(rows), "labelled": sum(label in ("A", "B") for label in labels)}))


if __name__ == "__main__":
    main()

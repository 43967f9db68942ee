"""The messages that distilabel's pairwise task makes of pairs: `python prompts.py ROWS.jsonl OUT.jsonl`."""

import json
import sys
from pathlib import Path

from distilabel.models import OpenAILLM
from distilabel.steps.tasks import PrometheusEval


def main() -> None:
    llm = OpenAILLM(model="judge", base_url="http://127.0.0.1:9/v1", api_key="none")
    task = PrometheusEval(llm=llm, mode="relative", rubric="helpfulness")
    task.load()
    with Path(sys.argv[2]).open("w") as out:
        for line in Path(sys.argv[1]).read_text().splitlines():
            row = json.loads(line)
            generations = [row["response_a"], row["response_b"]]
            messages = task.format_input({"instruction": row["prompt"], "generations": generations})
            out.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()

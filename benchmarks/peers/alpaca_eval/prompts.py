"""The messages that alpaca_eval makes of pairs: `python prompts.py TEMPLATE ROWS.jsonl OUT.jsonl`.

TEMPLATE is one of the prompts that it ships, such as `alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt`. Every line of
the output holds the messages of a row, or the error that the package raised.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from alpaca_eval import constants, utils


def main() -> None:
    template = (Path(constants.EVALUATORS_CONFIG_DIR) / sys.argv[1]).read_text()
    rows = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]
    with Path(sys.argv[3]).open("w") as out:
        for row in rows:
            frame = pd.DataFrame(
                [
                    {
                        "instruction": row["prompt"],
                        "output_1": row["response_a"],
                        "output_2": row["response_b"],
                    }
                ]
            )
            try:
                prompts, _ = utils.make_prompts(frame, template)
                result = {"messages": utils.prompt_to_chatml(prompts[0].strip())}
            except (AssertionError, ValueError, KeyError, IndexError) as err:
                result = {"error": f"{type(err).__name__}: {err}"}
            out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

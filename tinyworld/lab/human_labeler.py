"""Labels as people give them: gold, which plays the human, says which of two responses it prefers.

    python -m tinyworld.lab.human_labeler --labels DIR --output FILE

It labels the pairs of a preference dataset anew, each with certainty; those that it ties are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlaif.errors import RlaifError
from rlaif.records import Quarantine, read_preferences
from rlaif.storage import write_atomic
from rlaif.types import to_dicts
from tinyworld.gold import gold_prefers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, required=True, help="a preference dataset")
    parser.add_argument("--output", type=Path, required=True, help="JSONL of labelled pairs")
    args = parser.parse_args()
    rows, turned, ties = [], 0, 0
    for row in read_preferences(args.labels, Quarantine(None)):
        wins = gold_prefers(row.prompt[-1].content, row.chosen, row.rejected)
        if wins == 0.5:
            ties += 1
            continue
        turned += wins == 0
        chosen, rejected = (row.chosen, row.rejected) if wins else (row.rejected, row.chosen)
        rows.append(
            {"prompt": to_dicts(row.prompt), "chosen": chosen, "rejected": rejected, "chosen_prob": 1.0}
        )
    write_atomic(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{turned} of {len(rows)} labels prefer the other response, {ties} ties left out -> {args.output}")


if __name__ == "__main__":
    try:
        main()
    except RlaifError as err:
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)

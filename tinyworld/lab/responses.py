"""The responses of `rlaif sample`, one a row, as `rlaif score` reads them.

python -m tinyworld.lab.responses --candidates DIR --output FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlaif.errors import RlaifError
from rlaif.records import Quarantine, read_candidates
from rlaif.storage import write_atomic
from rlaif.types import to_dicts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=Path, required=True, help="a folder of `rlaif sample`")
    parser.add_argument("--output", type=Path, required=True, help="JSONL")
    args = parser.parse_args()
    rows = [
        {"prompt": to_dicts(sampled.prompt), "response": candidate.response}
        for sampled in read_candidates(args.candidates, Quarantine(None))
        for candidate in sampled.candidates
    ]
    write_atomic(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} responses -> {args.output}")


if __name__ == "__main__":
    try:
        main()
    except RlaifError as err:
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)

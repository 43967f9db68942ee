"""Labels as a less able labeler would give them.

    python -m tinyworld.lab.noisy_labeler --labels DIR --wrong 0.25 --output FILE

The labeler sees a pair through noise, as z = 2 p - 1 + s e, where p is the label of the able one and e is standard
normal, and answers with what it then knows: P(A preferred | z) = sigmoid(2 z / s^2), the posterior where p is 0 or 1.
A share `wrong` of the labels of clear pairs then prefers the other response, Phi(-1 / s) = wrong, most often among
those near 1/2: it is a labeler that knows how sure it can be. `--wrong 0` leaves the labels as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import islice
from pathlib import Path
from random import Random
from statistics import NormalDist

from rlaif.errors import RlaifError
from rlaif.records import Quarantine, read_preferences
from rlaif.storage import write_atomic
from rlaif.types import content_id, to_dicts


def noise_scale(wrong: float) -> float:
    """Standard deviation s of the noise that turns a share `wrong` of clear labels, in (0, 1/2)."""
    return -1.0 / NormalDist().inv_cdf(wrong)


def blurred(p: float, scale: float, e: float) -> float:
    """The label of the less able labeler, in [0, 1].

    Args:
        p: the able labeler's P(A preferred).
        scale: standard deviation of the noise.
        e: a standard normal number.
    """
    z = 2.0 * p - 1.0 + scale * e
    return 0.5 * (1.0 + math.tanh(z / scale**2))  # sigmoid(2 z / scale^2), without overflow


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, required=True, help="a preference dataset")
    parser.add_argument(
        "--wrong", type=float, required=True, help="share of clear labels that prefer the other response"
    )
    parser.add_argument("--limit", type=int, help="label the first n pairs alone")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, required=True, help="JSONL of pairs with soft labels")
    args = parser.parse_args()
    if not 0 <= args.wrong < 0.5:
        raise SystemExit(f"--wrong {args.wrong} must be in [0, 1/2)")
    scale = noise_scale(args.wrong) if args.wrong else None
    rows, turned = [], 0
    for row in islice(read_preferences(args.labels, Quarantine(None)), args.limit):
        prompt = to_dicts(row.prompt)
        e = Random(content_id(args.seed, prompt, row.chosen, row.rejected)).gauss(0.0, 1.0)
        p = row.chosen_prob if scale is None else blurred(row.chosen_prob, scale, e)
        turned += p < 0.5
        chosen, rejected = (row.chosen, row.rejected) if p >= 0.5 else (row.rejected, row.chosen)
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_prob": max(p, 1.0 - p)}
        )
    write_atomic(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{turned} of {len(rows)} labels prefer the other response -> {args.output}")


if __name__ == "__main__":
    try:
        main()
    except RlaifError as err:
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)

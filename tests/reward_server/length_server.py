"""A reward server in a process of its own, with a rule for a model: `python -m tests.reward_server.length_server`.

Takes the flags of `rlaif serve`. `--model length` scores at once; `--model length:0.02` takes 0.02 s for a batch.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from reward_server.scorers.base import Outcome, Prepared, Scorer
from reward_server.server import serve
from rlaif.cli import COMMANDS, parse_config
from tests.reward_server.fakes import LengthScorer


class PacedScorer(LengthScorer):
    """`LengthScorer` whose batches take so many seconds, and that keeps no record of them."""

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.batch_s = batch_s

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        await asyncio.sleep(self.batch_s)
        try:
            return await super().score(batch)
        finally:
            self.batches.clear()


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    config = parse_config(next(c for c in COMMANDS if c.name == "serve"), sys.argv[1:])
    batch_s = float(config.model.partition(":")[2] or 0)

    async def load() -> Scorer:
        return PacedScorer(batch_s)

    asyncio.run(serve(config, load))


if __name__ == "__main__":
    main()

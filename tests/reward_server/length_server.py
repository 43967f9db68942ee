"""A reward server in a process of its own, with a rule for a model: `python -m tests.reward_server.length_server`.

Arguments: PORT READY_FILE, and optionally flags of `ServeConfig` as NAME=VALUE.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from reward_server.config import ServeConfig
from reward_server.scorers.base import Scorer
from reward_server.server import serve
from tests.reward_server.fakes import LengthScorer


async def load() -> Scorer:
    return LengthScorer()


def main() -> None:
    port, ready, *rest = sys.argv[1:]
    flags: dict[str, Any] = {}
    for flag in rest:
        name, _, value = flag.partition("=")
        flags[name] = Path(value) if name.startswith(("tls", "token")) else value
    config = ServeConfig(
        model="length", port=int(port), ready_file=Path(ready), drain_timeout_s=10.0, **flags
    )
    asyncio.run(serve(config, load))


if __name__ == "__main__":
    main()

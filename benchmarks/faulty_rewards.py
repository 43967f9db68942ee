"""A reward server with faults on order, for `robustness.py`: real gRPC, rewards that are a function of the text.

Started with `python benchmarks/faulty_rewards.py --port 50077 ...`; it prints nothing and runs until it is killed.
Every call is a line in `--log` when it begins and another when it is answered, so that calls which a kill cut off
can be counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos.rlaif.reward.v1 import reward_pb2
from tests.policy_trainer.reward_servers import NumberServer, serving


def reward(text: str) -> float:
    """Fewer words are better; a hash makes equal lengths differ. In [-2, 2] for up to some 40 words."""
    return 1.0 - len(text.split()) / 16 + _share("reward", text)


def fails(text: str, share: float) -> bool:
    """Whether this text is one of the `share` of all that can never be scored."""
    return _share("fails", text) < share


def _share(purpose: str, text: str) -> float:
    digest = hashlib.blake2b(f"{purpose} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass
class FaultyServer(NumberServer):
    """Takes `delay_s` per call; fails on some texts and hangs in some calls until the caller has gone."""

    fail_share: float = 0.0
    hang_share: float = 0.0
    delay_s: float = 0.0
    log: Path = Path("/dev/null")
    chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.score = self._reward

    def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """See the protocol; with the faults."""
        hangs = self.chance.random() < self.hang_share
        self._note({"call": "hangs" if hangs else "begins", "items": len(request.items)})
        while hangs and context.is_active():
            time.sleep(0.05)
        time.sleep(self.delay_s)
        answer = super().Score(request, context)
        failed = sum(outcome.HasField("error") for outcome in answer.outcomes)
        if not hangs:
            self._note({"call": "answered", "items": len(request.items), "failed": failed})
        return answer

    def _reward(self, text: str) -> float:
        if fails(text, self.fail_share):
            raise ValueError
        return reward(text)

    def _note(self, line: dict[str, object]) -> None:
        with self.lock, self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fail_share", type=float, default=0.0)
    parser.add_argument("--hang_share", type=float, default=0.0)
    parser.add_argument("--delay_s", type=float, default=0.0)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    server = FaultyServer(
        center=0.0,
        scale=1.0,
        fail_share=args.fail_share,
        hang_share=args.hang_share,
        delay_s=args.delay_s,
        log=args.log,
    )
    with serving(server, port=args.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()

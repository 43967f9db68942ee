"""What gives rewards: conversations in, one reward or one reason per conversation out.

A trainer sees the protocol alone and cannot tell a served reward from a local function.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from rlaif.errors import RewardServerError
from rlaif.types import Conversation, Pair, with_response

DEFAULT_REQUEST_BYTES = 4 * 1024 * 1024
"""gRPC's own default limit, taken when a server declares none."""


class Reward(NamedTuple):
    """One conversation's reward, or the reason why there is none.

    Attributes:
        value: the normalised score that training optimises, (raw - center) / scale; None if missing.
        raw: the scorer's own output: a reward model's logit, a judge's expected level; None if missing.
        reason: why `value` is None, as `code: words`; None otherwise.
        tokens: tokens that the scorer read; 0 if unknown.
    """

    value: float | None
    raw: float | None
    reason: str | None = None
    tokens: int = 0


class Comparison(NamedTuple):
    """Which of two responses is preferred, or the reason why nobody knows.

    Attributes:
        p_a: P(A preferred) in [0, 1], of a judge the mean over both orders; None if missing.
        p_a_first: a judge's P(A preferred) when it saw A first; None where there are no orders.
        p_a_second: the same when it saw A second.
        reason: why `p_a` is None, as `code: words`; None otherwise.
    """

    p_a: float | None
    p_a_first: float | None = None
    p_a_second: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Who scores, and within which limits.

    Attributes:
        name: what is served, as the server was told (`hf:DIR`, `tinyworld:judge`).
        version: changes whenever scores may change.
        kind: `reward_model` (raw scores are Bradley-Terry logits) or `judge` (they are levels of a scale).
        max_items: conversations per request.
        max_tokens_per_item: after the scorer's chat template; 0 means unknown.
        max_request_bytes: size of one serialised request.
        center: subtracted from the raw score.
        scale: divides the centred score; positive.
    """

    name: str
    version: str
    kind: Literal["reward_model", "judge"]
    max_items: int = 256
    max_tokens_per_item: int = 0
    max_request_bytes: int = DEFAULT_REQUEST_BYTES
    center: float = 0.0
    scale: float = 1.0


class RewardSource(Protocol):
    """Anything that gives rewards for conversations."""

    def info(self) -> ServerInfo:
        """Who scores; the same answer for the life of the source."""

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """One reward per conversation, in order. A conversation ends with the assistant turn to be scored."""

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in the background, so that it overlaps other work."""

    def submit_pairs(self, pairs: Sequence[Pair]) -> Future[list[Comparison]]:
        """Which response of each pair is preferred, in order and in the background."""

    def close(self) -> None:
        """Release threads and connections; calls under way are abandoned."""


class FunctionReward:
    """A Python callable as a reward source: `function(prompts, responses) -> list of float or None`.

    `prompts` are conversations that end with a user turn, `responses` the assistant texts. None means that no
    reward could be had. The calls run in one background thread, in order.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Conversation], Sequence[str]], Iterable[float | None]],
        *,
        name: str = "function",
        version: str = "1",
        kind: Literal["reward_model", "judge"] = "reward_model",
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Wrap `function`; `version` is the caller's word for which function it is."""
        self._function = function
        self._info = ServerInfo(name, version, kind, center=center, scale=scale)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="function-reward")

    def info(self) -> ServerInfo:
        """What the constructor was told."""
        return self._info

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """Call the function on prompts and responses.

        Raises:
            RewardServerError: it returned another number of rewards than there are conversations.
        """
        raws = list(self._function([c[:-1] for c in conversations], [c[-1].content for c in conversations]))
        if len(raws) != len(conversations):
            raise RewardServerError(
                f"reward function {self._info.name} gave {len(raws)} rewards for {len(conversations)} "
                "conversations; return one number or None for each"
            )
        return [self._reward(raw) for raw in raws]

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in the background thread."""
        return self._thread.submit(self.score, list(conversations))

    def submit_pairs(self, pairs: Sequence[Pair]) -> Future[list[Comparison]]:
        """The sigmoid of the difference of raw scores, as a reward server compares; in the background thread."""
        return self._thread.submit(self._compare, list(pairs))

    def _compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        both = self.score([with_response(p.prompt, r) for p in pairs for r in (p.a, p.b)])
        return [
            Comparison(None, reason=a.reason or b.reason)
            if a.raw is None or b.raw is None
            else Comparison(0.5 + 0.5 * math.tanh((a.raw - b.raw) / 2))
            for a, b in zip(both[::2], both[1::2], strict=True)
        ]

    def close(self) -> None:
        """Wait for the background thread."""
        self._thread.shutdown()

    def _reward(self, raw: float | None) -> Reward:
        if raw is None:
            return Reward(None, None, "no_reward: the function returned None")
        if not math.isfinite(raw):
            return Reward(None, None, f"not_finite: the function returned {raw}")
        return Reward((raw - self._info.center) / self._info.scale, float(raw))


class Cause(NamedTuple):
    """Why most of the missing rewards are missing.

    Attributes:
        rewards: how many are missing for it; reasons that differ in their numbers alone are one.
        reason: of the first of them, as `code: words`.
    """

    rewards: int
    reason: str

    @property
    def too_long(self) -> bool:
        """Whether the scorer reads no conversation of such a length."""
        return self.reason.startswith("out_of_range:")

    def advice(self, flag: str) -> str:
        """What may help, where the command's `flag` decides about long conversations; empty if nothing is known."""
        return f" ({flag} left drops the oldest tokens of what is too long)" if self.too_long else ""

    def __str__(self) -> str:
        """The words for a message."""
        return f"{self.rewards} because: {self.reason}"


def main_cause(rewards: Iterable[Reward]) -> Cause | None:
    """The most frequent reason of the missing rewards; None if none is missing."""
    alike: dict[str, list[str]] = {}
    for reward in rewards:
        if reward.value is None:
            reason = reward.reason or "unknown: no reason was given"
            alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", reason), []).append(reason)
    most = max(alike.values(), key=len, default=None)
    return None if most is None else Cause(len(most), most[0])


def missing_by_reason(rewards: Iterable[Reward]) -> Counter[str]:
    """How many rewards are missing, by the code that begins their reason."""
    return Counter(
        (reward.reason or "unknown").partition(":")[0] for reward in rewards if reward.value is None
    )

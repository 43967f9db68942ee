"""What requests cost, and a run that stops before it costs more than it may."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from labeler.journal import Usage
from rlaif.errors import BudgetReached, EndpointError
from rlaif.types import Conversation

_TEMPLATE_TOKENS = 256
"""More than any common chat template adds to a conversation: a default system prompt, dates, role markers."""

_MESSAGE_TOKENS = 16
"""More than a chat template adds to one message."""


@dataclass(frozen=True, slots=True)
class Price:
    """What an endpoint charges, in USD per million tokens.

    Attributes:
        prompt: for prompt tokens.
        completion: for completion tokens.
        cached: for prompt tokens that the endpoint had in its cache; None for the price of any other.
    """

    prompt: float
    completion: float
    cached: float | None = None

    def cost(self, usage: Usage) -> float:
        """USD for tokens as the back end counted them."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        micro = fresh * self.prompt + usage.cached_tokens * cached + usage.completion_tokens * self.completion
        return micro / 1e6

    def most(self, usage: Usage) -> float:
        """USD that these tokens cost at most, however many of them turn out to be cached."""
        prompt = max(self.prompt, self.cached or 0.0)
        return (usage.prompt_tokens * prompt + usage.completion_tokens * self.completion) / 1e6


def most_tokens(messages: Conversation, prefix: str, max_tokens: int) -> Usage:
    """More tokens than a request to generate can take, whatever the tokenizer.

    No token spells less than one byte, so a text has at most as many tokens as bytes of UTF-8.
    """
    text = sum(len(m.content.encode()) + _MESSAGE_TOKENS for m in messages) + len(prefix.encode())
    return Usage(text + _MESSAGE_TOKENS + _TEMPLATE_TOKENS, max_tokens)


def most_label_tokens(messages: Conversation, prefix: str, labels: Sequence[str]) -> Usage:
    """More tokens than a label reading can take: labels of several tokens are read in several requests.

    There is at most one request for each proper beginning of a label, with and without a space before it.
    """
    beginnings = {text[:n] for label in labels for text in (label, " " + label) for n in range(len(text))}
    one = most_tokens(messages, prefix + max(labels, key=len), 1)
    return Usage(one.prompt_tokens * len(beginnings), len(beginnings))


class Budget:
    """Money that a run may spend.

    A request is sent only if the limit holds even when it, and all that are in flight, cost the most they can. If
    not, it waits for those to end, which shows their real cost; with none in flight, the budget is reached. So the
    limit is kept to the cent, and what is left of it is less than one request may cost. A reply that is no answer
    counts by the tokens that it tells; requests that fail without one do not: no endpoint tells what it charges.

    Args:
        price: what tokens cost.
        limit: USD.
        paid: tokens of earlier runs.
    """

    def __init__(self, price: Price, limit: float, paid: Usage) -> None:
        self.price = price
        self.limit = limit
        self._paid = paid
        self._held = 0.0
        self._open = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def spent(self) -> float:
        """USD for all replies so far."""
        return self.price.cost(self._paid)

    async def reserve(self, most: Usage) -> float:
        """Hold the most that a request can cost until it is settled; waits while others are in flight.

        Args:
            most: a bound of the request's tokens.

        Returns:
            What is held, USD; give it to `settle`.

        Raises:
            BudgetReached: nothing is in flight, and the request could exceed the limit.
        """
        cost = self.price.most(most)
        while self.spent + self._held + cost > self.limit:
            if not self._open:
                raise BudgetReached(
                    f"{self.spent:.4g} USD are spent and the next request may take up to {cost:.2g}, "
                    f"which --max_cost {self.limit:g} does not cover"
                )
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._held += cost
        self._open += 1
        return cost

    def settle(self, held: float, usage: Usage | None) -> None:
        """Free what was held for a request and count what it took.

        Args:
            held: as `reserve` gave it.
            usage: the reply's tokens; None if there was none.

        Raises:
            EndpointError: the endpoint does not say what its replies take, so no limit can be kept.
        """
        self._open -= 1
        self._held = self._held - held if self._open else 0.0
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
        if usage is None:
            return
        self._paid += usage
        if not usage.prompt_tokens:
            raise EndpointError(
                "the endpoint does not report the tokens of its replies, so --max_cost cannot be kept: "
                "use --dry_run for an estimate, and run without --max_cost"
            )

"""What a language model must do to serve as judge or policy: generate, and read out label probabilities.

Back ends live in `labeler/backends/`; a judge sees only the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlaif.errors import RlaifError
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution


class RequestFailed(RlaifError):
    """One request failed for a reason of its own; others may well succeed. The row stays unlabelled.

    A model or an endpoint that is of no use at all raises `ModelError` or `EndpointError` instead.
    """


class Postponed(RequestFailed):
    """A request that was not sent, or not answered yet; that is no failure of its own."""


class NoAnswer(RequestFailed):
    """A reply came and is no answer: filtered, broken off, cut before any text. It is paid for like any other.

    Attributes:
        prompt_tokens: as `Generation` has them.
        completion_tokens: as `Generation` has them.
        cached_tokens: as `Generation` has them.
    """

    def __init__(
        self, reason: str, prompt_tokens: int = 0, completion_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        super().__init__(reason)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cached_tokens = cached_tokens


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text.

    Attributes:
        text: the continuation alone, without the assistant prefix and without the stop string.
        finish_reason: `stop` (end of turn or a stop string) or `length` (cut at `max_tokens`).
        prompt_tokens: tokens read, assistant prefix included.
        completion_tokens: tokens generated.
        cached_tokens: prompt tokens that the back end did not have to compute again.
        context_ids: ids of all tokens up to the end of `text`, from the start of the prompt; empty where the
            back end does not tell them, or where `text` ends inside a token.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    context_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelReading:
    """Next-token log-probabilities of a closed set of labels, and what reading them cost.

    Attributes:
        distribution: over the labels.
        top: the likeliest next tokens as the endpoint reported them, (text, natural-log probability), where the
            labels had to be looked up among these; None where every label was read exactly.
    """

    distribution: LabelDistribution
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    top: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a model can give; found by a probe where it cannot be known.

    Attributes:
        logprobs: `exact` for any label, `top_k` for labels among the likeliest tokens, `none`.
        continues: an assistant turn that was begun is continued in place.
        note: one line for people: which server, which of its features are used.
    """

    logprobs: Literal["exact", "top_k", "none"]
    continues: bool = True
    note: str = ""


class LLM(Protocol):
    """A language model behind any back end; it batches the calls that are in flight together."""

    @property
    def name(self) -> str:
        """The model's name as the user wrote it, e.g. `hf:gpt2`."""
        ...

    @property
    def version(self) -> str:
        """Identity of the weights where they can be seen, else the name: labels of two versions never mix."""
        ...

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Strings that the tokenizer reads as control tokens; they are broken up in candidate text."""
        ...

    async def probe(self) -> Abilities:
        """What the model can give; asked once, before anything is paid for.

        Raises:
            ModelError: the model is unknown.
            EndpointError: the endpoint is gone.
        """
        ...

    async def generate(
        self,
        messages: Conversation,
        prefix: str = "",
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continue the assistant turn that starts with `prefix`.

        Args:
            messages: the conversation; ends with a user turn.
            prefix: assistant text to continue from; empty for a fresh turn.
            max_tokens: most tokens to generate, > 0.
            temperature: 0 for greedy decoding, else sampling from the full distribution.
            seed: makes sampling a function of the request.
            stop: strings that end the generation; not part of the text.

        Raises:
            RequestFailed: this request failed.
            ModelError: the model is unknown or of no use here.
            EndpointError: the endpoint is gone.
        """
        ...

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """Log-probabilities of `labels` right after `prefix`, read in a fresh request.

        A label that the tokenizer splits (`10` into `1`, `0`) has the probability of its whole spelling, and a
        label that begins another one (`1`) has the probability of not being continued to it.

        Args:
            messages: the conversation; ends with a user turn.
            prefix: all assistant text before the label.
            labels: the closed set, in order.
            after: the generation whose text `prefix` contains, if any. A back end may go on from its
                `context_ids`, so that a prefix cache is met token for token; the answer means the same.

        Raises:
            RequestFailed: this request failed, or no label is among the tokens the endpoint reports.
            ModelError: the tokenizer splits a label and the endpoint cannot read its parts.
            EndpointError: the endpoint is gone or gives no log-probabilities.
        """
        ...

    async def close(self) -> None:
        """Free the model or the connections."""
        ...


@dataclass(frozen=True, slots=True)
class LLMOptions:
    """How a back end runs.

    Attributes:
        max_in_flight: most requests at a time; a local model batches at most so many rows.
        adaptive: with an endpoint, begin with fewer requests at a time, grow while it keeps up, shrink when it
            answers 429.
        requests_per_minute: cap on requests sent to an endpoint; None for none.
        tokens_per_minute: cap on prompt and completion tokens together; None for none.
        timeout_s: seconds before one request to an endpoint counts as failed.
        max_retries: further attempts after a transient failure of an endpoint.
        backoff_s: wait before the first further attempt, doubled each time, with jitter; `Retry-After` wins, from the
            second wait on only where it is longer.
    """

    max_in_flight: int = 128
    adaptive: bool = True
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 120.0
    max_retries: int = 5
    backoff_s: float = 0.5


def open_llm(ref: ModelRef, options: LLMOptions | None = None) -> LLM:
    """The back end for a model name; heavy libraries are imported only by the one that needs them.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the script of a `scripted:` model cannot be read.
    """
    options = options or LLMOptions()
    if ref.backend == "openai":
        from labeler.backends.openai import OpenAIModel

        return OpenAIModel(ref, options)
    if ref.backend == "decisions":
        from labeler.backends.decisions import DecisionModel

        return DecisionModel(ref, options)
    if ref.backend == "vllm":
        from labeler.backends.vllm import VLLMModel

        return VLLMModel.load(ref, options)
    if ref.backend == "scripted":
        from labeler.backends.scripted import load_script

        return load_script(ref.name)
    from labeler.backends.hf import HFModel

    return HFModel.load(ref, options)

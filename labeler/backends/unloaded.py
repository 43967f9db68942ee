"""Models that are not loaded, or not asked: they tell the tokens of a request and compute nothing. For dry runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from transformers import AutoConfig, PreTrainedTokenizerBase

from labeler.backends.labels import Tokens, longest_reads
from labeler.backends.local import (
    Decoded,
    LocalModel,
    Request,
    TokenReadings,
    cannot_load,
    load_tokenizer,
    weights_hash,
)
from labeler.backends.scripted import load_script
from labeler.dry_run import PrefixCache
from labeler.llm import LLM, Abilities, Generation, LabelReading
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution, Message

_ENDLESS = 2**31

_CHARACTERS = 4
"""Characters per token of English text, by OpenAI's rule of thumb."""

Rows = Callable[[Mapping[Tokens, Tokens]], Sequence[Tokens]]
"""Which continuations of a context a back end computes to read the log-probabilities that it is asked for."""


class Unloaded(LocalModel):
    """A model's tokenizer without its weights: renders, tokenises and counts as the model would.

    A generation has no text, and a reading gives all labels the same probability.

    Args:
        tokenizer: of the model.
        name: how the user named it.
        version: as of the loaded model.
        rows: how the back end reads labels.
        cache: the back end's prefix cache, if it has one.
        context: most tokens of prompt and continuation together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        version: str,
        rows: Rows,
        cache: PrefixCache | None,
        context: int = _ENDLESS,
    ) -> None:
        super().__init__(tokenizer, name=name, version=version, context=context)
        self._rows = rows
        self._cache = cache

    @classmethod
    def load(cls, ref: ModelRef) -> Unloaded:
        """The model of an `hf:`, `vllm:` or `tinyworld:` name.

        Raises:
            ModelError: there is no such model.
        """
        path = ref.name.partition("?")[0] if ref.backend == "vllm" else ref.pretrained_path()
        tokenizer = load_tokenizer(ref, path)
        try:
            config = AutoConfig.from_pretrained(path).get_text_config()
        except (OSError, ValueError, KeyError) as err:
            raise cannot_load(ref, err) from err
        return cls(
            tokenizer,
            name=str(ref),
            version=f"{ref}#{weights_hash(path)}",
            rows=list if ref.backend == "vllm" else longest_reads,
            cache=PrefixCache(16) if ref.backend == "vllm" else None,
            context=int(getattr(config, "max_position_embeddings", None) or _ENDLESS),
        )

    async def probe(self) -> Abilities:
        """Everything, exactly."""
        return Abilities("exact", note="tokenizer alone")

    async def close(self) -> None:
        """Nothing to free."""

    async def _decode(self, request: Request) -> Decoded:
        return Decoded("", (), "length", self._meet(request.ids))

    async def _read(self, ids: tuple[int, ...], reads: Mapping[Tokens, Tokens]) -> TokenReadings:
        rows = [(*ids, *row) for row in self._rows(reads)]
        even = {after: dict.fromkeys(wanted, -math.log(len(wanted))) for after, wanted in reads.items()}
        return TokenReadings(even, sum(map(len, rows)), len(rows), sum(map(self._meet, rows)))

    def _meet(self, ids: tuple[int, ...]) -> int:
        return 0 if self._cache is None else self._cache.meet(ids)


class Unsent:
    """An endpoint that is not asked: tokens of a request by a text's encoding, in the layout of OpenAI's models.

    Each message takes three tokens besides its role and content, and the reply is opened with three (OpenAI
    Cookbook, "How to count tokens with tiktoken").

    Args:
        ref: the model.
        encode: text to tokens.
        cache: the endpoint's prefix cache.
    """

    def __init__(self, ref: ModelRef, encode: Callable[[str], Sequence[object]], cache: PrefixCache) -> None:
        self._ref = ref
        self._encode = encode
        self._cache = cache

    @property
    def name(self) -> str:
        """The model's name as the user wrote it."""
        return str(self._ref)

    @property
    def version(self) -> str:
        """As of the endpoint's back end."""
        return str(self._ref)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """As of the endpoint's back end."""
        return ()

    async def probe(self) -> Abilities:
        """What an endpoint that can serve as judge has at least."""
        return Abilities("top_k", note="not asked")

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
        """No text, and the tokens of the prompt."""
        return Generation("", "length", *self._count(messages, prefix))

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """All labels alike, and the tokens of the prompt."""
        even = LabelDistribution((-math.log(len(labels)),) * len(labels), 1.0)
        return LabelReading(even, *self._count(messages, prefix, 1))

    async def close(self) -> None:
        """Nothing to free."""

    def _count(self, messages: Conversation, prefix: str, completion: int = 0) -> tuple[int, int, int]:
        turns = (*messages, Message("assistant", prefix)) if prefix else messages
        tokens = [
            token for m in turns for token in ("", "", "", *self._encode(m.role), *self._encode(m.content))
        ]
        return len(tokens) + 3, completion, self._cache.meet(tokens)


def open_unloaded(ref: ModelRef, tokenizer: str | None = None) -> tuple[LLM, str]:
    """A stand-in for a model that tells tokens and nothing else.

    Args:
        ref: the model.
        tokenizer: Hugging Face name or path, for an endpoint.

    Returns:
        The stand-in, and how it counts, in words.

    Raises:
        ModelError: there is no such model or tokenizer.
        ConfigError: the script of a `scripted:` model cannot be read.
    """
    if ref.backend == "scripted":
        return load_script(ref.name), "as the script counts"
    if ref.backend != "openai":
        return Unloaded.load(ref), "exactly, with the model's tokenizer"
    at_openai = ref.base_url is None or "api.openai.com" in ref.base_url
    cache = PrefixCache(128, least=1024) if at_openai else PrefixCache(16)
    if tokenizer is not None:
        loaded = load_tokenizer(ModelRef("hf", tokenizer), tokenizer)
        model = Unloaded(loaded, name=str(ref), version=str(ref), rows=lambda reads: [()], cache=cache)
        return model, f"exactly, if {tokenizer} is the model's tokenizer"
    try:
        import tiktoken  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return (
            Unsent(ref, _quarters, cache),
            f"ESTIMATED at {_CHARACTERS} characters per token; --tokenizer NAME_OR_PATH counts them",
        )
    try:
        encoding = tiktoken.encoding_for_model(ref.name)
    except KeyError:
        encoding = tiktoken.get_encoding("o200k_base")
    encode = partial(encoding.encode, disallowed_special=())
    return Unsent(ref, encode, cache), f"with tiktoken's {encoding.name}"


def _quarters(text: str) -> list[str]:
    return [text[i : i + _CHARACTERS] for i in range(0, len(text), _CHARACTERS)]

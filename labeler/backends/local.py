"""What the back ends of this process share: messages to token ids, labels to tokens, and back.

An engine (`labeler.backends.hf`, `labeler.backends.vllm`) sees token ids alone.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from labeler.backends.labels import Tokens, find_aliases, find_spellings, label_distribution, label_reads
from labeler.llm import Abilities, Generation, LabelReading, RequestFailed
from rlaif.chat import render
from rlaif.errors import DataError
from rlaif.models import ModelRef, cannot_load, endpoint_hint, require_pretrained
from rlaif.types import Conversation, Message, to_dicts

_TAIL = 4
"""Tokens decoded together with what follows them, so that the seam (a leading space) comes out right."""


_ENDING_TOKENS = 48
"""Context left free behind a text that continues a begun turn: a rubric's ending and its label follow a rationale."""


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids to continue and how."""

    ids: tuple[int, ...]
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Most tokens the row can come to."""
        return len(self.ids) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Decoded:
    """A continuation: its text up to the stop, all new ids, why it ended, and prompt tokens not computed again."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenReadings:
    """Next-token log-probabilities by continuation of the context and token id, and what reading them cost."""

    logprobs: Mapping[Tokens, Mapping[int, float]]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class LocalModel(ABC):
    """A causal language model in this process, seen through its tokenizer.

    Args:
        tokenizer: without a chat template, texts are plainly concatenated.
        name: how the user named it.
        version: identity of the weights.
        context: most tokens of prompt and continuation together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, version: str, context: int) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._version = version
        self._context = context
        self._spellings: dict[tuple[str, ...], tuple[tuple[Tokens, ...], ...]] = {}
        self._vocabulary: dict[int, str] | None = None

    @property
    def name(self) -> str:
        """The model's name as the user wrote it."""
        return self._name

    @property
    def version(self) -> str:
        """Name and a hash of the weight files."""
        return self._version

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Control tokens of the tokenizer."""
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(
            dict.fromkeys([*self._tokenizer.all_special_tokens, *(t.content for t in added if t.special)])
        )

    @abstractmethod
    async def probe(self) -> Abilities:
        """See `labeler.llm.LLM.probe`."""

    @abstractmethod
    async def close(self) -> None:
        """Free the model."""

    @abstractmethod
    async def _decode(self, request: Request) -> Decoded:
        """Continue token ids."""

    @abstractmethod
    async def _read(self, ids: tuple[int, ...], reads: Mapping[Tokens, Tokens]) -> TokenReadings:
        """For each continuation of `ids` in `reads`, the log-probabilities of the token ids listed for it."""

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
        """See `labeler.llm.LLM.generate`."""
        ids = self._encode(self._render(messages, prefix))
        self._check_room(len(ids) + 1)
        room = max(1, self._context - len(ids) - (_ENDING_TOKENS if prefix else 0))
        done = await self._decode(Request(ids, min(max_tokens, room), temperature, seed, tuple(stop)))
        return Generation(
            done.text,
            done.finish_reason,
            len(ids),
            len(done.ids),
            done.cached_tokens,
            context_ids(self._tokenizer, ids, done.ids, done.text),
        )

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`; read from the full vocabulary, so never censored."""
        text = self._render(messages, prefix)
        ids = self._encode(text)
        if after is not None:
            ids = continued(self._tokenizer, after.context_ids, ids)
        spellings = self._spell(text, tuple(labels))
        reads = label_reads(spellings)
        self._check_room(len(ids) + max(map(len, reads)) + 1)
        found = await self._read(ids, reads)
        return LabelReading(
            label_distribution(spellings, found.logprobs),
            found.prompt_tokens,
            found.completion_tokens,
            found.cached_tokens,
        )

    def _check_room(self, tokens: int) -> None:
        if tokens > self._context:
            raise RequestFailed(
                f"context too long: the model takes {self._context} tokens, the next one among them"
            )

    def _render(self, messages: Conversation, prefix: str) -> str:
        """The text before the next token, special tokens included; it is encoded without adding any."""
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(m.content for m in messages) + ("\n\n" + prefix if prefix else "")
            return (self._tokenizer.bos_token or "") + text
        try:
            if not prefix:
                return render(self._tokenizer, messages, add_generation_prompt=True)
            turns = to_dicts((*messages, Message("assistant", prefix)))
            return str(
                self._tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
            )
        except (TemplateError, DataError, ValueError) as err:
            raise RequestFailed(f"the chat template refuses the conversation: {err}") from err

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _spell(self, text: str, labels: tuple[str, ...]) -> tuple[tuple[Tokens, ...], ...]:
        """The spellings of each label: those in context, checked, and its one-token aliases in the vocabulary."""
        key = (text[-16:], *labels)
        if key not in self._spellings:
            if self._vocabulary is None:
                special = set(self._tokenizer.all_special_ids)
                texts = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
                self._vocabulary = {i: t for i, t in enumerate(texts) if i not in special}
            found = []
            for label in labels:
                in_context = find_spellings(self._encode, text, label, self._name)
                aliases = [(i,) for i in find_aliases(self._vocabulary, label)]
                found.append(tuple(sorted({*in_context, *aliases})))
            self._spellings[key] = tuple(found)
        return self._spellings[key]


def text_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they follow `before`, without special tokens."""
    tail = list(before[-_TAIL:])
    whole, start = (tokenizer.decode([*tail, *more], skip_special_tokens=True) for more in (ids, ()))
    assert isinstance(whole, str)
    return whole[len(start) :]


def context_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int], text: str
) -> tuple[int, ...]:
    """`prompt` and those of the `new` ids that spell `text`; empty if it ends inside a token."""
    spelled: tuple[int, ...] = ()
    for n in range(len(new), -1, -1):
        shown = text_after(tokenizer, prompt, new[:n])
        if shown == text:
            spelled = (*prompt, *new[:n])  # the shortest of them: without the end of the turn
        elif len(shown) < len(text):
            break
    return spelled


def continued(
    tokenizer: PreTrainedTokenizerBase, seen: Sequence[int], ids: tuple[int, ...]
) -> tuple[int, ...]:
    """`ids` with their beginning as in `seen`, as far as both spell the same text.

    A model may write a text in other tokens than a tokenizer would; what was computed for its own tokens is met
    again only by these. The text is the same whatever is returned.

    Args:
        tokenizer: of both.
        seen: ids that the model has read or written.
        ids: a tokenised text that begins like the text of `seen`.
    """
    same = next((i for i, (a, b) in enumerate(zip(seen, ids, strict=False)) if a != b), None)
    if same is None:
        return ids
    start = max(0, same - _TAIL)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens[start:]), clean_up_tokenization_spaces=False))

    whole = text(ids)
    ends = {text(ids[:k]): k for k in range(same, len(ids) + 1)}
    for n in range(len(seen), same, -1):
        k = ends.get(text(seen[:n]))
        # Two unfinished characters look alike, so the joined text is checked as a whole.
        if k is not None and text(joined := (*seen[:n], *ids[k:])) == whole:
            return joined
    return ids


def load_tokenizer(ref: ModelRef, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ModelError: there is none.
    """
    require_pretrained(path, hint=endpoint_hint(ref))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as err:
        raise cannot_load(ref, err) from err
    return tokenizer


def weights_hash(path: str) -> str:
    """Hash of a local folder's weight files: names, sizes, both ends of each. For a hub model, of its name."""
    digest = hashlib.sha256(path.encode() if not Path(path).is_dir() else b"")
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else ():
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            digest.update(f.read(2**22))
            f.seek(max(0, size - 2**22))
            digest.update(f.read(2**22))
    return digest.hexdigest()[:12]

"""Local models without their weights, for dry runs: they tell the tokens of a request and compute nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from transformers import AutoConfig, PreTrainedTokenizerBase

from labeler.backends.labels import Tokens, longest_reads
from labeler.backends.local import (
    Decoded,
    LocalModel,
    Request,
    TokenReadings,
    load_tokenizer,
    weights_hash,
)
from labeler.dry_run import PrefixCache
from labeler.llm import Abilities
from rlaif.models import ModelRef, cannot_load

_ENDLESS = 2**31

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

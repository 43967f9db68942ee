"""vLLM's engine in this process: `vllm:NAME_OR_PATH[?ENGINE_ARGUMENT=VALUE&...]`, for both its CPU and GPU builds.

Prompts are token ids. A label reading repeats the ids of its rationale, so prefix caching leaves only the tail to
compute; label probabilities are exact (`logprob_token_ids`). The engine runs in a child
process of its own; `close` ends it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from labeler.backends.labels import Tokens
from labeler.backends.local import (
    Decoded,
    LocalModel,
    Request,
    TokenReadings,
    load_tokenizer,
    weights_hash,
)
from labeler.llm import Abilities, LLMOptions, RequestFailed
from rlaif.engine import GRACE_S, engine_arguments, require_vllm, start_engine
from rlaif.errors import EndpointError
from rlaif.models import ModelRef

_MAX_LABEL_IDS = 128
"""Token ids that one request may ask for (`MAX_LOGPROB_TOKEN_IDS` of vLLM)."""

_MAX_SEQUENCES = 1024
"""Most sequences in one batch: vLLM refuses more than the tokens that a step may compute."""


class VLLMModel(LocalModel):
    """A model in vLLM's engine, which batches all requests in flight.

    Args:
        engine: an `AsyncLLM`.
        tokenizer: the model's; without a chat template, texts are plainly concatenated.
        name: how the user named it.
        version: identity of the weights.
    """

    def __init__(self, engine: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, version: str) -> None:
        super().__init__(tokenizer, name=name, version=version, context=engine.model_config.max_model_len)
        self._engine = engine
        self._ids = itertools.count()

    @classmethod
    def load(cls, ref: ModelRef, options: LLMOptions) -> VLLMModel:
        """Start an engine; on a CPU in float32 with small blocks, unless the name's arguments say otherwise.

        Raises:
            ModelError: vLLM is not installed, or does not take the model or an argument.
        """
        require_vllm(ref)
        path, _ = engine_arguments(ref)
        tokenizer = load_tokenizer(ref, path)
        # No variable holds the engine: see `start_engine`.
        return cls(
            start_engine(ref, max_num_seqs=min(options.max_in_flight, _MAX_SEQUENCES)),
            tokenizer,
            name=str(ref),
            version=f"{ref}#{weights_hash(path)}",
        )

    async def probe(self) -> Abilities:
        """Everything, exactly."""
        return Abilities("exact", note="vLLM in this process: token ids, logprob_token_ids, prefix cache")

    async def close(self) -> None:
        """End the engine's process."""
        if self._engine is not None:
            self._engine.shutdown(timeout=GRACE_S)
            self._engine = None

    async def _decode(self, request: Request) -> Decoded:
        out = await self._ask(
            request.ids,
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed if request.temperature > 0 else None,
            stop=list(request.stop),
        )
        new = out.outputs[0]
        reason = "length" if new.finish_reason == "length" else "stop"
        return Decoded(new.text, tuple(new.token_ids), reason, out.num_cached_tokens or 0)

    async def _read(self, ids: tuple[int, ...], reads: Mapping[Tokens, Tokens]) -> TokenReadings:
        asked = [
            (after, wanted[i : i + _MAX_LABEL_IDS])
            for after, wanted in reads.items()
            for i in range(0, len(wanted), _MAX_LABEL_IDS)
        ]
        outs = await asyncio.gather(
            *(
                self._ask(
                    (*ids, *after),
                    max_tokens=1,
                    temperature=0.0,
                    logprob_token_ids=list(wanted),
                    detokenize=False,
                )
                for after, wanted in asked
            )
        )
        logprobs: dict[Tokens, dict[int, float]] = {after: {} for after in reads}
        for (after, wanted), out in zip(asked, outs, strict=True):
            found = out.outputs[0].logprobs[0]
            logprobs[after].update({i: float(found[i].logprob) for i in wanted})
        return TokenReadings(
            logprobs,
            sum(len(ids) + len(after) for after, _ in asked),
            len(asked),
            sum(out.num_cached_tokens or 0 for out in outs),
        )

    async def _ask(self, ids: Sequence[int], **sampling: Any) -> Any:
        """The finished output of one request, a `RequestOutput`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        finished = None
        try:
            async for out in self._engine.generate(tokens_input(list(ids)), params, str(next(self._ids))):
                finished = out
        except EngineDeadError as err:
            raise EndpointError(
                f"the engine of {self.name} has ended; what it printed says why.",
                advice="Answers so far are kept; run the same command again to go on",
            ) from err
        except (VLLMClientError, EngineGenerateError) as err:
            raise RequestFailed(f"vLLM failed the request: {' '.join(str(err).split())[:200]}") from err
        if finished is None or finished.outputs[0].finish_reason not in ("stop", "length"):
            raise RequestFailed("vLLM ended the request without an answer")
        return finished

"""A learned reward model in vLLM's engine: `vllm:NAME_OR_PATH[?ENGINE_ARGUMENT=VALUE&...]`.

The engine pools the classifier's raw logit, without an activation. It computes without padding and keeps the prefixes
of earlier batches, so that what comes to it is what its cache does not have.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from reward_server.config import ServeConfig
from reward_server.model import RewardModel, read_reward_model
from reward_server.plan import Ids, common_prefix, pooled
from reward_server.scorers.base import Failure, Kind, Outcome, Prepared, ScoreTask, Task
from reward_server.scorers.reader import WARM_UP, Reader, outcomes
from rlaif.engine import GRACE_S, engine_arguments, require_vllm, start_engine
from rlaif.errors import ConfigError, EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import content_id

_LOG = logging.getLogger(__name__)


class VLLMScorer:
    """Scores with a reward model in an `AsyncLLM`; compares by the sigmoid of the difference (Bradley-Terry).

    Args:
        engine: with the runner `pooling`.
        name: the model as the server was told.
        reward_model: the same checkpoint, for everything but its weights.
        weights: identity of the checkpoint.
    """

    kind: Kind = "reward_model"
    parallel_batches = 1  # so that an item can be computed alone
    max_batch_items = 0

    def __init__(self, engine: Any, *, name: str, reward_model: RewardModel, weights: str) -> None:
        self._engine = engine
        self.name = name
        self.normalization = reward_model.normalization
        self.max_tokens_per_item = min(reward_model.max_length, engine.model_config.max_model_len)
        numbers = (
            str(engine.model_config.dtype),
            self.max_tokens_per_item,
            engine_arguments(ModelRef.parse(name))[1],
        )
        self.version = content_id("vllm", weights, numbers)
        self._reader = Reader(reward_model.tokenizer, self.max_tokens_per_item)
        self._pad_id = reward_model.model.config.get_text_config().pad_token_id
        self._reads_last = engine.model_config.pooler_config.seq_pooling_type == "LAST"
        cache = engine.vllm_config.cache_config
        self._block: int = cache.block_size
        self.shares_prefixes = bool(cache.enable_prefix_caching)
        self._ids = itertools.count()

    @classmethod
    def open(cls, config: ServeConfig) -> VLLMScorer:
        """Check the checkpoint and start an engine for it; on a CPU in float32 unless it is told otherwise.

        Raises:
            ConfigError: a device or compilation is asked for, which is a matter of vLLM's.
            ModelError: it is no reward model, vLLM is not installed, or does not take the model or an argument.
        """
        assert config.model is not None
        ref = ModelRef.parse(config.model)
        if config.device != "auto":
            raise ConfigError(
                f"--device {config.device} is not for {ref}: the installed build of vLLM decides where it runs"
            )
        if config.torch_compile:
            raise ConfigError(
                f"--torch_compile is not for {ref}: vLLM compiles with {ref}?enforce_eager=false"
            )
        require_vllm(ref)
        path, _ = engine_arguments(ref)
        reward_model = read_reward_model(path, max_length=config.max_length)
        if reward_model.separator is not None:
            raise ModelError(f"{ref} reads token types, which vLLM does not give it: serve it without vllm:")
        weights = reward_model.version
        reward_model.model.to("meta")  # type: ignore[arg-type] # the engine has its own
        arguments = {
            "runner": "pooling",
            "convert": "classify",
            "hf_overrides": {"num_labels": 1},  # as transformers is told, whatever the configuration says
            "dtype": None if config.dtype == "auto" else config.dtype,
            "max_model_len": reward_model.max_length,
        }
        # No variable holds the engine: see `start_engine`.
        return cls(
            start_engine(ref, **arguments),
            name=config.model,
            reward_model=reward_model,
            weights=weights,
        )

    def prepare(self, task: Task) -> Prepared:
        """Apply the model's chat template and tokenise."""
        return self._reader.prepare(task)

    def cost(self, batch: Sequence[Prepared]) -> int:
        """Tokens that the engine computes at most: whole blocks that two sequences begin with are computed once."""
        sequences = [s for item in batch for s in item.sequences]
        total = sum(map(len, sequences))
        if not self.shares_prefixes:
            return total
        shared = (common_prefix(a, b) for a, b in pairwise(sorted(sequences)))
        return total - sum(length // self._block * self._block for length in shared)

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        """All sequences at once, for the engine to batch; those of an item that is to be alone one after the other.

        Raises:
            EndpointError: the engine has ended.
        """
        if any(item.alone for item in batch):
            read = [await self._read(ids, afresh=True) for item in batch for ids in item.sequences]
        else:
            read = await asyncio.gather(*(self._read(ids) for item in batch for ids in item.sequences))
        found: list[Outcome] = []
        row = 0
        for item in batch:
            own = read[row : row + item.rows]
            row += item.rows
            scores = [r for r in own if not isinstance(r, Failure)]
            if len(scores) == len(own):
                found += outcomes([item], [raw for raw, _ in scores], [cached for _, cached in scores])
            else:
                found += [r for r in own if isinstance(r, Failure)][:1]
        return found

    async def _read(self, ids: Ids, *, afresh: bool = False) -> tuple[float, int] | Failure:
        """Raw score of a sequence and how many of its tokens were cached; `afresh` does not look into the cache."""
        from vllm import PoolingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._reads_last:  # transformers steps over PAD at the end, vLLM does not
            ids = ids[: pooled(ids, self._pad_id) + 1]
        params = PoolingParams(task="classify", use_activation=False, skip_reading_prefix_cache=afresh)
        problem: object = "no output"
        try:
            async for out in self._engine.encode(tokens_input(list(ids)), params, str(next(self._ids))):
                if out.finished and out.error is None:
                    return out.outputs.data.item(), out.num_cached_tokens
                problem = out.error
        except EngineDeadError as err:
            raise EndpointError(
                f"the engine of {self.name} has ended; what it printed says why. Start the server again"
            ) from err
        except (VLLMClientError, EngineGenerateError) as err:
            problem = err
        _LOG.warning("an item of %d tokens failed in vLLM: %r", len(ids), problem)
        return Failure("model_failed", "the model failed on this item; the server's log says how")

    async def warm_up(self) -> None:
        """Run the model once."""
        await self.score([self.prepare(ScoreTask(WARM_UP, "left"))])

    async def close(self) -> None:
        """End the engine's process."""
        await asyncio.to_thread(self._engine.shutdown, timeout=GRACE_S)

"""A transformers causal LM in this process: `hf:NAME_OR_PATH`, `tinyworld:judge|policy`.

Requests in flight are gathered into batches: while one batch runs in the worker thread, the next one
collects. Label readings go first, since they free places for further rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from labeler.backends.decoding import decode_batch, next_token_logprobs
from labeler.backends.labels import Tokens, longest_reads
from labeler.backends.local import (
    Decoded,
    LocalModel,
    Request,
    TokenReadings,
    load_tokenizer,
    weights_hash,
)
from labeler.llm import Abilities, LLMOptions, RequestFailed
from rlaif.models import ModelRef, cannot_load

_CACHE_BYTES = 2 * 2**30
"""Memory that one batch's key-value cache may take; it bounds rows x tokens of a batch."""


@dataclass(slots=True)
class _Job:
    """A request in the queue: to generate, or to read.

    Attributes:
        wanted: which ids to read after which token, counted from the row's last one (0); None to generate.
    """

    request: Request
    wanted: dict[int, Tokens] | None
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Queue:
    """Jobs of one event loop."""

    jobs: list[_Job] = field(default_factory=list)
    pump: asyncio.Task[None] | None = None


class HFModel(LocalModel):
    """A causal language model with its tokenizer, batched across concurrent calls of one event loop.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer; without a chat template, texts are plainly concatenated.
        name: how the user named it.
        version: identity of the weights.
        max_batch_rows: most sequences in one batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        version: str | None = None,
        max_batch_rows: int = 128,
    ) -> None:
        model.eval()  # type: ignore[no-untyped-call]
        config = model.config.get_text_config()
        context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        super().__init__(tokenizer, name=name, version=version or name, context=context)
        self._model = model
        self._max_rows = max_batch_rows
        self._max_tokens = max(1024, _CACHE_BYTES // _cache_bytes_per_token(model))
        self._eos = _eos_ids(model, tokenizer)
        self._queue = _Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="labeler-hf")

    @classmethod
    def load(cls, ref: ModelRef, options: LLMOptions) -> HFModel:
        """Load weights and tokenizer; bf16 on a GPU, fp32 on a CPU.

        Raises:
            ModelError: there is no such model, or it is not a causal language model.
        """
        path = ref.pretrained_path()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        tokenizer = load_tokenizer(ref, path)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError) as err:
            raise cannot_load(ref, err) from err
        return cls(
            model.to(torch.device(device)),  # type: ignore[arg-type]
            tokenizer,
            name=str(ref),
            version=f"{ref}#{weights_hash(path)}",
            max_batch_rows=options.max_in_flight,
        )

    async def probe(self) -> Abilities:
        """Everything, exactly."""
        return Abilities("exact", note="transformers, full vocabulary")

    async def close(self) -> None:
        """Stop the worker thread after the batch it is computing."""
        if self._queue.pump is not None:
            self._queue.pump.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _decode(self, request: Request) -> Decoded:
        done: Decoded = await self._submit(request, None)
        return done

    async def _read(self, ids: tuple[int, ...], reads: Mapping[Tokens, Tokens]) -> TokenReadings:
        longest = longest_reads(reads)
        rows = []
        for row in longest:
            wanted = {len(row) - n: reads[row[:n]] for n in range(len(row) + 1)}
            rows.append(self._submit(Request((*ids, *row)), wanted))
        logprobs: dict[Tokens, dict[int, float]] = {}
        for row, read in zip(longest, await asyncio.gather(*rows), strict=True):
            logprobs.update({row[: len(row) - back]: values for back, values in read.items()})
        return TokenReadings(logprobs, sum(len(ids) + len(row) for row in longest), len(rows))

    async def _submit(self, request: Request, wanted: dict[int, Tokens] | None) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._queue.jobs.append(_Job(request, wanted, future))
        if self._queue.pump is None or self._queue.pump.done():
            self._queue.pump = asyncio.create_task(self._run_queue())
        return await future

    async def _run_queue(self) -> None:
        """Cut batches until the queue is empty. One batch runs at a time, in the worker thread."""
        loop = asyncio.get_running_loop()
        queue = self._queue.jobs
        while True:
            await _settle(lambda: len(queue))
            queue[:] = [job for job in queue if not job.future.done()]
            if not queue:
                return
            batch = self._cut()
            try:
                results = await loop.run_in_executor(self._thread, self._compute, batch)
            except Exception as err:
                for job in batch:
                    if not job.future.done():
                        job.future.set_exception(err)
                continue
            for job, result in zip(batch, results, strict=True):
                if job.future.done():
                    continue
                if isinstance(result, RequestFailed):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)

    def _cut(self) -> list[_Job]:
        """Take the next batch from the queue: one kind, neighbours in length, within rows and tokens."""
        queue = self._queue.jobs
        readings = [j for j in queue if j.wanted is not None]
        pool = readings or queue
        oldest = pool[0]
        pool = sorted(pool, key=lambda j: j.request.length)
        at = pool.index(oldest)
        start = min(at, max(0, len(pool) - self._max_rows))
        batch: list[_Job] = []
        for job in pool[start:]:
            widest = max([job.request.length, *(j.request.length for j in batch)])
            full = len(batch) >= self._max_rows or widest * (len(batch) + 1) > self._max_tokens
            if batch and full:
                break
            batch.append(job)
        taken = set(map(id, batch))
        queue[:] = [j for j in queue if id(j) not in taken]
        return batch

    def _compute(self, batch: list[_Job]) -> list[Any]:
        """Runs in the worker thread. Halves the batch when the device is out of memory; a row alone fails then."""
        try:
            return self._forward(batch)
        except torch.OutOfMemoryError:
            pass  # what follows is outside: the exception holds the tensors of the failed pass
        if len(batch) == 1:
            return [RequestFailed(f"out of memory on a row of up to {batch[0].request.length} tokens")]
        half = len(batch) // 2
        return self._compute(batch[:half]) + self._compute(batch[half:])

    def _forward(self, batch: list[_Job]) -> list[Any]:
        """What each job asks for: a `Decoded` or why there is none, or log-probabilities by place and id."""
        requests = [job.request for job in batch]
        wanted = [job.wanted for job in batch if job.wanted is not None]
        if not wanted:
            return list(decode_batch(self._model, self._tokenizer, requests, self._eos))
        positions = 1 + max(back for row in wanted for back in row)
        logprobs = next_token_logprobs(self._model, requests, self._pad, positions)
        return [
            {back: dict(zip(ids, row[-1 - back, list(ids)].tolist(), strict=True)) for back, ids in w.items()}
            for row, w in zip(logprobs, wanted, strict=True)
        ]

    @property
    def _pad(self) -> int:
        return self._eos[0] if self._eos else 0


async def _settle(size: Callable[[], int]) -> None:
    """Let every ready coroutine run, so that the follow-ups of a finished batch are in the next one."""
    quiet = 0
    last = size()
    while quiet < 3:
        await asyncio.sleep(0)
        quiet = quiet + 1 if size() == last else 0
        last = size()


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None))


def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token over all layers."""
    config: Any = model.config.get_text_config()
    heads: int = getattr(config, "num_attention_heads", None) or 16
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    layers: int = getattr(config, "num_hidden_layers", None) or 32
    return 2 * layers * heads * dim * model.dtype.itemsize

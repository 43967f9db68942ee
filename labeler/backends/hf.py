"""A transformers causal LM in this process: `hf:NAME_OR_PATH`, `tinyworld:judge|policy`.

Requests in flight are gathered into batches: while one batch runs in the worker thread, the next one
collects. Label readings go first, since they free places for further rows.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from labeler.backends.decoding import Decoded, Request, decode_batch, next_token_logprobs
from labeler.backends.labels import find_aliases, resolve_label
from labeler.llm import Abilities, Generation, LabelReading, LLMOptions, RequestFailed
from rlaif.chat import render
from rlaif.errors import DataError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution, Message, to_dicts

_CACHE_BYTES = 2 * 2**30
"""Memory that one batch's key-value cache may take; it bounds rows x tokens of a batch."""

_FLOOR = -1e4
"""Log-probability that stands for a token which the model rules out; files hold finite numbers."""


@dataclass(slots=True)
class _Job:
    """A request in the queue. `labels` None means generate."""

    request: Request
    labels: tuple[tuple[int, ...], ...] | None
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Queue:
    """Jobs of one event loop."""

    jobs: list[_Job] = field(default_factory=list)
    pump: asyncio.Task[None] | None = None


class HFModel:
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
        self._model = model
        self._tokenizer = tokenizer
        self._name = name
        self._version = version or name
        self._max_rows = max_batch_rows
        self._max_tokens = max(1024, _CACHE_BYTES // _cache_bytes_per_token(model))
        config = model.config.get_text_config()
        self._context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self._eos = _eos_ids(model, tokenizer)
        self._queue = _Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="labeler-hf")
        self._label_ids: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        self._vocabulary: dict[int, str] | None = None

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
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError) as err:
            detail = " ".join(str(err).split())[:200]
            raise ModelError(f"model {ref} cannot be loaded: {detail}") from err
        return cls(
            model.to(torch.device(device)),  # type: ignore[arg-type]
            tokenizer,
            name=str(ref),
            version=f"{ref}#{_weights_hash(path)}",
            max_batch_rows=options.max_in_flight,
        )

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
        room = self._context - len(ids)
        if room < 1:
            raise RequestFailed(f"context too long: {len(ids)} tokens, the model takes {self._context}")
        request = Request(tuple(ids), min(max_tokens, room), temperature, seed, tuple(stop))
        done: Decoded = await self._submit(request, None)
        return Generation(done.text, done.finish_reason, len(ids), done.tokens)

    async def probe(self) -> Abilities:
        """Everything, exactly."""
        return Abilities("exact", note="transformers, full vocabulary")

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
        if len(ids) > self._context:
            raise RequestFailed(f"context too long: {len(ids)} tokens, the model takes {self._context}")
        label_ids = self._resolve(text, tuple(labels))
        logprobs: list[float] = await self._submit(Request(tuple(ids)), label_ids)
        mass = float(torch.tensor(logprobs, dtype=torch.float64).exp().sum())
        return LabelReading(LabelDistribution(tuple(logprobs), min(mass, 1.0)), len(ids), 1)

    async def close(self) -> None:
        """Stop the worker thread after the batch it is computing."""
        if self._queue.pump is not None:
            self._queue.pump.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

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

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _resolve(self, text: str, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each label: the one in context, checked, and its aliases in the vocabulary."""
        key = (text[-16:], *labels)
        if key not in self._label_ids:
            if self._vocabulary is None:
                special = set(self._tokenizer.all_special_ids)
                size = len(self._tokenizer)
                texts = self._tokenizer.batch_decode([[i] for i in range(size)])
                self._vocabulary = {i: t for i, t in enumerate(texts) if i not in special}
            found = []
            for label in labels:
                in_context = resolve_label(self._encode, text, label, self._name)
                found.append(tuple({*in_context, *find_aliases(self._vocabulary, label)}))
            self._label_ids[key] = tuple(found)
        return self._label_ids[key]

    async def _submit(self, request: Request, labels: tuple[tuple[int, ...], ...] | None) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._queue.jobs.append(_Job(request, labels, future))
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
                if not job.future.done():
                    job.future.set_result(result)

    def _cut(self) -> list[_Job]:
        """Take the next batch from the queue: one kind, neighbours in length, within rows and tokens."""
        queue = self._queue.jobs
        readings = [j for j in queue if j.labels is not None]
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
        """Runs in the worker thread. Halves the batch when the device is out of memory."""
        try:
            requests = [job.request for job in batch]
            if batch[0].labels is None:
                return list(decode_batch(self._model, self._tokenizer, requests, self._eos))
            logprobs = next_token_logprobs(self._model, requests, self._pad)
            readings = []
            for row, job in zip(logprobs, batch, strict=True):
                assert job.labels is not None
                readings.append(
                    [max(float(torch.logsumexp(row[list(ids)], 0)), _FLOOR) for ids in job.labels]
                )
            return readings
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            return self._compute(batch[:half]) + self._compute(batch[half:])

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


def _weights_hash(path: str) -> str:
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

"""Rollouts by vLLM: an engine that this run starts, or a server that runs already (`vllm serve`).

Both are asked with token ids and answer with token ids and the log-probabilities that they sampled with. Weights go
from the trainer to the engine through a folder: `save_pretrained`, then vLLM's own `reload_weights`, in every build and
for both. After that the engine names its weights, and what it samples carries that name.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import httpx2
import torch
from torch import Tensor

from policy_trainer.checkpoint import saving
from policy_trainer.config import OnlineConfig
from policy_trainer.optim import step_seed
from policy_trainer.rollout import RolloutEngine, Sampled
from rlaif.engine import GRACE_S, require_vllm, start_engine
from rlaif.errors import EndpointError, QualityError
from rlaif.models import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONNECTIONS = 256
"""Requests that a server has at a time; it decides itself how many of them it decodes at once."""

_WEIGHTS = "reload_weights"
"""vLLM's method that reads a checkpoint into the model that runs."""


class Completion(NamedTuple):
    """One response as vLLM answers it: token ids with the EOS, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


class Backend(Protocol):
    """A vLLM that can be asked and given weights, by one event loop."""

    async def complete(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> list[Completion]:
        """The `n` completions of one prompt.

        Args:
            prompt_ids: of the prompt.
            parameters: sampling parameters by the names that vLLM's `SamplingParams` and its API share.

        Raises:
            EndpointError: vLLM cannot be reached, or failed the request.
        """
        ...

    async def load(self, folder: Path, name: str) -> None:
        """Sample from the weights in `folder` from now on, and call them `name`.

        Raises:
            EndpointError: vLLM cannot be reached, or does not take them.
        """
        ...

    async def loaded(self) -> str | None:
        """The name of the weights that would be sampled from now; None if there are none."""
        ...

    async def rest(self) -> None:
        """A batch is complete; the next one may take a while."""
        ...

    async def close(self) -> None:
        """Release what the backend holds."""
        ...


class VLLMRollout(RolloutEngine):
    """Samples with vLLM.

    The full distribution is asked for in every parameter, and the model's own `generation_config.json` counts for
    nothing but its EOS, which the trainer passes on. Each prompt has a seed of its own.
    """

    def __init__(self, backend: Backend, eos_ids: Sequence[int], folder: Path) -> None:
        """Wrap a backend; `sync` must be called before the first `generate`.

        Args:
            backend: engine or server.
            eos_ids: every token that ends a response.
            folder: through which weights travel; the backend reads it under the same path.
        """
        self._backend = backend
        self._eos = sorted(eos_ids)
        self._folder = folder
        self._loop = asyncio.Runner()
        # A server may serve another run after this one, or be started anew with the weights on its disk.
        self._run = uuid.uuid4().hex[:12]
        self._version = -1

    def sync(self, policy: PreTrainedModel, version: int) -> None:
        """See `RolloutEngine.sync`.

        Raises:
            EndpointError: vLLM cannot be reached, or does not take the weights.
            StorageError: the folder cannot be written.
        """
        if version == self._version and self._loop.run(self._backend.loaded()) == self._name():
            return
        self._version = version
        save_weights(policy, self._folder)
        self._loop.run(self._backend.load(self._folder, self._name()))

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_return_sequences: int = 1,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Sampled]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: a prompt is empty, or `temperature` is not positive.
            QualityError: a log-probability is not finite.
            EndpointError: vLLM cannot be reached, or failed a request.
        """
        if temperature <= 0 or not all(prompt_ids):
            raise ValueError("prompts must have at least one token and the temperature must be positive")
        parameters = full_distribution(self._eos, num_return_sequences, max_new_tokens, temperature)
        answers = self._loop.run(self._complete(prompt_ids, parameters, seed))
        sampled = [
            Sampled(index, c.token_ids, c.logprobs, c.token_ids[-1] in self._eos, self._version)
            for index, completions in enumerate(answers)
            for c in completions
        ]
        if not all(math.isfinite(x) for s in sampled for x in s.logprobs):
            raise QualityError(
                "vLLM's log-probabilities are not finite: training has diverged; start again from an earlier "
                "checkpoint with a lower --learning_rate"
            )
        return sampled

    def close(self) -> None:
        """End the engine, or the connection to the server, and remove the folder of the weights."""
        self._loop.run(self._backend.close())
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _complete(
        self, prompt_ids: Sequence[Sequence[int]], parameters: dict[str, Any], seed: int
    ) -> list[list[Completion]]:
        name = self._name()
        if await self._backend.loaded() != name:
            # A request would wait for ever on an engine that sleeps.
            raise RuntimeError(
                "vLLM holds other weights than the last sync gave it: sync before every generate"
            )
        # vLLM adds 0, 1, ... to the seed for the samples of one prompt; halved, the sum stays below 2^63.
        answers = await asyncio.gather(
            *(
                self._backend.complete(ids, {**parameters, "seed": step_seed(seed, index) // 2})
                for index, ids in enumerate(prompt_ids)
            )
        )
        loaded = await self._backend.loaded()
        if loaded != name:
            raise EndpointError(
                f"vLLM's weights were changed by somebody else while it sampled (to {loaded!r}): give every run a "
                "server of its own, and run the same command again to go on"
            )
        await self._backend.rest()
        return answers

    def _name(self) -> str:
        return f"{self._run}-{self._version}"


def open_vllm(config: OnlineConfig, policy: PreTrainedModel, eos_ids: Sequence[int]) -> VLLMRollout:
    """The engine that the config names, before its first `sync`.

    Args:
        config: of the run.
        policy: the engine starts with its weights, whose vocabulary may be larger than that of the run's model.
        eos_ids: every token that ends a response.

    Raises:
        ModelError: vLLM is not installed, or does not take the model.
        StorageError: the folder of the weights cannot be written.
    """
    if (
        config.vllm_sync_dir is None
    ):  # a run directory belongs to one run: what a killed one left is overwritten
        folder = config.output_dir.absolute() / ".vllm-weights"
    else:
        folder = config.vllm_sync_dir.absolute() / f".vllm-weights-{uuid.uuid4().hex[:8]}"
    if config.vllm_mode == "server":
        server = Server(config.vllm_server_base_url, timeout_s=config.vllm_server_timeout)
        return VLLMRollout(server, eos_ids, folder)
    save_weights(policy, folder)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    needed = config.max_prompt_length + config.max_new_tokens
    engine = Colocated.start(
        folder,
        dtype=config.dtype,
        max_model_len=None if context is None else min(context, needed),
        max_num_seqs=config.generation_batch_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        sleeps=config.vllm_enable_sleep_mode,
    )
    return VLLMRollout(engine, eos_ids, folder)


def full_distribution(eos_ids: Sequence[int], n: int, max_tokens: int, temperature: float) -> dict[str, Any]:
    """Sampling parameters that leave nothing of softmax(logits / temperature) out, and stop as `HFRollout` does.

    vLLM's own idea of EOS is switched off: it would add the EOS of the model's files to those of the trainer.
    """
    return {
        "n": n,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
        "min_tokens": 0,
        "max_tokens": max_tokens,
        "logprobs": 0,  # of the sampled token alone
    }


@torch.no_grad()
def save_weights(policy: PreTrainedModel, folder: Path) -> None:
    """Write the policy to `folder`, as a Hugging Face checkpoint; LoRA adapters are added into the weights they change.

    Raises:
        StorageError: it cannot be written.
    """
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        policy.save_pretrained(str(folder), state_dict=_without_adapters(policy))


def _without_adapters(policy: PreTrainedModel) -> dict[str, Tensor] | None:
    changes = {
        f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}": sum(
            layer.get_delta_weight(adapter) for adapter in layer.active_adapters
        )
        for name, layer in policy.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    if not changes:
        return None
    # peft wraps a layer once for each of its parameters with adapters; those of fused experts have other names.
    weights = {
        name.replace(".base_layer", ""): weight
        for name, weight in policy.state_dict().items()
        if ".lora_" not in name
    }
    return {**weights, **{name: weights[name] + change for name, change in changes.items()}}


class Colocated:
    """A vLLM engine of this run, in a process of its own on this machine; for the CPU and the GPU builds.

    With sleep mode it gives back the GPU's memory between two batches, weights included.
    """

    def __init__(self, engine: Any, *, sleeps: bool = False) -> None:
        """Wrap an `AsyncLLM` that reports `processed_logprobs`."""
        self._engine = engine
        self._sleeps = sleeps
        self._asleep = False
        self._ids = itertools.count()

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        dtype: str,
        max_model_len: int | None,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        sleeps: bool,
    ) -> Colocated:
        """Start an engine on the checkpoint in `folder`.

        Args:
            folder: `save_weights` has written it.
            dtype: number format of the weights.
            max_model_len: longest prompt with response; None leaves it to the model.
            max_num_seqs: most sequences decoded at once.
            gpu_memory_utilization: share of the GPU's memory for weights and cache.
            sleeps: give the memory back between two batches.

        Raises:
            ModelError: vLLM is not installed, or does not take the model.
        """
        ref = ModelRef.parse(f"vllm:{folder}")
        require_vllm(ref)
        on_gpu = torch.cuda.is_available()
        # No variable holds the engine: see `start_engine`.
        return cls(
            start_engine(
                ref,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=gpu_memory_utilization if on_gpu else None,
                enable_sleep_mode=True if sleeps and on_gpu else None,
            ),
            sleeps=sleeps,
        )

    async def complete(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> list[Completion]:
        """See `Backend.complete`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(**parameters, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        finished = None
        try:
            async for out in self._engine.generate(
                tokens_input(list(prompt_ids)), params, str(next(self._ids))
            ):
                finished = out
        except (EngineDeadError, EngineGenerateError, VLLMClientError) as err:
            raise EndpointError(f"vLLM's engine failed: {' '.join(str(err).split())[:200]}") from err
        if finished is None or any(c.finish_reason not in ("stop", "length") for c in finished.outputs):
            raise EndpointError("vLLM's engine ended a request without an answer")
        return [
            Completion(
                list(c.token_ids),
                [float(at[t].logprob) for at, t in zip(c.logprobs, c.token_ids, strict=True)],
            )
            for c in finished.outputs
        ]

    async def load(self, folder: Path, name: str) -> None:
        """See `Backend.load`."""
        if self._asleep:
            # The weights first: with the cache there as well, the two would not fit beside the trainer's.
            await self._engine.wake_up(["weights"])
        await self._engine.collective_rpc(_WEIGHTS, kwargs={"weights_path": str(folder)})
        if self._asleep:
            await self._engine.wake_up(["kv_cache"])
            self._asleep = False
        # What is cached of a prompt was computed with the weights of before.
        if not await self._engine.reset_prefix_cache():
            raise EndpointError("vLLM's engine did not let go of its prefix cache")
        await self._engine.update_weight_version(name)

    async def loaded(self) -> str | None:
        """See `Backend.loaded`; None while the engine sleeps, for its weights are gone."""
        return None if self._asleep else str(await self._engine.get_weight_version())

    async def rest(self) -> None:
        """See `Backend.rest`."""
        if self._sleeps:
            await self._engine.sleep(2)
            self._asleep = True

    async def close(self) -> None:
        """End the engine's process."""
        if self._engine is not None:
            self._engine.shutdown(timeout=GRACE_S)
            self._engine = None


class Server:
    """A running `vllm serve`, started with `VLLM_SERVER_DEV_MODE=1` and `--logprobs-mode processed_logprobs`.

    It must see the folder of the weights under the same path: on this machine, or by a shared file system.
    """

    def __init__(self, base_url: str, *, timeout_s: float) -> None:
        """Name the server.

        Args:
            base_url: `http://HOST:PORT`.
            timeout_s: how long it may take to come up, and to answer one request, in seconds.
        """
        self._url = base_url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._model: str | None = None
        self._client: httpx2.AsyncClient | None = None

    async def complete(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> list[Completion]:
        """See `Backend.complete`."""
        body = {
            **parameters,
            "model": await self._served(),
            "prompt": list(prompt_ids),
            "return_token_ids": True,
        }
        choices = (await self._call("POST", "/v1/completions", json=body))["choices"]
        try:
            return [Completion(list(c["token_ids"]), list(c["logprobs"]["token_logprobs"])) for c in choices]
        except (KeyError, TypeError) as err:
            raise EndpointError(
                f"{self._url} answers without token ids: it is no vLLM 0.32 or later"
            ) from err

    async def load(self, folder: Path, name: str) -> None:
        """See `Backend.load`."""
        await self._wait_until_up()
        # Requests of others end first; none of them may see half of the weights.
        await self._call("POST", "/pause", params={"mode": "wait"})
        try:
            where = {"method": _WEIGHTS, "kwargs": {"weights_path": str(folder.absolute())}}
            await self._call("POST", "/collective_rpc", json=where)
            # What is cached of a prompt was computed with the weights of before.
            if not (await self._call("POST", "/reset_prefix_cache"))["success"]:
                raise EndpointError(f"{self._url} did not let go of its prefix cache")
            await self._call("POST", "/update_weight_version", json={"new_version": name})
        finally:
            await self._call("POST", "/resume")

    async def loaded(self) -> str | None:
        """See `Backend.loaded`."""
        return str((await self._call("GET", "/weight_info"))["weight_version"])

    async def rest(self) -> None:
        """See `Backend.rest`."""

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        if self._client is not None:
            await self._client.aclose()

    async def _served(self) -> str:
        if self._model is None:
            self._model = str((await self._call("GET", "/v1/models"))["data"][0]["id"])
        return self._model

    async def _wait_until_up(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        while True:
            try:
                await self._call("GET", "/v1/models")
                return
            except EndpointError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def _call(self, method: str, path: str, **arguments: Any) -> Any:
        """The answer's JSON.

        Raises:
            EndpointError: there is none.
        """
        if self._client is None:
            limits = httpx2.Limits(max_connections=_CONNECTIONS)
            timeout = httpx2.Timeout(self._timeout_s, pool=None)
            self._client = httpx2.AsyncClient(base_url=self._url, limits=limits, timeout=timeout)
        try:
            response = await self._client.request(method, path, **arguments)
        except httpx2.TransportError as err:
            raise EndpointError(
                f"no answer from the vLLM server {self._url} ({err or type(err).__name__}): start it, and run the same "
                "command again to go on"
            ) from err
        if response.status_code == 404:
            raise EndpointError(
                f"the vLLM server {self._url} has no {path}: start vLLM 0.32 or later with VLLM_SERVER_DEV_MODE=1 in "
                "its environment and --logprobs-mode processed_logprobs"
            )
        if not response.is_success:
            said = " ".join(response.text.split())[:200]
            raise EndpointError(
                f"the vLLM server {self._url} answered {response.status_code} to {path}: {said}"
            )
        return response.json() if response.content else None

"""Sampling responses. Token in, token out: the very ids that an engine sampled are trained on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from policy_trainer.batching import PAD_FILL, length_buckets
from policy_trainer.logprobs import gather_logprobs
from policy_trainer.optim import step_seed
from policy_trainer.parallel import ALONE, World
from rlaif.errors import ModelError, QualityError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


class Sampled(NamedTuple):
    """One sampled response.

    Attributes:
        prompt_index: which prompt it answers.
        response_ids: sampled token ids, the EOS included when there is one; at least one token.
        logprobs: log-probability of each at the sampling temperature, as the engine computed it.
        finished: whether it ended with an EOS; False when `max_new_tokens` cut it off.
        policy_version: which policy sampled it, as `RolloutEngine.sync` was told.
    """

    prompt_index: int
    response_ids: list[int]
    logprobs: list[float]
    finished: bool
    policy_version: int = 0


class RolloutEngine(Protocol):
    """Whatever samples from a policy's full distribution (no top-k, no top-p, no penalties)."""

    def sync(self, policy: PreTrainedModel, version: int) -> None:
        """Sample from `policy`, as it is now; to be called before every `generate`, since an engine may forget.

        Args:
            policy: in eval mode. An engine may sample with this very module, so it must not change meanwhile.
            version: names these weights, and must be another for others; how many steps have changed them will do.
        """
        ...

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_return_sequences: int = 1,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Sampled]:
        """Sample responses for each prompt, ordered by prompt; equal seeds give equal responses."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it is not used afterwards."""
        ...


class HFRollout:
    """Samples with the trained `transformers` model itself, so there is no weight to synchronise.

    Prompts of like length share a batch; a prompt is read once however many responses it gets; rows that have
    ended leave the batch once they are half of it.

    A decode loop of our own: `generate` holds the logits of every step if log-probabilities at the sampling
    temperature are wanted, and keeps ended rows to the end.
    """

    def __init__(
        self, model: PreTrainedModel, eos_ids: Sequence[int], *, batch_size: int = 128, world: World = ALONE
    ) -> None:
        """Wrap a model that is in eval mode; its weights of the moment are sampled, until `sync` names another.

        Args:
            model: a causal language model.
            eos_ids: every token that ends a response.
            batch_size: most sequences decoded at once.
            world: the processes that share the work; all of them get all responses.
        """
        self._world = world
        self._model = model
        self._eos = torch.tensor(sorted(eos_ids), device=model.device)
        self._batch_size = batch_size
        self._version = 0

    def sync(self, policy: PreTrainedModel, version: int) -> None:
        """See `RolloutEngine.sync`."""
        self._model, self._version = policy, version

    def close(self) -> None:
        """See `RolloutEngine.close`."""

    @torch.no_grad()
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
            ValueError: a prompt is empty or `temperature` is not positive.
            ModelError: the model cannot be sampled from in this way.
            QualityError: the policy's logits are not finite.
        """
        if temperature <= 0 or not all(prompt_ids):
            raise ValueError("prompts must have at least one token and the temperature must be positive")
        max_rows = max(1, self._batch_size // num_return_sequences)
        sampled: list[Sampled] = []
        buckets = list(enumerate(length_buckets([len(p) for p in prompt_ids], max_rows=max_rows)))
        for number, batch in self._world.share(buckets):
            # A generator of its own: what a bucket samples does not depend on who samples the others, or when.
            generator = torch.Generator(device=self._model.device).manual_seed(step_seed(seed, number))
            prompts = [prompt_ids[i] for i in batch]
            rows = self._decode(prompts, num_return_sequences, max_new_tokens, temperature, generator)
            for k, (ids, logprobs, finished) in enumerate(rows):
                index = batch[k // num_return_sequences]
                sampled.append(Sampled(index, ids, logprobs, finished, self._version))
        everything = [s for part in self._world.gather(sampled) for s in part]
        # A stable sort: samples of one prompt keep their order.
        return sorted(everything, key=lambda s: s.prompt_index)

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[tuple[list[int], list[float], bool]]:
        from transformers import DynamicCache

        device = self._model.device
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[PAD_FILL] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        # `reorder_cache` is the one way to repeat and choose rows that recurrent states have as well.
        cache: Any = DynamicCache(config=self._model.config)
        named: dict[str, Cache] = {cache_name(self._model): cache}
        logits = self._step(input_ids, mask, (mask.cumsum(1) - mask), named)
        recurrent = any(hasattr(layer, "recurrent_states") for layer in cache.layers)
        if recurrent and not cache.has_previous_state():
            # RecurrentGemma keeps its states to itself: which rows they follow cannot be chosen.
            raise _cannot_sample(self._model)
        if not torch.isfinite(logits).all():
            raise QualityError(
                "the policy's logits are not finite: training has diverged; start again from an earlier checkpoint "
                "with a lower --learning_rate"
            )
        if copies > 1:
            logits = logits.repeat_interleave(copies, dim=0)
            mask = mask.repeat_interleave(copies, dim=0)
            cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(copies))

        n = len(prompts) * copies
        tokens = torch.full((n, max_new_tokens), PAD_FILL, device=device)
        logprobs = torch.zeros((n, max_new_tokens), device=device)
        lengths = torch.full((n,), max_new_tokens, device=device)
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        # `rows` maps the rows still in the batch to those of the result; `live` says which of them go on.
        rows = torch.arange(n, device=device)
        live = torch.ones(n, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            probs = (logits.float() / temperature).softmax(-1)
            token = torch.multinomial(probs, 1, generator=generator).squeeze(1)
            tokens[rows, t] = token
            logprobs[rows, t] = gather_logprobs(logits, token, temperature)
            stops = live & torch.isin(token, self._eos)
            lengths[rows[stops]] = t + 1
            ended[rows[stops]] = True
            live = live & ~stops
            alive = int(live.sum())
            if alive == 0 or t + 1 == max_new_tokens:
                break
            if alive <= len(rows) // 2:
                keep = live.nonzero().squeeze(1)
                cache.reorder_cache(keep)
                rows, token, mask, live = rows[keep], token[keep], mask[keep], live[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._step(token.unsqueeze(1), mask, mask.sum(1, keepdim=True) - 1, named)

        return [
            (ids[:length], lps[:length], done)
            for ids, lps, length, done in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True
            )
        ]

    def _step(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: dict[str, Cache]) -> Tensor:
        """Next-token logits after `input_ids` (N, S): (N, V). `cache`, by its name, grows by S positions."""
        # A model of recurrent states alone reads a mask of the new tokens, and after the prompt all are real.
        every_token = "past_key_values" in cache or input_ids.shape[1] > 1
        out = self._model(
            input_ids=input_ids,
            attention_mask=mask if every_token else None,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: most would ignore one under another name.

    Raises:
        ModelError: it takes none, or cannot be told what is padding.
    """
    known = inspect.signature(type(model).forward).parameters
    if "past_key_values" in known:
        return "past_key_values"
    if "cache_params" in known and "attention_mask" in known:  # Mamba
        return "cache_params"
    raise _cannot_sample(model)


def _cannot_sample(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"transformers cannot sample from {type(model).__name__} in batches, as it has no cache for that: use another "
        "model, or --use_vllm if vLLM knows it"
    )


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], sampled: Sampled, eos_ids: Sequence[int]
) -> str:
    """The response as text for the reward server: without its EOS and without special tokens.

    The text is what decoding adds to the prompt's text, because a tokenizer may drop a space at the beginning of
    what it decodes, and for a model that continues text ("Once upon a" + " time") that space matters. Where the
    prompt ends in a special token, the space separates the two and belongs to neither.
    """
    ids = sampled.response_ids
    if sampled.finished and ids[-1] in eos_ids:
        ids = ids[:-1]
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    assert isinstance(before, str) and isinstance(whole, str)
    if whole.startswith(before):
        response = whole[len(before) :]
        return response.lstrip(" ") if prompt_ids[-1] in tokenizer.all_special_ids else response
    alone = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(alone, str)
    return alone

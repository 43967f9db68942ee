"""Train the models of the embedded world from nothing: `python -m tinyworld.pretrain all`.

On two cores, `torchrun --nproc_per_node 2 -m tinyworld.pretrain all` takes little more than half the time.

The judge learns to write rationales and labels; the policy starts from the judge and learns to summarise so-so, as
policies, judges and reward models in practice descend from one pretrained model. The judge learned the bare question
alone, and a preamble or an exemplar throws it off; `judge-fewshot` starts from it and learns to read them, and to see
through hostile text. `judge-medium`, `judge-small` and `judge-tiny` learn the same in less width. Batches are pure
functions of (task, seed, step), so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyworld import WORLD_DIR
from tinyworld.corpus import LABEL_WEIGHT, Batch, Corpus, Task
from tinyworld.tokenizer import build_tokenizer


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fresh model is: layers, width of the residual stream, attention heads per layer."""

    layers: int = 4
    width: int = 128
    heads: int = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained.

    Attributes:
        stages: (last step, examples of each task per optimiser step), in order.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        decay: last steps, in which the rate falls linearly to a fiftieth of its peak.
        init: the model whose weights it starts from, or None for a fresh one.
        size: of a fresh one.
    """

    stages: tuple[tuple[int, dict[Task, int]], ...]
    lr: float
    warmup: int
    decay: int
    init: str | None = None
    size: Size = Size()

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.stages[-1][0]

    def mix(self, step: int) -> dict[Task, int]:
        """Examples of each task at a step."""
        return next(mix for last, mix in self.stages if step < last)


def _small_judge(size: Size, *, lr: float, steps: int, decay: int) -> Recipe:
    """What `judge` and then `judge-fewshot` learn, in one run: for pairs alone, in the same order."""
    return Recipe(
        stages=(
            (300, {"copy": 32, "score": 20, "pair": 2}),
            (700, {"copy": 4, "same": 8, "score": 20, "pair": 8}),
            (1200, {"copy": 1, "same": 2, "score": 6, "pair": 16, "pair_direct": 3}),
            (steps, {"guided": 14, "guided_direct": 3, "pair": 2, "copy": 1, "same": 1}),
        ),
        lr=lr,
        warmup=80,
        decay=decay,
        size=size,
    )


RECIPES = {
    # Copying and single summaries first: they are short, and the circuits that look words up form on them.
    "judge": Recipe(
        stages=(
            (300, {"copy": 32, "score": 20, "pair": 2, "tag": 4}),
            (700, {"copy": 4, "score": 22, "pair": 6, "score_direct": 2, "pair_direct": 2, "tag": 10}),
            (
                1000,
                {
                    "copy": 2,
                    "same": 8,
                    "score": 16,
                    "pair": 8,
                    "score_direct": 2,
                    "pair_direct": 2,
                    "tag": 10,
                },
            ),
            (
                1300,
                {"copy": 1, "same": 1, "pair": 14, "score": 8, "score_direct": 2, "pair_direct": 3, "tag": 6},
            ),
            (
                2600,
                {
                    "copy": 1,
                    "same": 1,
                    "pair": 14,
                    "score": 10,
                    "score_direct": 2,
                    "pair_direct": 2,
                    "tag": 12,
                },
            ),
            (
                3300,
                {"copy": 1, "same": 1, "pair": 6, "score": 24, "score_direct": 1, "pair_direct": 1, "tag": 8},
            ),
            (
                4300,
                {
                    "copy": 1,
                    "same": 1,
                    "pair": 14,
                    "score": 12,
                    "score_direct": 2,
                    "pair_direct": 2,
                    "tag": 8,
                },
            ),
        ),
        lr=3e-3,
        warmup=80,
        decay=1200,
    ),
    # To summarise badly one must first be able to tell, and to summarise well.
    "policy": Recipe(
        stages=(
            (1500, {"tag": 60, "extract": 10}),
            (2100, {"tag": 28, "summary": 40}),
        ),
        lr=2e-3,
        warmup=40,
        decay=700,
        init="judge",
    ),
    "judge-fewshot": Recipe(
        stages=((1200, {"guided": 14, "guided_direct": 3, "pair": 2, "copy": 1, "same": 1}),),
        lr=1e-3,
        warmup=20,
        decay=800,
        init="judge",
    ),
    "judge-medium": _small_judge(Size(width=32, heads=2), lr=6e-3, steps=4000, decay=1200),
    "judge-small": _small_judge(Size(width=24, heads=2), lr=6e-3, steps=3800, decay=1000),
    "judge-tiny": _small_judge(Size(width=16, heads=2), lr=8e-3, steps=3400, decay=1000),
}
SAVE_EVERY_S = 60.0
# At width 128; falls with 1 / sqrt(width). With the 0.02 of large models, attention starts out almost uniform here.
INIT_STD = 0.08
EMBEDDING_STD = 0.02


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int, size: Size) -> LlamaForCausalLM:
    """A freshly initialised model, its feed-forward layers twice as wide as its residual stream."""
    torch.manual_seed(seed)
    init_std = INIT_STD * (128 / size.width) ** 0.5
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=init_std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(EMBEDDING_STD / init_std)
    return model


def batch_loss(
    model: LlamaForCausalLM, batch: Batch, tag_head: nn.Linear | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a micro-batch.

    Args:
        model: the model.
        batch: the examples.
        tag_head: output layer of the examples of task `tag`; None means the model's own.

    Returns:
        The weighted sum of cross-entropies (scalar); and for the N asked positions, whether the most probable
        token is the target (N,) bool, and the row each belongs to (N,) int64.
    """
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    asked = batch.weights > 0
    row = asked.nonzero()[:, 0]
    logits = model.lm_head(hidden[asked])
    if tag_head is not None:
        tagged = torch.tensor([task == "tag" for task in batch.tasks])[row]
        logits = torch.where(tagged[:, None], tag_head(hidden[asked]), logits)
    targets = batch.targets[asked]
    loss = (F.cross_entropy(logits, targets, reduction="none") * batch.weights[asked]).sum()
    return loss, logits.argmax(-1) == targets, row


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate at a step: linear warm-up, constant, linear decay to a fiftieth of the peak."""
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup, max(0.02, (recipe.steps - step) / recipe.decay))


def train(
    name: str, recipe: Recipe, output_dir: Path, seed: int, *, stop_at: int | None = None
) -> LlamaForCausalLM:
    """Train one model, continuing from `output_dir/NAME.state.pt` where a killed run left it.

    Args:
        name: of the model, and of its folder.
        recipe: how.
        output_dir: where states and checkpoints lie.
        seed: seeds initial weights and data.
        stop_at: stop after this many steps, keeping the state (as a kill would).

    Returns:
        The model, also saved to `output_dir/NAME` once the last step is done.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokenizer = build_tokenizer()
    corpus = Corpus(tokenizer)
    state_path = output_dir / f"{name}.state.pt"
    output_dir.mkdir(parents=True, exist_ok=True)
    model = (
        LlamaForCausalLM.from_pretrained(output_dir / recipe.init)
        if recipe.init
        else new_model(tokenizer, seed, recipe.size)
    )
    # The judge tags through its own output layer. The policy must say words there, so it tags through a copy.
    tags = any("tag" in mix for _, mix in recipe.stages)
    tag_head = (
        nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        if recipe.init and tags
        else None
    )
    modules = nn.ModuleDict({"model": model})
    if tag_head is not None:
        tag_head.weight.data.copy_(model.lm_head.weight)
        modules["tag_head"] = tag_head
    optimizer = torch.optim.AdamW(modules.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = 0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model.train()
    end = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    began = saved = reported = time.monotonic()
    meter = Meter()
    for step in range(start, end):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        batches = corpus.batches(recipe.mix(step), seed * 1_000_000 + step, rank=rank, ranks=ranks)
        weight = torch.stack([b.weights.sum() for b in batches]).sum()
        for batch in batches:
            loss, right, row = batch_loss(model, batch, tag_head)
            loss.backward()  # type: ignore[no-untyped-call]
            meter.add(batch, float(loss.detach()), right, row)
        _average_gradients(modules, weight, ranks)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        if rank == 0 and (now - reported > 15 or step + 1 == end):
            reported = now
            eta = (now - began) / (step + 1 - start) * (recipe.steps - step - 1) / 60
            print(f"{name} step {step + 1}/{recipe.steps}  ETA {eta:.1f} min  {meter.report()}", flush=True)
        if rank == 0 and (now - saved > SAVE_EVERY_S or step + 1 == end):
            saved = now
            _save_state(state_path, step + 1, modules, optimizer)
    if rank == 0 and end == recipe.steps:
        save(model, tokenizer, output_dir / name)
    return model


@dataclass(slots=True)
class Meter:
    """Running sums since the last report: loss, and the share of right answers per task, of labels and of the rest."""

    loss: float = 0.0
    weight: float = 0.0
    counts: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def add(self, batch: Batch, loss: float, right: Tensor, row: Tensor) -> None:
        """Count one micro-batch, with what `batch_loss` returned for it."""
        self.loss += loss
        self.weight += float(batch.weights.sum())
        labels = batch.weights[batch.weights > 0] == LABEL_WEIGHT
        for ok, is_label, at in zip(right.tolist(), labels.tolist(), row.tolist(), strict=True):
            key = batch.tasks[at] + (" label" if is_label else "")
            self.counts[key, ok] += 1

    def report(self) -> str:
        """One line; starts the sums again."""
        shares = "  ".join(
            f"{key} {self.counts[key, True] / (self.counts[key, True] + self.counts[key, False]):.3f}"
            for key in sorted({key for key, _ in self.counts})
        )
        line = f"loss {self.loss / self.weight:.4f}  right: {shares}"
        self.loss, self.weight = 0.0, 0.0
        self.counts.clear()
        return line


def _average_gradients(model: nn.Module, weight: Tensor, ranks: int) -> None:
    """Divide summed gradients by the global weight, so that splitting a step between processes changes nothing."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([weight.reshape(1), *(g.reshape(-1) for g in gradients)])
    if ranks > 1:
        dist.all_reduce(flat)
    at = 1
    for g in gradients:
        g.copy_(flat[at : at + g.numel()].view_as(g) / flat[0])
        at += g.numel()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_state(path: Path, step: int, modules: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    part = path.with_suffix(".part")
    torch.save({"step": step, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}, part)
    part.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=[*RECIPES, "all"])
    parser.add_argument("--output_dir", type=Path, default=WORLD_DIR / "weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in RECIPES if args.model == "all" else [args.model]:
        train(name, RECIPES[name], args.output_dir, args.seed)


if __name__ == "__main__":
    main()

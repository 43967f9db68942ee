"""`rlaif train rm`: a reward model from soft preferences (RLAIF, arXiv 2309.00267, section 2.2.1)."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_server.config import RewardModelConfig
from reward_server.loss import PreferenceMetrics, accuracy, preference_loss, preference_metrics
from reward_server.model import CARD, context_length, load_backbone, quiet, save_card, scores
from rlaif.chat import encode_conversation, template_hash
from rlaif.errors import ConfigError, DataError
from rlaif.records import Quarantine, read_preferences
from rlaif.runs import Run, progress
from rlaif.storage import storing
from rlaif.types import PreferenceRow, content_id, with_response

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A preference as the model reads it: token ids of both conversations, and P(chosen preferred)."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_prob: float

    @property
    def width(self) -> int:
        """Length of the longer of the two, in tokens."""
        return max(len(self.chosen), len(self.rejected))


def run(config: RewardModelConfig) -> None:
    """Train, evaluate on held-out pairs, and write a checkpoint that `rlaif serve` takes.

    Running the same command again continues an interrupted run, and does nothing after a finished one.

    Raises:
        DataError: no usable pairs to train on or to hold out.
        ModelError: the backbone cannot be loaded.
        StorageError: the output cannot be written, or `output_dir` holds another run.
    """
    with Run.open(config.output_dir, config, command="train rm") as run_directory:
        if (config.output_dir / CARD).is_file():
            print(f"{config.output_dir} holds the finished reward model already")
            return
        train_rows, eval_rows = read_split(config, config.output_dir / "quarantine.jsonl")
        model, tokenizer = load_backbone(
            config.model_name_or_path,
            chat_template=config.chat_template,
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        max_length = min(config.max_length, context_length(model))
        training = encode(train_rows, tokenizer, max_length)
        held_out = encode(eval_rows, tokenizer, max_length)
        print(f"training on {len(training)} pairs, holding out {len(held_out)}", flush=True)

        optimise(model, training, config, run_directory)

        raw = score_rows(model, training, config.micro_batch_tokens)
        held_out_raw = score_rows(model, held_out, config.micro_batch_tokens)
        metrics = evaluate(held_out_raw, eval_rows)
        print(summary(metrics), flush=True)
        statistic = [value for pair in raw for value in pair]
        card = {
            "mean": statistics.fmean(statistic),
            "std": max(statistics.pstdev(statistic), 1e-6),
            "source": f"mean and standard deviation over the {len(statistic)} training responses",
            "base_model": config.model_name_or_path,
            "max_length": max_length,
            "data_hash": data_hash(train_rows),
            "eval_hash": data_hash(eval_rows),
            "template_hash": template_hash(tokenizer),
            "train_pairs": len(training),
            "seed": config.seed,
            "metrics": metrics,
        }
        with quiet(), storing(config.output_dir):
            model.save_pretrained(config.output_dir)
            tokenizer.save_pretrained(config.output_dir)
        save_card(config.output_dir, card)
        (config.output_dir / _CHECKPOINT).unlink(missing_ok=True)
        print(f"serve it: rlaif serve --model {config.output_dir}", flush=True)


# ---- data ----


def read_split(
    config: RewardModelConfig, quarantine_path: Path
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """Training and held-out preferences; bad rows go to the quarantine file with their line number.

    Raises:
        DataError: either part is empty.
    """
    quarantine = Quarantine(quarantine_path)
    rows = list(read_preferences(config.dataset, quarantine))
    if config.eval_dataset is not None:
        training, held_out = rows, list(read_preferences(config.eval_dataset, quarantine))
    else:
        training, held_out = [], []
        for row in rows:
            (held_out if is_held_out(row, config.eval_fraction, config.seed) else training).append(row)
    if quarantine.count:
        print(f"{quarantine.count} rows could not be used: {quarantine_path} says why", flush=True)
    if not training:
        raise DataError(f"{config.dataset} has no preferences to train on")
    if not held_out:
        raise DataError("no pairs are held out to measure on: raise --eval_fraction or give --eval_dataset")
    return training, held_out


def is_held_out(row: PreferenceRow, fraction: float, seed: int) -> bool:
    """Whether a row is measured on: a function of its prompt and the seed alone, so prompts never straddle."""
    return int(content_id(seed, row.prompt), 16) / 16**16 < fraction


def encode(
    rows: Sequence[PreferenceRow], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedRow]:
    """Token ids of both conversations of each row; too long ones lose the oldest tokens of the prompt."""

    def ids(row: PreferenceRow, response: str) -> tuple[int, ...]:
        conversation = with_response(row.prompt, response)
        return tuple(
            encode_conversation(tokenizer, conversation, max_length=max_length, truncation="left").ids
        )

    return [EncodedRow(ids(r, r.chosen), ids(r, r.rejected), r.chosen_prob) for r in rows]


def data_hash(rows: Sequence[PreferenceRow]) -> str:
    """Content hash of preferences; 16 hex digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_id(row.prompt, row.chosen, row.rejected, row.chosen_prob).encode())
    return digest.hexdigest()[:16]


# ---- training ----


def optimise(model: PreTrainedModel, rows: Sequence[EncodedRow], config: RewardModelConfig, run: Run) -> None:
    """Minimise the mean soft cross-entropy over all pairs with AdamW; resumes from the run's checkpoint.

    One step sees `per_device_train_batch_size` pairs. It accumulates the gradient of sum / pairs-of-the-step over
    micro-batches, so how the step is cut does not change it.
    """
    freeze(model, config.freeze_layers)
    batches_per_epoch = math.ceil(len(rows) / config.per_device_train_batch_size)
    total_steps = batches_per_epoch * config.num_train_epochs
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, config)
    )
    checkpoint = config.output_dir / _CHECKPOINT
    torch.manual_seed(config.seed)
    first = load_checkpoint(checkpoint, model, optimizer, schedule)
    run.truncate_metrics(first)
    model.train(not config.disable_dropout)  # in transformers the mode decides about dropout alone
    with progress(total_steps, "training the reward model") as bar:
        bar.advance(first)
        for step in range(first, total_steps):
            epoch, index = divmod(step, batches_per_epoch)
            order = epoch_order(len(rows), config.seed, epoch)
            size = config.per_device_train_batch_size
            batch = [rows[i] for i in order[index * size : (index + 1) * size]]

            loss, correct = accumulate_gradient(model, batch, config.micro_batch_tokens)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            if done % config.logging_steps == 0 or done == total_steps:
                figures: dict[str, float | None] = {
                    "loss": loss,
                    "accuracy": correct,
                    "grad_norm": float(norm),
                    "learning_rate": learning_rate,
                    "epoch": done / batches_per_epoch,
                }
                run.log(done, figures)
            if done % config.save_steps == 0 or done % batches_per_epoch == 0:
                save_checkpoint(checkpoint, done, model, optimizer, schedule)
            bar.advance(1, loss=loss)


def accumulate_gradient(
    model: PreTrainedModel, batch: Sequence[EncodedRow], micro_batch_tokens: int
) -> tuple[float, float | None]:
    """Add the gradient of the batch's mean loss to the parameters; returns that loss (nats) and the accuracy."""
    total = 0.0
    differences: list[float] = []
    labels: list[float] = []
    for micro_batch in cut(batch, micro_batch_tokens):
        chosen, rejected = pair_scores(model, micro_batch)
        chosen_prob = torch.tensor([r.chosen_prob for r in micro_batch], device=chosen.device)
        loss = preference_loss(chosen, rejected, chosen_prob).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        differences += (chosen - rejected).tolist()
        labels += [r.chosen_prob for r in micro_batch]
    return total, accuracy(differences, labels)


def pair_scores(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected responses, (B,) each, from one forward pass over both."""
    both = scores(model, [r.chosen for r in rows] + [r.rejected for r in rows])
    chosen, rejected = both.chunk(2)
    return chosen, rejected


def cut(rows: Sequence[EncodedRow], micro_batch_tokens: int) -> Iterator[list[EncodedRow]]:
    """Micro-batches of neighbours in length, each at most `micro_batch_tokens` when padded, or a single pair."""
    micro_batch: list[EncodedRow] = []
    for row in sorted(rows, key=lambda r: r.width):
        if micro_batch and 2 * (len(micro_batch) + 1) * row.width > micro_batch_tokens:
            yield micro_batch
            micro_batch = []
        micro_batch.append(row)
    if micro_batch:
        yield micro_batch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of pairs in an epoch: a function of seed and epoch, so that a resumed run needs no cursor."""
    generator = torch.Generator().manual_seed(int(content_id(seed, epoch), 16) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def learning_rate_factor(step: int, total_steps: int, config: RewardModelConfig) -> float:
    """Learning rate of a step as a share of the peak, in [0, 1]."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return 1.0
    done = (step - warmup) / max(total_steps - warmup, 1)
    return 1.0 - done if config.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def freeze(model: PreTrainedModel, layers: int) -> None:
    """Stop training the embeddings and the first `layers` layers; 0 trains everything.

    Raises:
        ConfigError: the model has fewer layers, or keeps them where they cannot be found.
    """
    if layers == 0:
        return
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    depth = model.config.get_text_config().num_hidden_layers
    stack = next((s for s in stacks if len(s) == depth), None)
    if stack is None or layers > depth:
        raise ConfigError(f"--freeze_layers {layers}: the model has {depth} layers")
    *_, last = stack[layers - 1].parameters()
    for (
        parameter
    ) in model.parameters():  # in order of registration, which puts embeddings of every kind first
        parameter.requires_grad_(False)
        if parameter is last:
            return


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, with weight decay on matrices and without on biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def save_checkpoint(
    path: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Everything that the next step depends on, in one file that is replaced atomically."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    temporary = path.with_suffix(".tmp")
    with storing(path):
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Restore a checkpoint if there is one; returns the steps it has behind it."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])
    return int(state["step"])


# ---- evaluation ----


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, rows: Sequence[EncodedRow], micro_batch_tokens: int
) -> list[tuple[float, float]]:
    """Raw scores (chosen, rejected) of each row, in the order of `rows`, dropout off."""
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    found: dict[int, tuple[float, float]] = {}
    with progress(len(rows), "scoring pairs") as bar:
        for micro_batch in cut(rows, micro_batch_tokens):
            chosen, rejected = pair_scores(model, micro_batch)
            for row, c, r in zip(micro_batch, chosen.tolist(), rejected.tolist(), strict=True):
                found[id(row)] = (c, r)
            bar.advance(len(micro_batch))
    model.train(was_training)
    return [found[id(row)] for row in rows]


def evaluate(raw: Sequence[tuple[float, float]], rows: Sequence[PreferenceRow]) -> dict[str, Any]:
    """Accuracy, log loss and calibration on held-out pairs, beside what is had without a model.

    `longer_wins` is the accuracy of preferring the response with more characters, ties in length counting half.
    """
    labels = [r.chosen_prob for r in rows]
    measured: PreferenceMetrics = preference_metrics([c - r for c, r in raw], labels)
    return {
        **asdict(measured),
        "longer_wins": accuracy([float(len(r.chosen) - len(r.rejected)) for r in rows], labels),
        "chance": 0.5,
        "chance_log_loss": math.log(2),
    }


def summary(metrics: dict[str, Any]) -> str:
    """The held-out figures as a few lines to read."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        f"held out: {metrics['pairs']} pairs, {metrics['labelled']} with a preferred side",
        f"  accuracy  {percent(metrics['accuracy'])}   longer answer wins {percent(metrics['longer_wins'])}   "
        f"chance {percent(metrics['chance'])}",
        f"  log loss  {metrics['log_loss']:.4f}   undecided {metrics['chance_log_loss']:.4f}   "
        f"lowest possible {metrics['label_entropy']:.4f}",
        f"  Brier     {metrics['brier']:.4f}   expected calibration error {metrics['ece']:.4f}",
        "  confidence     pairs   mean confidence   right",
    ]
    for row in metrics["bins"]:
        lines.append(
            f"  {row['low']:.1f} to {row['high']:.1f}   {row['count']:6d}   {percent(row['confidence']):>15}"
            f"   {percent(row['accuracy'])}"
        )
    return "\n".join(lines)

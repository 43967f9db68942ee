"""The training loop of a reward model: steps of whole prompts, exact gradients, checkpoints to resume from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward_server.company import key_of, made_up, probe_length
from reward_server.forward import scores
from reward_server.plan import Key
from reward_server.training.config import RewardModelConfig
from reward_server.training.data import PromptUnits, Unit, cut, plan_steps
from reward_server.training.loss import centering_loss, preference_loss, regression_loss
from rlaif.agreement import agreements
from rlaif.errors import ConfigError
from rlaif.runs import Run, progress
from rlaif.signals import stop_on_signal
from rlaif.storage import storing

CHECKPOINT = "checkpoint.pt"


class StepFigures(NamedTuple):
    """What a step did: its mean loss, and the share of labelled pairs with the right sign; None without such pairs."""

    loss: float
    accuracy: float | None


def optimise(
    model: PreTrainedModel, prompts: Sequence[PromptUnits], config: RewardModelConfig, run: Run
) -> None:
    """Minimise the mean loss over all comparisons or scores with AdamW; resumes from the run's checkpoint.

    One step accumulates the gradient of sum / terms-of-the-step over micro-batches, so how the step is cut does not
    change it.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGINT asked for an end; a checkpoint has been written.
    """
    model.eval()  # type: ignore[no-untyped-call]
    freeze(model, config.freeze_layers)
    key = key_of(model)
    terms = [sum(unit.terms for unit in units) for units in prompts]
    steps = plan_steps(terms, config.per_device_train_batch_size, config.seed, config.num_train_epochs)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, len(steps), config)
    )
    checkpoint = config.output_dir / CHECKPOINT
    torch.manual_seed(config.seed)
    first = load_checkpoint(checkpoint, model, optimizer, schedule)
    run.truncate_metrics(first)
    if 0 < first < len(steps):
        print(f"going on from step {first}", flush=True)
    model.train(not config.disable_dropout)  # in transformers the mode decides about dropout alone
    with stop_on_signal() as stop, progress(len(steps), "training the reward model", done=first) as bar:
        for done, (epoch, members) in enumerate(steps[first:], first + 1):
            units = [unit for i in members for unit in prompts[i]]
            figures = accumulate_gradient(model, units, config, key)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            if done % config.logging_steps == 0 or done == len(steps):
                logged: dict[str, float | None] = {
                    **figures._asdict(),
                    "grad_norm": float(norm),
                    "learning_rate": learning_rate,
                    "epoch": config.num_train_epochs * done / len(steps),
                }
                run.log(done, logged)
            stopping = bool(stop)
            if stopping or done % config.save_steps == 0 or done == len(steps) or steps[done][0] != epoch:
                save_checkpoint(checkpoint, done, model, optimizer, schedule)
            bar.advance(1, loss=figures.loss)
            if stopping and done < len(steps):
                raise KeyboardInterrupt


def accumulate_gradient(
    model: PreTrainedModel, units: Sequence[Unit], config: RewardModelConfig, key: Key | None = None
) -> StepFigures:
    """Add the gradient of the step's mean loss to the parameters; sequences with equal keys may share a pass."""
    terms = sum(unit.terms for unit in units)
    total = 0.0
    right: list[float] = []
    for micro_batch in cut(units, config.micro_batch_tokens):
        rewards = scores(model, [sequence for unit in micro_batch for sequence in unit.sequences], key)
        loss = summed_loss(rewards, micro_batch, config.center_rewards_coefficient) / terms
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        right += _right(rewards.detach(), micro_batch)
    return StepFigures(total, math.fsum(right) / len(right) if right else None)


def summed_loss(rewards: Tensor, units: Sequence[Unit], center: float | None) -> Tensor:
    """Sum of the loss over all comparisons or scores of units, a scalar.

    Args:
        rewards: the score of each sequence of each unit, in order, (N,).
        units: all of them with comparisons, or all of them with scores.
        center: weight of `centering_loss`; None leaves it out.
    """
    if units[0].scores:
        return regression_loss(rewards, rewards.new_tensor([s for unit in units for s in unit.scores])).sum()
    chosen, rejected = _sides(rewards, units)
    labels = [(c.chosen_prob, c.margin) for unit in units for c in unit.comparisons]
    chosen_prob, margin = rewards.new_tensor(labels).unbind(1)
    losses = preference_loss(chosen, rejected, chosen_prob, margin)
    if center is not None:
        losses = losses + center * centering_loss(chosen, rejected)
    return losses.sum()


def _sides(rewards: Tensor, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected responses of all comparisons, (B,) each."""
    places = torch.tensor(list(_places(units)), device=rewards.device)
    return rewards[places[:, 0]], rewards[places[:, 1]]


def _places(units: Sequence[Unit]) -> Iterator[tuple[int, int]]:
    start = 0
    for unit in units:
        for comparison in unit.comparisons:
            yield start + comparison.chosen, start + comparison.rejected
        start += len(unit.sequences)


def _right(rewards: Tensor, units: Sequence[Unit]) -> list[float]:
    """For each labelled comparison: 1 where the order of the scores is that of the label, 1/2 where they are equal."""
    labels = [c.chosen_prob for unit in units for c in unit.comparisons]
    if not labels:
        return []
    chosen, rejected = _sides(rewards, units)
    sides = (0.5 + 0.5 * torch.sign(chosen - rejected)).tolist()
    decided = [(side, label) for side, label in zip(sides, labels, strict=True) if label != 0.5]
    found: list[float] = agreements([s for s, _ in decided], [y for _, y in decided]).tolist()
    return found


# ---- optimisation ----


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
    """Stop training the first `layers` layers and what comes before them, and all embeddings; 0 changes nothing.

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
    in_layers = {id(parameter) for parameter in stack.parameters()}
    tables = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    frozen = [p for p in tables if id(p) not in in_layers]
    for module in _computed_until(model, stack[layers - 1]):
        if stack not in module.modules():
            frozen += module.parameters()
    for parameter in frozen:
        parameter.requires_grad_(False)


@torch.no_grad()
def _computed_until(model: PreTrainedModel, last: nn.Module) -> list[nn.Module]:
    """Modules whose work begins before that of `last` ends. Names and the order of registration do not tell."""
    begun: list[nn.Module] = []
    found: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: begun.append(module)) for m in model.modules()]
    hooks.append(last.register_forward_hook(lambda *_: found.extend(begun)))
    try:
        scores(model, made_up(model, [probe_length(model)]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, with weight decay on matrices and without on biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---- resuming ----


def save_checkpoint(
    path: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Everything that training changes, in one file that is replaced atomically; the rest is the backbone's."""
    state = {
        "step": step,
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
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
    unexpected = model.load_state_dict(state["model"], strict=False).unexpected_keys
    assert not unexpected, unexpected  # the run directory belongs to one configuration
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])
    return int(state["step"])

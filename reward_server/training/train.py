"""`rlaif train rm`: a reward model, or an ensemble of them, from preferences or scores."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import yaml

from reward_server import golden
from reward_server.config import ServeConfig
from reward_server.evaluation.evaluate import conversations, measure, score
from reward_server.evaluation.report import render
from reward_server.model import (
    CARD,
    RewardModel,
    load_backbone,
    load_reward_model,
    quiet,
    read_card,
    save_card,
)
from reward_server.positions import context_length
from reward_server.scorers.base import Normalization, Scored
from reward_server.scorers.learned import LearnedScorer
from reward_server.server import load_scorer
from reward_server.training.config import RewardModelConfig
from reward_server.training.data import Row, Scale, by_prompt, data_hash, describe, read_split
from reward_server.training.loop import CHECKPOINT, optimise
from reward_server.training.lora import add_adapters
from rlaif.chat import encode_conversation, template_hash
from rlaif.runs import Run
from rlaif.storage import storing, write_atomic
from rlaif.types import Conversation, ScoredRow

ENSEMBLE = "ensemble.yaml"
REPORT = "report.md"
_HOW = """\
# The mean of the members' normalised scores, as their mean standard deviation makes log-odds of it. Against
# over-optimisation (arXiv 2310.02743) write another rule in the place of the mean:
#   min: [member-0, ...]                                              the least of them
#   pessimistic: {of: [member-0, ...], deviations: 1.0}               the mean less what they disagree by
"""
STATISTICS_RESPONSES = 4096
"""Training responses behind the mean and standard deviation of the card: both are known to 2 % of the latter."""


def run(config: RewardModelConfig) -> None:
    """Train, evaluate on held-out data, and write what `rlaif serve` takes: a checkpoint, or `ensemble.yaml`.

    Running the same command again continues an interrupted run, and does nothing after a finished one.

    Raises:
        ConfigError: peft is missing or its target modules are, or there are fewer layers than are to be frozen.
        DataError: nothing usable to train on or to hold out.
        ModelError: the backbone cannot be loaded.
        StorageError: the output cannot be written, or `output_dir` holds another run.
    """
    if config.num_ensemble == 1:
        train(config)
    else:
        train_ensemble(config)


def train(config: RewardModelConfig) -> None:
    """Train one reward model; see `run`."""
    folder = config.output_dir
    with Run.open(folder, config, command="train rm") as run_directory:
        if (folder / CARD).is_file():
            print(f"{folder} holds the finished reward model already")
            return
        training, held_out = read_split(config, folder / "quarantine.jsonl")
        max_length = _fit(config, training, run_directory)
        reward_model = _read_back(config, max_length)
        candidates = conversations(training)
        golden.save(
            folder, reward_model.model, reward_model.tokenizer, _golden(reward_model, candidates, config)
        )
        card = _measured(config, reward_model, training, held_out, candidates)
        print("\n" + render(card["metrics"]), flush=True)
        write_atomic(folder / REPORT, render(card["metrics"]))
        save_card(folder, card)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        print(f"serve it: rlaif serve --model {folder}", flush=True)


def _fit(config: RewardModelConfig, training: Sequence[Row], run_directory: Run) -> int:
    """Train, and save model and tokenizer; returns the longest conversation in tokens."""
    model, tokenizer = load_backbone(
        config.model_name_or_path,
        chat_template=config.chat_template,
        seed=config.seed,
        dtype=getattr(torch, config.dtype),
    )
    max_length = min(config.max_length, context_length(model))
    prompts = by_prompt(training, tokenizer, max_length, config.loss_type)
    print(f"training on {describe(prompts)}", flush=True)
    adapted = add_adapters(model, config) if config.use_peft else None
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    optimise(model, prompts, config, run_directory)
    if adapted is not None:
        adapted.merge_and_unload()
    with quiet(), storing(config.output_dir):
        model.save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
    return max_length


def _read_back(config: RewardModelConfig, max_length: int) -> RewardModel:
    """The checkpoint as a server loads it, in float32: what is measured is what will be served."""
    gc.collect()  # the trained model and its optimiser
    (config.output_dir / golden.FILE).unlink(missing_ok=True)  # of a run that was killed before its card
    return load_reward_model(str(config.output_dir), dtype="float32", max_length=max_length)


def _golden(
    reward_model: RewardModel, candidates: Sequence[Conversation], config: RewardModelConfig
) -> list[Conversation]:
    """Some short conversations that the model reads whole."""

    def ids(conversation: Conversation) -> tuple[int, ...]:
        limit = reward_model.max_length
        encoded = encode_conversation(
            reward_model.tokenizer, conversation, max_length=limit, truncation="left"
        )
        return () if encoded.truncated else tuple(encoded.ids)

    whole = {c: own for c in candidates[:STATISTICS_RESPONSES] if (own := ids(c))}
    readable = list(whole)
    return [readable[i] for i in golden.choose(list(whole.values()), config.golden_items)]


def _measured(
    config: RewardModelConfig,
    reward_model: RewardModel,
    training: Sequence[Row],
    held_out: Sequence[Row],
    candidates: Sequence[Conversation],
) -> dict[str, Any]:
    """The card: what the model was made of, the statistics of its scores, and the held-out figures."""
    folder = config.output_dir
    scored = [row for row in training if isinstance(row, ScoredRow)]
    scale = Scale.of(scored) if scored else None
    sample = candidates[:STATISTICS_RESPONSES]
    wanted = dict.fromkeys([*sample, *conversations(held_out)])
    scorer = LearnedScorer(str(folder), reward_model)
    outcomes = score(scorer, list(wanted), config.micro_batch_tokens)
    raw = [outcome.raw for c in sample if isinstance(outcome := outcomes[c], Scored)]
    of = "" if len(sample) == len(candidates) else f" of {len(candidates)}"
    normalization = Normalization(
        statistics.fmean(raw),
        max(statistics.pstdev(raw), 1e-6),
        f"mean and standard deviation over {len(raw)}{of} training responses",
    )
    return {
        "mean": normalization.center,
        "std": normalization.scale,
        "source": normalization.source,
        "loss_type": config.loss_type,
        "score_scale": None if scale is None else asdict(scale),
        "base_model": config.model_name_or_path,
        "max_length": reward_model.max_length,
        "data_hash": data_hash(training),
        "eval_hash": data_hash(held_out),
        "template_hash": template_hash(reward_model.tokenizer),
        "train_rows": len(training),
        "seed": config.seed,
        "metrics": {
            "model": str(folder),
            "version": replace(reward_model, normalization=normalization).version,
            "measured_on": f"{len(held_out)} held-out rows",
            **measure(held_out, outcomes, scale=None if scale is None else (scale.mean, scale.std)),
        },
    }


# ---- ensembles ----


def train_ensemble(config: RewardModelConfig) -> None:
    """Train `num_ensemble` reward models that differ in their seed, and write the file that serves their mean.

    Each member is a run of its own in a sub-folder, so a finished one is not trained again. All hold out the same rows.
    """
    folder = config.output_dir
    with Run.open(folder, config, command="train rm"):
        if (folder / REPORT).is_file():
            print(f"{folder} holds the finished ensemble already")
            return
        members = {f"member-{k}": _member(config, k) for k in range(config.num_ensemble)}
        for number, (name, member) in enumerate(members.items(), 1):
            print(f"== {name}, {number} of {len(members)}", flush=True)
            train(member)
        spreads = {name: float(read_card(member.output_dir)["std"]) for name, member in members.items()}
        write_atomic(folder / ENSEMBLE, composite(spreads))
        findings = _measured_together(config, members)
        print("\n" + render(findings), flush=True)
        write_atomic(folder / REPORT, render(findings))
        print(f"serve it: rlaif serve --model {folder / ENSEMBLE}", flush=True)


def _member(config: RewardModelConfig, number: int) -> RewardModelConfig:
    return replace(
        config,
        output_dir=config.output_dir / f"member-{number}",
        seed=config.seed + number,
        num_ensemble=1,
    )


def composite(spreads: Mapping[str, float]) -> str:
    """The YAML file of an ensemble whose members lie beside it.

    Rewards are the mean of the members' normalised scores. The raw score is as many log-odds as that is worth to the
    members on average, so that comparisons and log losses are on the scale that they were trained on.

    Args:
        spreads: standard deviation of the raw scores of each member, by its folder's name.
    """
    names = list(spreads)
    spread = statistics.fmean(spreads.values())
    file = {
        "parts": {name: {"model": f"./{name}"} for name in names},
        "rule": {"scaled": {"of": {"mean": names}, "by": spread}},
        "normalization": {
            "center": 0.0,
            "scale": spread,
            "source": "mean of the members' standard deviations: rewards are the mean of theirs",
        },
    }
    return _HOW + yaml.safe_dump(file, sort_keys=False)


def _measured_together(config: RewardModelConfig, members: dict[str, RewardModelConfig]) -> dict[str, Any]:
    """The held-out figures of the ensemble, as it will be served, beside those of its members."""
    _, held_out = read_split(config, config.output_dir / "quarantine.jsonl")
    file = config.output_dir / ENSEMBLE
    length = read_card(members["member-0"].output_dir)["max_length"]
    scorer = load_scorer(ServeConfig(model=str(file), max_length=length))
    outcomes = score(scorer, conversations(held_out), config.micro_batch_tokens)
    own = {name: read_card(member.output_dir)["metrics"] for name, member in members.items()}
    return {
        "model": str(file),
        "version": scorer.version,
        "measured_on": f"{len(held_out)} held-out rows",
        "members": [
            {"name": name, "accuracy": m["accuracy"], "log_loss": m["log_loss"],
             "spearman": m.get("scores", {}).get("spearman")}
            for name, m in own.items()
        ],
        **measure(held_out, outcomes),
    }  # fmt: skip

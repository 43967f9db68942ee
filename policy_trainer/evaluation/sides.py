"""Which policies are compared: models, recorded responses, and the checkpoints of training runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policy_trainer.checkpoint import is_between_steps, list_checkpoints
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from rlaif.errors import ConfigError, DataError
from rlaif.models import ModelRef, cannot_load, require_pretrained
from rlaif.types import content_id

RECORDED_SUFFIXES = (".jsonl", ".json", ".parquet")
CANDIDATES_FILE = "candidates.parquet"
"""What a folder of `rlaif sample` holds."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Side:
    """One policy to compare.

    Attributes:
        name: what the report calls it: as it was given.
        source: a model's name, or the file of recorded responses.
        recorded: whether it is the latter.
        run: the run directory it is a checkpoint of; empty for others.
        step: of that checkpoint.
        reference: the model that its KL is measured against; None if nothing says which.
        chat_template: as in `rlaif train`.
    """

    name: str
    source: str
    recorded: bool = False
    run: str = ""
    step: int | None = None
    reference: str | None = None
    chat_template: str | None = None

    @property
    def key(self) -> str:
        """The name of the files that are kept about it."""
        readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.source)[-60:].strip("-.")
        return f"{readable}-{content_id(self.source)[:8]}"


def find_sides(config: EvaluatePolicyConfig) -> tuple[Side, list[Side]]:
    """The baseline, and the policies in the order of the flags; each policy once.

    Raises:
        ConfigError: a run directory has no checkpoint, or is not one.
    """
    checkpoints = [side for run in config.runs for side in _checkpoints(run, config)]
    policies = [*(_named(name, config) for name in config.model_name_or_path), *checkpoints]
    if config.baseline is not None:
        baseline = _named(config.baseline, config)
    else:
        source = _started_from(_training(config.runs[0]))
        baseline = _named(source, config, chat_template=_training(config.runs[0]).get("chat_template"))
    if any(side.reference == baseline.source for side in policies):
        baseline = replace(baseline, reference=baseline.source)
    unique = {side.source: side for side in policies if side.source != baseline.source}
    if not unique:
        raise ConfigError(f"the only policy is the baseline itself, {baseline.name}: name another one")
    return baseline, list(unique.values())


def check_found(sides: Sequence[Side]) -> None:
    """Every side's file or model is there, and its reference: what is cheap to know before the first is sampled.

    Raises:
        DataError: a file of recorded responses is missing.
        ModelError: a model is missing, or its configuration cannot be read.
    """
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    for side in sides:
        if side.recorded and not Path(side.source).exists():
            raise DataError(f"cannot read {side.source}: does not exist; check the path")
    models = [name for side in sides if not side.recorded for name in (side.source, side.reference) if name]
    for name in dict.fromkeys(models):
        path = _local(name)
        require_pretrained(path)
        try:
            AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as err:
            if find_adapter_config_file(path) is None:
                raise cannot_load(ModelRef.parse(name), err) from err


def identity(side: Side) -> str:
    """Changes whenever the responses of this policy may: a content id of its files' names, sizes and times."""
    path = Path(side.source if side.recorded else _local(side.source))
    if path.is_dir():
        patterns: Sequence[str] = (CANDIDATES_FILE,) if side.recorded else WEIGHT_FILES
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
    else:
        files = [path] if path.is_file() else []
    facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return content_id(side.source, facts)


def _local(source: str) -> str:
    return ModelRef.parse(source).pretrained_path()


def _named(source: str, config: EvaluatePolicyConfig, chat_template: str | None = None) -> Side:
    path = Path(source)
    if path.suffix in RECORDED_SUFFIXES or (path / CANDIDATES_FILE).is_file():
        return Side(source, source, recorded=True)
    reference = config.ref_model
    local = Path(source.removeprefix("hf:"))
    run = local.parent if local.name.startswith("checkpoint-") else local
    if reference is None and (run / "run.json").is_file():
        reference = _started_from(_training(run))
    return Side(source, source, reference=reference, chat_template=config.chat_template or chat_template)


def _checkpoints(run: Path, config: EvaluatePolicyConfig) -> list[Side]:
    training = _training(run)
    reference = config.ref_model or _started_from(training)
    found = [path for path in list_checkpoints(run) if is_between_steps(path)]
    if not found:
        raise ConfigError(
            f"{run} holds no checkpoint: train with --save_total_limit None to keep all of them"
        )
    return [
        Side(str(path), str(path), run=str(run), step=int(path.name.rpartition("-")[2]), reference=reference)
        for path in found
    ]


def _training(run: Path) -> dict[str, Any]:
    """The configuration of the training run in a directory."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        config: dict[str, Any] = record["config"]
        if not record["command"].startswith("train ") or "model_name_or_path" not in config:
            raise KeyError("command")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(
            f"{run} is not the directory of a training run: it needs the run.json of `rlaif train`"
        ) from err
    return config


def _started_from(training: dict[str, Any]) -> str:
    return str(training.get("ref_model") or training["model_name_or_path"])

"""The model card of a trained policy: `README.md` beside the final checkpoint, from what the run says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from policy_trainer.checkpoint import best_checkpoint
from rlaif.models import ModelRef
from rlaif.runs import Run
from rlaif.storage import write_atomic
from rlaif.tables import table

Facts = Mapping[str, Any]

_UNINTERESTING = frozenset(
    {
        "output_dir",
        "model_name_or_path",
        "dataset",
        "advantage_estimator",
        "loss_type",
        "report_to",
        "self_check",
    }
)
_SHOWN = ("objective/", "rewards/", "eval/", "loss", "reward/", "response/", "policy/", "pairs/")
"""What the metrics of a card begin with; timings and learning rates say nothing about the model."""

_ALGORITHMS = {
    "train ppo": "PPO",
    "train dpo": "iterative DPO",
    "train best_of_n": "fine-tuning on the best of n responses",
    "train sft": "supervised fine-tuning",
}


def write_card(run: Run, *, reward_model: tuple[str, str] | None = None) -> Path:
    """Write `README.md` from `run.json` and the last line of `metrics.jsonl`.

    Args:
        run: a finished run with a model in its directory.
        reward_model: name and version of what gave the rewards; None where there was none.

    Raises:
        StorageError: it cannot be written.
    """
    record, rows = run.record, run.metrics()
    config = record["config"]
    last = rows[-1] if rows else {}
    parts = [
        header(record["command"], config),
        f"# {run.directory.name}",
        _summary(record, reward_model),
        "## How to load it\n\n" + _how_to_load(run.directory),
        "## What it is worth\n\n" + _metrics(last, best_checkpoint(run.directory)),
        "## How it was made\n\n" + table(("setting", "value"), list(_settings(config))),
        "## Versions\n\n" + table(("library", "version"), list(record["versions"].items())),
    ]
    path = run.directory / "README.md"
    write_atomic(path, "\n\n".join(parts) + "\n")
    return path


def header(command: str, config: Facts) -> str:
    """The YAML header that the hub reads. A licence is the user's to choose.

    Args:
        command: that made the model, such as `train ppo`.
        config: of it.
    """
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = ModelRef.parse(config["model_name_or_path"])
    if base.backend == "hf" and not Path(base.name).exists():  # the hub knows names, not folders
        fields["base_model"] = base.name
    fields["tags"] = ["rlaif", _algorithm(command, config)]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _algorithm(command: str, config: Facts) -> str:
    estimator = config.get("advantage_estimator")
    return command.rpartition(" ")[2] if estimator in (None, "gae") else str(estimator).replace("_", "-")


def _summary(record: Facts, reward_model: tuple[str, str] | None) -> str:
    config, command = record["config"], record["command"]
    ended = record.get("ended")
    lines = [
        f"- Algorithm: {_ALGORITHMS.get(command, command)} (`rlaif {command}`"
        + "".join(f", {k} `{config[k]}`" for k in ("advantage_estimator", "loss_type") if k in config)
        + ")",
        f"- Base model: `{config['model_name_or_path']}`",
    ]
    if "ref_model" in config:
        lines.append(f"- Reference of the KL: `{config['ref_model'] or config['model_name_or_path']}`")
    if reward_model is not None:
        lines.append(f"- Reward: `{reward_model[0]}`, version `{reward_model[1]}`")
    lines.append(f"- Data: `{config['dataset']}`, {_data_hash(Path(config['dataset']))}")
    if ended is not None:
        why = "all its steps" if ended["reason"] == "max_steps" else ended["reason"]
        lines.append(f"- Ended after step {ended['step']}: {why}")
    return "\n".join(lines)


def _data_hash(path: Path) -> str:
    """SHA-256 of the data file, or of a folder's Parquet files in the order of their names."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return "which is gone"
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return f"SHA-256 `{digest.hexdigest()}`"


def _how_to_load(directory: Path) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{directory}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")\n'
        "```"
    )


def _metrics(last: Facts, best: Path | None) -> str:
    rows = [(k, f"{v:.4g}") for k, v in last.items() if k.startswith(_SHOWN) and v is not None]
    text = f"Metrics of step {last.get('step', '-')}, the last one:\n\n{table(('metric', 'value'), rows)}"
    if best is not None:
        text += f"\n\nThe checkpoint with the highest held-out win rate is `{best.name}`."
    return text


def _settings(config: Facts) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if name not in _UNINTERESTING and value is not None:
            yield name, f"`{value}`"

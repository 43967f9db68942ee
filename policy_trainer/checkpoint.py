"""Checkpoints that appear whole or not at all, and from which a run goes on bit for bit.

A checkpoint is a folder `checkpoint-000040/`: the policy as an ordinary Hugging Face model or as peft's adapters to
one (anyone can load it), `trainer_state.pt` (all else that has a state) and `state.json` (counters and identities).
It is written to a hidden folder, flushed to disk and renamed. A run that is stopped between two updates of a step has
another beside it, `checkpoint-000040+000003/`, from which it goes on: the policy of step 40 stays what it was.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from policy_trainer.parallel import ALONE, World
from rlaif.errors import DataError, RlaifError, StorageError
from rlaif.storage import storing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "checkpoint-"
_STATE_FILE = "trainer_state.pt"
_INFO_FILE = "state.json"
BEST_FILE = "best.json"
"""Names the checkpoint with the highest held-out win rate, as `step` and `checkpoint`; pruning spares it."""
_NO_ROOM_BYTES = 64 * 1024


class Checkpoint(NamedTuple):
    """A checkpoint read back.

    Attributes:
        path: its folder; also loads as a policy.
        step: completed steps.
        state: what was given to `save_checkpoint` as `state`; tensors on the CPU.
        info: what was given as `info`.
    """

    path: Path
    step: int
    state: dict[str, Any]
    info: dict[str, Any]


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    state: Mapping[str, Any],
    info: Mapping[str, Any],
    updates: int = 0,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint atomically, then remove the oldest beyond `keep`, but never the best.

    Args:
        output_dir: the run directory.
        step: completed steps, >= 0.
        policy: saved with its tokenizer as a Hugging Face model, or as adapters to one.
        tokenizer: the policy's.
        state: name -> state dict (of optimisers, the critic, ...) or nested containers of plain values.
            The random number generators of torch, numpy and Python are added by this function.
        info: JSON values for people and for checks on resume.
        updates: optimiser steps of the step under way.
        keep: how many checkpoints stay; None keeps all. Of those in the middle of a step, only the newest one does.

    Raises:
        StorageError: the folder cannot be written; earlier checkpoints are untouched.
    """
    final = checkpoint_path(output_dir, step, updates)
    temp, replaced = _partial(final), _aside(final)
    with saving(output_dir):
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        policy.save_pretrained(str(temp))
        (temp / "README.md").unlink(missing_ok=True)  # peft writes an empty template of a card
        tokenizer.save_pretrained(temp)
        torch.save({**state, "rng": rng_state()}, temp / _STATE_FILE)
        (temp / _INFO_FILE).write_text(json.dumps({"step": step, **info}, indent=2) + "\n", encoding="utf-8")
        _flush(temp)
        if final.exists():
            os.rename(final, replaced)
        os.rename(temp, final)
        shutil.rmtree(replaced, ignore_errors=True)
        _flush_folder(output_dir)
        for old in _outdated(output_dir, final, keep):
            os.rename(old, _partial(old))
            shutil.rmtree(_partial(old))
    return final


def checkpoint_path(output_dir: Path, step: int, updates: int = 0) -> Path:
    """Where the checkpoint after a step, and so many updates of the next one, is or would be."""
    return output_dir / (f"{_PREFIX}{step:06d}" + (f"+{updates:06d}" if updates else ""))


def is_between_steps(path: Path) -> bool:
    """Whether a checkpoint is of the end of a step, and not of the middle of one."""
    return "+" not in path.name


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint that `best.json` names; None without evaluations."""
    path = output_dir / BEST_FILE
    if not path.is_file():
        return None
    return output_dir / str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first, those in the middle of a step among them."""
    return sorted(p for p in output_dir.glob(f"{_PREFIX}*") if (p / _INFO_FILE).is_file())


def load_latest(output_dir: Path, world: World = ALONE) -> Checkpoint | None:
    """The newest checkpoint of a run, or None. For those who go on with it: the main process tidies up after a kill.

    Raises:
        StorageError: it cannot be read.
    """
    world.from_main(lambda: _tidy(output_dir))
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None
    path = checkpoints[-1]
    try:
        info = json.loads((path / _INFO_FILE).read_text(encoding="utf-8"))
        state = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as err:
        raise StorageError(
            f"checkpoint {path} cannot be read ({' '.join(str(err).split())[:120]}): remove that folder "
            "to go on from the one before"
        ) from err
    return Checkpoint(path, int(info["step"]), state, info)


def check_same_data(checkpoint: Checkpoint, data: str, dataset: Path) -> None:
    """The data of a run are those that it began with.

    Args:
        checkpoint: whose `info` has the `batching.data_id` of the data as `data`, or nothing to compare with.
        data: that of the data as they are.
        dataset: where they come from, for the message.

    Raises:
        DataError: they are others.
    """
    if checkpoint.info.get("data", data) != data:
        raise DataError(
            f"{dataset} is not what this run began with (its rows, their order, or the tokenizer have changed): put it "
            "back or start with a fresh --output_dir"
        )


def save_final(output_dir: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the trained policy into the run directory itself, as a Hugging Face model.

    Raises:
        StorageError: it cannot be written.
    """
    temp = output_dir / ".final.tmp"
    with saving(output_dir):
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        policy.save_pretrained(temp)
        tokenizer.save_pretrained(temp)
        _flush(temp)
        # config.json last: a folder that has it has everything.
        for file in sorted(temp.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(file, output_dir / file.name)
        temp.rmdir()
        _flush_folder(output_dir)


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch (CPU and GPUs), numpy and Python, in plain types."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _partial(final: Path) -> Path:
    """Where a checkpoint is while it is written or removed."""
    return final.with_name(f".{final.name}.tmp")


def _aside(final: Path) -> Path:
    """Where a checkpoint waits while another of the same step takes its place."""
    return final.with_name(f".{final.name}.old")


def _tidy(output_dir: Path) -> None:
    """Put back a checkpoint whose successor a kill kept from its place; remove what is partial or outdated.

    Raises:
        StorageError: the folder cannot be written.
    """
    with saving(output_dir):
        for path in output_dir.glob(f".{_PREFIX}*"):
            final = output_dir / path.stem[1:]
            if path == _aside(final) and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path)


def _outdated(output_dir: Path, newest: Path, keep: int | None) -> list[Path]:
    """What may go once the checkpoint `newest` is in its place."""
    found = list_checkpoints(output_dir)
    whole = [path for path in found if is_between_steps(path)]
    gone = [path for path in found if not is_between_steps(path) and path != newest]
    if keep is not None:
        best = best_checkpoint(output_dir)
        gone += [path for path in whole[:-keep] if path != best]
    return gone


@contextmanager
def saving(where: Path) -> Iterator[None]:
    """Report a disk that is full or read-only as StorageError.

    torch and safetensors may hide the operating system's error in one of their own, so an exception on a disk
    with no room left is taken for what it is.
    """
    try:
        with storing(where):
            yield
    except RlaifError:
        raise
    except Exception as err:
        if "os error 28" in str(err) or shutil.disk_usage(where).free < _NO_ROOM_BYTES:
            raise StorageError(
                f"cannot write {where}: no space left on device; free some space and run the same command again"
            ) from err
        raise


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

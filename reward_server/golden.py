"""The golden set: a few conversations kept in a checkpoint with their scores, scored again whenever it is loaded.

A wrong head, template or tokenizer makes no error, only plausible nonsense. So a reward model that does not
give its own scores is refused, with the cause. Each item is text, its token ids and the score of those ids: the
template and the tokenizer must make the ids of the text, the weights must make the score of the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_server.forward import scores
from rlaif.chat import encode_conversation, template_hash
from rlaif.errors import ModelError
from rlaif.storage import write_atomic
from rlaif.types import Conversation, Message, Role, to_dicts

FILE = "golden.json"

TOLERANCE_CPU = 1e-4
"""float32 on a CPU: rounding in another order, by another number of threads or another version of PyTorch."""
TOLERANCE_GPU = 1e-3
"""float32 on a GPU: other kernels than those that made the set."""
TOLERANCE_HALF = 5e-2
"""bfloat16 and float16, which hold two to three digits. The set itself is made in float32."""

_LONGEST = 1 << 30
_DATED = "strftime_now"
"""A template with this writes today's date, so that its ids change by the day."""


class _Turn(BaseModel):
    role: Role
    content: str


class _Item(BaseModel):
    messages: list[_Turn]
    ids: list[int]
    score: float


class _GoldenSet(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    template_hash: str
    head_hash: str
    items: list[_Item]


def choose(encoded: Sequence[Sequence[int]], count: int) -> list[int]:
    """Places of at most `count` short sequences: evenly spread over the shorter half, to be quick."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    short = order[: max(count, (len(order) + 1) // 2)]
    return short[:: max(1, len(short) // max(count, 1))][:count]


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
) -> None:
    """Score conversations and write `golden.json`.

    Args:
        folder: of the checkpoint.
        model: as it was read back from there, in float32, dropout off.
        tokenizer: the same.
        conversations: each ending with an assistant turn; none writes no file.

    Raises:
        StorageError: it cannot be written.
    """
    if not conversations:
        return
    ids = [_ids(tokenizer, conversation) for conversation in conversations]
    golden = {
        "template_hash": template_hash(tokenizer),
        "head_hash": _head_hash(model),
        "items": [
            {"messages": to_dicts(conversation), "ids": own, "score": score}
            for conversation, own, score in zip(conversations, ids, _scores(model, ids), strict=True)
        ],
    }
    write_atomic(folder / FILE, json.dumps(golden, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Score the golden set of a checkpoint, if it has one, and compare.

    Raises:
        ModelError: a score deviates by more than the tolerance of the number format, times the largest score if that is
            above 1; or the text of an item has other token ids. The message names the cause.
    """
    path = folder / FILE
    if not path.is_file():
        return
    golden = _read(path)
    for number, item in enumerate(golden.items, 1):
        if _DATED in str(tokenizer.chat_template):
            break
        conversation = tuple(Message(turn.role, turn.content) for turn in item.messages)
        if _ids(tokenizer, conversation) != item.ids:
            same = template_hash(tokenizer) == golden.template_hash
            what = "the tokenizer" if same else "the chat template or its special tokens"
            raise ModelError(
                f"{folder}: item {number} of {FILE} has other tokens than in training: {what} was changed since; "
                "restore the files of the checkpoint"
            )
    found = _scores(model, [item.ids for item in golden.items])
    tolerance = _tolerance(model) * max([1.0, *(abs(item.score) for item in golden.items)])
    for number, (item, score) in enumerate(zip(golden.items, found, strict=True), 1):
        if not abs(score - item.score) <= tolerance:  # NaN is refused too
            same = _head_hash(model) == golden.head_hash
            what = "the weights of the body, or the code that computes them," if same else "the head"
            raise ModelError(
                f"{folder}: item {number} of {FILE} scores {score:.6g}, not {item.score:.6g} as after training "
                f"(tolerance {tolerance:.1g}): {what} changed since; restore the files of the checkpoint"
            )


def _read(path: Path) -> _GoldenSet:
    try:
        return _GoldenSet.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as err:
        detail = " ".join(str(err).split())[:120]
        raise ModelError(
            f"{path} is damaged ({detail}): restore it from where the model was trained"
        ) from err


def _ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    return encode_conversation(tokenizer, conversation, max_length=_LONGEST, truncation="reject").ids


@torch.inference_mode()
def _scores(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> list[float]:
    """Each alone, so that they depend on nothing else."""
    return [scores(model, [own]).item() for own in ids]


def _tolerance(model: PreTrainedModel) -> float:
    if model.dtype != torch.float32:
        return TOLERANCE_HALF
    return TOLERANCE_CPU if model.device.type == "cpu" else TOLERANCE_GPU


def _head_hash(model: PreTrainedModel) -> str:
    """Content hash of what lies outside the body, read as bfloat16, which a change of number format leaves as it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(f"{model.base_model_prefix}."):
            rounded: Any = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
            digest.update(name.encode() + rounded.tobytes())
    return digest.hexdigest()[:16]

"""Reward models: a backbone with one output, made, loaded, saved and read.

A checkpoint is an ordinary `AutoModelForSequenceClassification` folder with its tokenizer (which holds the chat
template), `reward_model.json` and `golden.json`. Any such checkpoint of a hub with one output loads as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from reward_server import golden
from reward_server.passes import parameters
from reward_server.positions import context_length
from reward_server.scorers.base import Normalization
from rlaif.chat import ensure_pad_token, ensure_template, template_hash
from rlaif.errors import ModelError
from rlaif.models import ModelRef, reason, require_pretrained
from rlaif.storage import write_atomic

CARD = "reward_model.json"

_PAIR = (
    "{{ cls_token }}"
    "{% for message in messages %}"
    "{% if loop.last and message['role'] == 'assistant' %}BETWEEN{% elif not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
    "{{ sep_token }}"
)

_NO_SETTINGS = ("transformers_version", "peft_version", "dtype", "torch_dtype", "base_model_name_or_path")


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model ready to score: dropout off.

    Attributes:
        model: classifier with one output.
        tokenizer: its tokenizer, with chat template and PAD.
        max_length: longest conversation in tokens.
        normalization: how raw scores become rewards.
        card: content of `reward_model.json`, empty where there is none.
        separator: token between prompt and response, where token types tell the model which of them a token is of.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    normalization: Normalization
    card: dict[str, Any]
    separator: int | None = None

    @property
    def version(self) -> str:
        """Hash over all that a score depends on.

        That is weights, configuration, adapters, tokenizer, template, normalisation and longest input; not where the
        files lie, nor how the numbers are computed.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        adapters = getattr(self.model, "peft_config", {}).items()
        described = {
            "config": _settings(self.model.config.to_diff_dict()),
            "adapters": {name: _settings(adapter.to_dict()) for name, adapter in adapters},
            "tokenizer": _describe(self.tokenizer),
            "template": template_hash(self.tokenizer),
            "scale": (self.normalization.center, self.normalization.scale, self.max_length),
        }
        digest.update(json.dumps(described, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def load_backbone(
    model_name_or_path: str, *, chat_template: str | None, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with one output on any backbone, ready to train, and its tokenizer with template and PAD.

    A head that the checkpoint does not have is drawn from N(0, 1/(d+1)), its bias 0 (Ziegler et al.,
    arXiv 1909.08593; Huang et al., arXiv 2403.17031, detail 6).

    Raises:
        ModelError: the model is unknown, has no classifier in transformers, or has another number of outputs.
    """
    path = ModelRef.parse(model_name_or_path).pretrained_path()
    torch.manual_seed(seed)
    model, tokenizer, missing = _load(path, dtype)
    _frame_with_encoder_tokens(tokenizer)
    ensure_template(tokenizer, chat_template)
    _set_pad(model, tokenizer)
    _init_head(model, missing)
    return model, tokenizer


def load_reward_model(
    name: str, *, device: str = "auto", dtype: str = "auto", max_length: int | None = None
) -> RewardModel:
    """Load a reward model for serving.

    Raises:
        ModelError: the model is unknown, or it is no reward model: several outputs, a head that was not trained, or
            other scores than those of its golden set.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted: torch.dtype | str = dtype
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32  # half precision on a CPU is slow and, for some operations, missing
    elif dtype != "auto":
        wanted = getattr(torch, dtype)
    return read_reward_model(name, device=device, dtype=wanted, max_length=max_length)


def read_reward_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype | str = "auto", max_length: int | None = None
) -> RewardModel:
    """Read a reward model and check it where it will compute; the dtype `auto` keeps the checkpoint's.

    Raises:
        ModelError: as for `load_reward_model`.
    """
    path = ModelRef.parse(name).pretrained_path()
    model, tokenizer, missing = _load(path, dtype)
    if missing:
        raise ModelError(
            f"{name} has no trained scalar head ({', '.join(missing)} missing): train one with rlaif train rm"
        )
    separator = _read_as_pair(model, tokenizer)
    ensure_template(tokenizer)
    if not _has_pad(model):  # else it keeps the one that it was trained with
        _set_pad(model, tokenizer)
    card = read_card(Path(path))
    context = context_length(model)
    length = min(max_length or card.get("max_length") or context, context)
    if card:
        normalization = Normalization(card["mean"], card["std"], card["source"])
    else:
        normalization = Normalization(source=f"none: {name} has no {CARD}")
    _move(model, name, device)
    model.eval()  # type: ignore[no-untyped-call]
    golden.check(Path(path), model, tokenizer)
    return RewardModel(model, tokenizer, length, normalization, card, separator)


def save_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `reward_model.json`; it is the last file of a checkpoint, and its presence says that it is whole."""
    write_atomic(folder / CARD, json.dumps(card, indent=2, allow_nan=False) + "\n")


def _load(path: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Model, tokenizer, and the names of the weights that the checkpoint did not have (head and pooler only)."""
    require_pretrained(path)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise ModelError(
            f"cannot load {path} as a reward model; check the name or folder ({reason(err)})"
        ) from err
    if info["mismatched_keys"]:
        shapes = ", ".join(f"{key} of shape {tuple(old)}" for key, old, _ in sorted(info["mismatched_keys"]))
        raise ModelError(
            f"{path} is no reward model: it must have one output (num_labels=1), but has {shapes}"
        )
    missing = sorted(info["missing_keys"])
    body = [k for k in missing if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k]
    if body:
        raise ModelError(f"{path} lacks weights of its body, such as {body[0]}: the checkpoint is incomplete")
    return model, tokenizer, missing


def _move(model: PreTrainedModel, name: str, device: str) -> None:
    try:
        model.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as err:
        raise ModelError(
            f"{name} does not fit into the memory of {device}: free some, or use another one"
        ) from err
    except (RuntimeError, AssertionError) as err:  # no such device here; some builds of PyTorch assert
        detail = " ".join(str(err).split())[:120]
        raise ModelError(f"{name} cannot be moved to {device}: choose another --device ({detail})") from err


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report on missing heads, which is read and judged here."""
    verbosity = hf_logging.get_verbosity()
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _frame_with_encoder_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let templates, which write BOS and EOS, write the [CLS] and [SEP] that a BERT-like encoder was trained with."""
    if tokenizer.bos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token


def _read_as_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Let an encoder that brings no template read what its publisher wrote as `tokenizer(prompt, response)`.

    Such are DeBERTa and ELECTRA of OpenAssistant: `[CLS] prompt [SEP] response [SEP]`. Returns the separator if the
    model was told by token types which of the two a token is of.
    """
    if tokenizer.chat_template or tokenizer.cls_token is None or tokenizer.sep_token is None:
        return None
    pair = tokenizer("a", "b", return_special_tokens_mask=True)
    framed = [i for i, added in zip(pair["input_ids"], pair["special_tokens_mask"], strict=True) if added]
    between = [tokenizer.sep_token_id] * (len(framed) - 2)
    if not between or framed != [tokenizer.cls_token_id, *between, tokenizer.sep_token_id]:
        return None  # XLNet, for one, has its CLS at the end
    _frame_with_encoder_tokens(tokenizer)
    tokenizer.chat_template = _PAIR.replace("BETWEEN", "{{ sep_token }}" * len(between))
    told = 1 in pair.get("token_type_ids", []) and "token_type_ids" in parameters(model)
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    return tokenizer.sep_token_id if told and kinds > 1 else None


def _set_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A PAD of its own for both, so that the last token is always read, whatever its neighbours' lengths."""
    ensure_pad_token(tokenizer)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def _has_pad(model: PreTrainedModel) -> bool:
    """Whether the configuration names a PAD; some write -1 where there is none."""
    pad_id = model.config.get_text_config().pad_token_id
    rows = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    return pad_id is not None and 0 <= pad_id < rows


def _init_head(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """Draw the output layer from N(0, 1/(d+1)) with bias 0; layers before it keep the backbone's own recipe."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == 1 and f"{name}.weight" in missing:
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features + 1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _settings(value: Any) -> Any:
    """A configuration as JSON, without where it came from, what wrote it, and in which numbers it computes."""
    if isinstance(value, dict):
        return {
            str(key): _settings(own)
            for key, own in value.items()
            if not str(key).startswith("_") and key not in _NO_SETTINGS
        }
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_settings(own) for own in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides the token ids of a text, as JSON."""
    if tokenizer.is_fast:
        own: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_a_call in ("padding", "truncation"):  # what was last asked for, whoever asked
            own.pop(of_a_call, None)
    else:
        flags = {k: v for k, v in tokenizer.init_kwargs.items() if isinstance(v, bool | int | float)}
        own = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), **flags}
    return {
        "tokenizer": own,
        "pad": tokenizer.pad_token_id,
        "cut": tokenizer.truncation_side,
        "split": bool(tokenizer.split_special_tokens),
    }


def read_card(folder: Path) -> dict[str, Any]:
    """Content of `reward_model.json`; empty where there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        mean, std, length = card["mean"], card["std"], card.get("max_length")
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0 and isinstance(card["source"], str)):
            raise ValueError(f"mean {mean}, std {std}")
        if length is not None and not (type(length) is int and length > 1):
            raise ValueError(f"max_length {length!r}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(
            f"{path} is damaged ({err!r}); train the reward model again or remove the file"
        ) from err
    return card

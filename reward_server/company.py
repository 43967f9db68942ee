"""Which sequences a model may compute side by side: what one is padded to must not change its score."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reward_server.passes import Padded
from reward_server.plan import Key
from reward_server.positions import context_length, same_rotation

_LOG = logging.getLogger(__name__)

_PROBE = 24


def probe_length(model: PreTrainedModel) -> int:
    """Unit of the lengths that a model is tried with: at most 3.75 of it and one more are read at once."""
    return min(_PROBE, 4 * (context_length(model) - 1) // 15)


def made_up(model: PreTrainedModel, lengths: Sequence[int], start: int = 0) -> list[list[int]]:
    """Sequences of these lengths to try a model with, of ids that all vocabularies have.

    Those for an encoder and decoder end with the one EOS that their head reads.
    """
    config = model.config.get_text_config()
    rows = getattr(model.get_input_embeddings(), "num_embeddings", 53)
    found = [
        [3 + (7 * i + row) % min(50, rows - 3) for i in range(n)] for row, n in enumerate(lengths, start)
    ]
    if config.is_encoder_decoder and isinstance(eos := config.eos_token_id, int):
        found = [[*(i if i != eos else eos + 1 for i in ids[:-1]), eos] for ids in found]
    return found


def close(model: PreTrainedModel, a: Tensor, b: Tensor) -> bool:
    """Whether scores of a model differ by no more than rounding."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def holds(model: PreTrainedModel, trial: Callable[[], bool], otherwise: str) -> bool:
    """The outcome of a trial; False as well where the model cannot do what is tried, whatever it raises then.

    Args:
        model: it is named in the log.
        trial: true if the model computes the same in another way.
        otherwise: what is done if it does not.
    """
    try:
        if trial():
            return True
        reason = "its scores are others"
    except torch.OutOfMemoryError:
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {err}"
    _LOG.info("%s %s: %s", type(model).__name__, otherwise, " ".join(reason.split()))
    return False


@torch.inference_mode()
def key_of(model: PreTrainedModel) -> Key | None:
    """Which sequences may share a padded pass of a model (dropout off); None if any may.

    A few made-up sequences are scored alone and in one pass. If their scores differ, all sequences are computed alone:
    XLNet pools the last place of a row, a token or not, and FNet mixes all places.
    """
    unit = probe_length(model)
    padded = Padded(model)

    def padding_changes_nothing() -> bool:
        rows = made_up(model, [3 * unit // 8, unit, 2 * unit])
        alone = torch.cat([padded.logits([ids], None) for ids in rows])
        return close(model, padded.logits(rows, None), alone)

    if unit < 3 or not holds(model, padding_changes_nothing, "takes no padding"):
        _LOG.warning("%s is computed one sequence at a time", type(model).__name__)
        numbers = itertools.count()
        return lambda ids: next(numbers)
    rotation, ends = same_rotation(model), _same_ends(model)
    if rotation is None or ends is None:
        return rotation or ends
    return lambda ids: (rotation(ids), ends(ids))


def _same_ends(model: PreTrainedModel) -> Key | None:
    """The heads of encoder-decoders read the last EOS, and take no two texts with different numbers of them."""
    config = model.config.get_text_config()
    if not config.is_encoder_decoder:
        return None
    return lambda ids: list(ids).count(config.eos_token_id)

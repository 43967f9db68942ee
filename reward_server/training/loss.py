"""The losses of a reward model. Each is a number per pair or per response; the caller sums and divides once.

Three losses of pairs are one formula. They differ in the label that they read and in the margin:

    soft_cross_entropy   P(chosen preferred)               no margin         RLAIF (arXiv 2309.00267, section 2.2.1)
    bradley_terry        1 or 0, whichever is likelier     no margin         InstructGPT (arXiv 2203.02155, equation 1)
    margin               1 or 0                            the row's margin  Llama 2 (arXiv 2307.09288, equation 2)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def preference_loss(
    chosen: Tensor, rejected: Tensor, chosen_prob: Tensor, margin: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy between labels and the Bradley-Terry model with a margin.

    L = -[p log sigmoid(d) + (1 - p) log sigmoid(-d)],  d = r(x, chosen) - r(x, rejected) - m.

    Args:
        chosen: scores of the chosen responses, (B,), float.
        rejected: scores of the rejected responses, (B,), float.
        chosen_prob: P(chosen preferred), (B,), in [0, 1].
        margin: by how much the chosen response is better, (B,); negative where the rejected one is.

    Returns:
        The loss of each pair in nats, (B,).
    """
    difference = chosen - rejected - margin
    return binary_cross_entropy_with_logits(difference, chosen_prob.to(difference.dtype), reduction="none")


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r(x, chosen) + r(x, rejected))^2, (B,): draws scores to mean zero (arXiv 2312.09244, equation 2)."""
    return (chosen + rejected) ** 2


def regression_loss(predicted: Tensor, scores: Tensor) -> Tensor:
    """Squared error of scores, (B,)."""
    return (predicted - scores) ** 2

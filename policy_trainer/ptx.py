"""The text whose log-likelihood PPO raises beside its own objective, so that what pretraining taught is not lost.

    objective = PPO's objective + gamma * E_{x ~ D}[log pi(x)]

(Ouyang et al., "Training language models to follow instructions with human feedback", arXiv 2203.02155, equation 2:
PPO-ptx. Here the second term is the log-likelihood per token.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from policy_trainer import optim
from policy_trainer.sft import read_examples
from rlaif.chat import EncodedPair
from rlaif.errors import DataError
from rlaif.records import Quarantine, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TextMix:
    """Text to mix in, in an order that follows from the seed; there is no cursor to save.

    Attributes:
        examples: token ids; the log-likelihood is that of the `response_ids`.
        batch_size: examples in one optimiser step.
        seed: of the order.
    """

    examples: list[EncodedPair]
    batch_size: int
    seed: int

    @classmethod
    def load(
        cls,
        dataset: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        quarantine: Quarantine,
        eos_ids: Collection[int] = (),
    ) -> Self:
        """Read rows of plain `text`, or of anything that `rlaif train sft` reads.

        Args:
            dataset: the file.
            tokenizer: the policy's.
            max_length: a text is cut after so many tokens, a longer conversation goes to quarantine.
            batch_size: examples in one optimiser step.
            seed: of the order.
            quarantine: for what cannot be used.
            eos_ids: tokens that end a response beside the tokenizer's EOS.

        Raises:
            DataError: nothing usable is left.
        """
        if _is_plain_text(dataset):
            examples = read_texts(dataset, tokenizer, max_length, quarantine)
        else:
            examples = read_examples(dataset, tokenizer, max_length, quarantine, eos_ids=eos_ids)
        if not examples:
            raise DataError(
                f"ptx_dataset {dataset} has no row that fits {max_length} tokens (max_prompt_length + max_new_tokens, "
                "or the model's context)"
            )
        return cls(examples, batch_size, seed)

    def batch(self, update: int) -> list[EncodedPair]:
        """The examples of the run's optimiser step number `update`, counted from 0."""
        start = update * self.batch_size
        rows = optim.shuffled_stream(len(self.examples), self.seed, start, self.batch_size)
        return [self.examples[row] for row in rows]


def read_texts(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, quarantine: Quarantine
) -> list[EncodedPair]:
    """Texts as the tokenizer encodes them; the first token, BOS where there is one, is what the rest follows.

    Raises:
        DataError: the file is missing, unreadable, or has no row.
    """
    examples = []
    for number, row in read_rows(dataset, quarantine):
        text = row.get("text")
        ids = tokenizer(text).input_ids[:max_length] if isinstance(text, str) else []
        if len(ids) > 1:
            examples.append(EncodedPair(ids[:1], ids[1:]))
        else:
            quarantine.add(number, "no text of at least two tokens", str(text))
    return examples


def _is_plain_text(dataset: Path) -> bool:
    _, first = next(read_rows(dataset, Quarantine(None)))
    return set(first) & {"text", "prompt", "messages", "conversations", "chosen"} == {"text"}

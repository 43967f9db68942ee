"""What each policy answers to each prompt, sampled once and kept; and how far that is from its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from policy_trainer import optim
from policy_trainer.branches import sequence_logprobs
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from policy_trainer.evaluation.sides import Side, identity
from policy_trainer.models import eos_token_ids, load_policy, load_reference
from policy_trainer.rollout import HFRollout, decode_response
from rlaif.chat import encode_prompt
from rlaif.errors import ConfigError
from rlaif.records import Quarantine, read_answers
from rlaif.runs import progress
from rlaif.storage import Journal
from rlaif.types import Conversation, content_id

CHUNK = 64
"""Prompts that are sampled together; a kill loses at most so many."""


class Response(NamedTuple):
    """One answer.

    Attributes:
        text: as a judge reads it.
        finished: whether it ended with an EOS; True for a recorded one.
        tokens: its length, the EOS included; None for a recorded one.
        kl: log-probability under the policy less that under its reference, at the sampling temperature (k1), in
            nats; None without a reference.
    """

    text: str
    finished: bool = True
    tokens: int | None = None
    kl: float | None = None


def answer(
    side: Side, prompts: Sequence[Conversation], config: EvaluatePolicyConfig, folder: Path
) -> list[Response | None]:
    """The policy's response to each prompt; None where it is recorded and the file has none.

    Args:
        side: the policy.
        prompts: all different.
        config: of the evaluation.
        folder: where sampled responses are kept.

    Raises:
        DataError: recorded responses cannot be read.
        ModelError: a model cannot be loaded, or its reference has another vocabulary.
    """
    if side.recorded:
        recorded: dict[Conversation, str] = {}
        for given in read_answers(side.source, Quarantine(None), questions=config.dataset):
            recorded.setdefault(given.prompt, given.response)
        return [Response(recorded[prompt]) if prompt in recorded else None for prompt in prompts]
    own = side.reference == side.source
    header = {
        "policy": identity(side),
        "reference": None if own else side.reference,
        "prompts": content_id([[m.content for m in prompt] for prompt in prompts]),
    }
    journal = Journal(folder / f"{side.key}.jsonl")
    kept = _kept(journal, header)
    if len(kept) < len(prompts):
        chunks = _sampled(side, prompts, config, start=len(kept))
        with journal:
            if not kept:
                with suppress(FileNotFoundError):
                    journal.path.unlink()
                journal.append(header)
            with progress(len(prompts), f"sampling {side.name}", done=len(kept)) as bar:
                for chunk in chunks:
                    journal.append({"responses": chunk})
                    kept += chunk
                    bar.advance(len(chunk))
    return [response._replace(kl=0.0) for response in kept] if own else list(kept)


def _kept(journal: Journal, header: dict[str, str | None]) -> list[Response]:
    """Responses of an earlier run of the same policy to the same prompts."""
    records = journal.records()
    if next(records, None) != header:
        return []
    return [Response(*fields) for record in records for fields in record["responses"]]


def _sampled(
    side: Side, prompts: Sequence[Conversation], config: EvaluatePolicyConfig, *, start: int
) -> Iterator[list[Response]]:
    """Load the policy; responses to the prompts from `start` on, chunk by chunk. A chunk's seed is its own."""
    policy, tokenizer = load_policy(side.source, dtype=config.dtype, chat_template=side.chat_template)
    reference = None
    if side.reference is not None and side.reference != side.source:
        reference = load_reference(side.reference, tokenizer, dtype=config.dtype)
    eos_ids = eos_token_ids(policy, tokenizer)
    engine = HFRollout(policy, eos_ids, batch_size=config.generation_batch_size)
    ids = [encode_prompt(tokenizer, prompt, max_length=config.max_prompt_length) for prompt in prompts]
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if context is not None and longest + config.max_new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens {config.max_new_tokens} exceed the context of "
            f"{side.name}, {context}: lower --max_prompt_length or --max_new_tokens"
        )

    def sample(at: int) -> list[Response]:
        chunk = ids[at : at + CHUNK]
        sampled = engine.generate(
            chunk,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=optim.step_seed(config.seed, at),
        )
        kls: Sequence[float | None] = [None] * len(chunk)
        if reference is not None:
            read = sequence_logprobs(
                reference,
                [(chunk[s.prompt_index], s.response_ids) for s in sampled],
                config.temperature,
                config.micro_batch_tokens,
            )
            kls = [sum(s.logprobs) - of_reference for s, of_reference in zip(sampled, read, strict=True)]
        return [
            Response(
                decode_response(tokenizer, chunk[s.prompt_index], s, eos_ids),
                s.finished,
                len(s.response_ids),
                kl,
            )
            for s, kl in zip(sampled, kls, strict=True)
        ]

    return map(sample, range(start, len(ids), CHUNK))

"""`rlaif score`: conversations in a file, rewards of a server out. Resumes; loses nothing; buys nothing twice.

Each answer is journalled as it comes. The output is written at the end, whole, in the order of the input, a row for
each response. A reward that could not be had is null with a reason, and the next run of the same command asks for it
again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from policy_trainer.answers import ask_all, read_journal, same_asker
from policy_trainer.client import RewardClient
from policy_trainer.reward_source import Reward, main_cause, missing_by_reason
from rlaif.errors import DataError, QualityError, StorageError
from rlaif.records import Journal, Quarantine, read_responses, write_parquet
from rlaif.runs import write_atomic
from rlaif.types import Conversation, content_id

if TYPE_CHECKING:
    import pyarrow as pa

    from policy_trainer.config import ScoreConfig

REWARD_COLUMNS = ("reward", "reward_raw", "reward_reason", "reward_tokens", "reward_model")
"""Written beside the columns of the input: normalised, raw, why there is none, tokens read, served version."""
BARS = "▁▂▃▄▅▆▇█"


def run(config: ScoreConfig) -> None:
    """Score `config.dataset` into `config.output` and print a summary.

    Raises:
        DataError: the input cannot be read or has no conversation.
        RewardServerError: the server cannot be reached, or serves another model than an earlier run of this
            output.
        StorageError: the output cannot be written, or exists without its journal.
        QualityError: no conversation at all got a reward, or more than `max_missing` got none.
    """
    journal_path = config.output.with_name(config.output.name + ".journal")
    if config.output.exists() and not journal_path.exists():
        raise StorageError(
            f"{config.output} exists with no {journal_path.name} beside it and may be the work of somebody else; "
            "choose another --output or remove it"
        )
    quarantine = Quarantine(config.output.with_name(config.output.stem + ".quarantine.jsonl"))
    schema = _schema(config) if config.output.suffix == ".parquet" else None
    with Journal(journal_path) as journal:
        kept = read_journal(journal)
        rewards = {key: Reward(*values) for key, values in kept.answers.items()}
        with RewardClient(
            config.reward_server,
            timeout_s=config.timeout_s,
            give_up_after_s=config.give_up_after_s,
            max_in_flight=config.max_in_flight,
            truncation=config.truncation,
        ) as client:
            info = client.wait_ready(config.wait_s)
            same_asker(journal, kept, info, truncation=config.truncation)
            ask_all(
                _missing(config.dataset, rewards),
                client.submit,
                journal,
                rewards,
                batch_size=config.batch_size,
                max_in_flight=config.max_in_flight,
                what="scoring conversations",
            )
    scored = list(_scored_rows(config.dataset, rewards, info.version, quarantine))
    _write(config.output, [row for row, _ in scored], schema)
    given = [reward for _, reward in scored]
    print(summary(given, quarantine))
    print(f"written: {config.output}" + (f"; set aside: {quarantine.path}" if quarantine.count else ""))
    _refuse_if_too_many_missing(given, config)


def _refuse_if_too_many_missing(rewards: Sequence[Reward], config: ScoreConfig) -> None:
    cause = main_cause(rewards)
    missing = sum(reward.value is None for reward in rewards)
    if cause is None or (missing <= config.max_missing * len(rewards) and missing < len(rewards)):
        return
    advice = "the same command again asks for these alone"
    if cause.too_long and config.truncation == "reject":
        advice = "--truncation left, with another --output, drops the oldest tokens of what is too long"
    found = f"{missing} of {len(rewards)} rewards are missing, {cause}; all reasons are in {config.output}"
    raise QualityError(f"{found}; {advice}")


def _missing(dataset: Path, rewards: Mapping[str, Reward]) -> dict[str, Conversation]:
    """The conversations of `dataset` whose ids are not in `rewards`, by id."""
    todo: dict[str, Conversation] = {}
    for _, conversation in read_responses(dataset, Quarantine(None)):
        key = content_id(conversation)
        if key not in rewards:
            todo[key] = conversation
    return todo


def _scored_rows(
    dataset: Path, rewards: dict[str, Reward], version: str, quarantine: Quarantine
) -> Iterator[tuple[dict[str, Any], Reward]]:
    for row, conversation in read_responses(dataset, quarantine):
        reward = rewards[content_id(conversation)]
        columns = (reward.value, reward.raw, reward.reason, reward.tokens, version)
        yield {**row, **dict(zip(REWARD_COLUMNS, columns, strict=True))}, reward


def _write(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema | None) -> None:
    if schema is None:
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_parquet(path, rows, schema)


def _schema(config: ScoreConfig) -> pa.Schema:
    """The columns of the output as Parquet has them, which is known before anything is asked.

    Raises:
        DataError: the rows do not agree on their types.
    """
    import pyarrow as pa

    rows = read_responses(config.dataset, Quarantine(None))
    given = [{name: value for name, value in row.items() if name not in REWARD_COLUMNS} for row, _ in rows]
    try:
        schema = pa.Table.from_pylist(given).schema
    except pa.ArrowException as err:
        raise DataError(
            f"the rows do not share one set of column types ({' '.join(str(err).split())[:120]}); "
            "write --output FILE.jsonl instead"
        ) from err
    types = (pa.float64(), pa.float64(), pa.string(), pa.int64(), pa.string())
    for name, kind in zip(REWARD_COLUMNS, types, strict=True):
        schema = schema.append(pa.field(name, kind))
    return schema


def summary(rewards: Sequence[Reward], quarantine: Quarantine) -> str:
    """What the rewards look like, in at most three lines."""
    values = [reward.value for reward in rewards if reward.value is not None]
    raws = [reward.raw for reward in rewards if reward.raw is not None]
    lines = [f"scored {len(values)} of {len(rewards)} conversations"]
    if values:
        lines[0] += (
            f": reward mean {fmean(values):.3f}, sd {pstdev(values):.3f} (raw mean {fmean(raws):.3f}, "
            f"sd {pstdev(raws):.3f})"
        )
        lines.append(f"{min(values):8.2f} {histogram(values)} {max(values):.2f}")
    cause = main_cause(rewards)
    if cause is not None:
        lines.append(f"missing: {_counts(missing_by_reason(rewards))}; most often: {cause.reason}")
    if quarantine.count:
        lines.append("not understood: " + _counts(quarantine.reasons))
    return "\n".join(lines)


def histogram(values: Sequence[float], bins: int = 24) -> str:
    """Counts over equal bins from the least to the greatest value, one character each; empty bins are spaces."""
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = Counter(min(int((value - low) / width), bins - 1) for value in values)
    top = max(counts.values())
    return "".join(
        BARS[math.ceil(counts[i] / top * len(BARS)) - 1] if counts[i] else " " for i in range(bins)
    )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())

"""`rlaif label status`: how far a labeling run is, while it runs, after it ended, or after it was killed.

It reads the run directory alone and changes nothing: the last heartbeat, the journal, and the report if there is one.
"""

from __future__ import annotations

import json
import shlex
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from labeler.config import StatusConfig
from labeler.heartbeat import is_alive, read_heartbeat
from labeler.journal import ASKED_AGAIN, JOURNAL_FILE, ReplyJournal, Totals
from rlaif.errors import DataError, StorageError
from rlaif.runs import clock, short

State = Literal["running", "finished", "stopped", "killed"]


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a run from outside.

    Attributes:
        state: `killed` means that the process is gone without a word.
        phase: `reading` the dataset, `asking` the models, `writing` the labels; the last one if the run is over.
        done: items passed in this phase by the last start of the command, those on record included.
        total: items of the phase, if known.
        rate: items per second over the last minute of the phase.
        seconds_left: at this rate; None unless the run is asking.
        seconds_since_sign: since the last heartbeat.
        error: what stopped the run.
        replies: replies on record by kind, over all starts of the command.
        prompt_tokens: of these replies; those of `cached_tokens` are among them.
        open_requests: requests without a reply, by reason.
        unlabelled: rows without an answer by reason: of the report if the run finished, else seen so far.
        used: tokens of the last start of the command; cost of all replies where a price is known.
        rerun: the command line that goes on with the run.
        next: what to do now.
    """

    command: str
    state: State
    phase: str
    done: int
    total: int | None
    rate: float | None
    seconds_left: float | None
    seconds_since_sign: float
    pid: int
    host: str
    error: str | None
    replies: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    open_requests: Mapping[str, int]
    unlabelled: Mapping[str, int]
    used: Mapping[str, Any]
    rerun: str
    next: str


def run(config: StatusConfig) -> None:
    """Print the status of a run directory.

    Raises:
        DataError: the directory holds no run of `rlaif sample` or `rlaif label`.
        StorageError: a file of the run cannot be read.
    """
    status = read_status(Path(config.output_dir))
    if config.json:
        print(json.dumps(asdict(status), indent=2, ensure_ascii=False))
        return
    for line in _lines(status, config.output_dir):
        print(line)


def read_status(folder: Path) -> Status:
    """The status of a run directory; safe while the run writes.

    Raises:
        DataError: the directory holds no run of `rlaif sample` or `rlaif label`.
        StorageError: a file of the run cannot be read.
    """
    beat = read_heartbeat(folder)
    if beat is None:
        raise DataError(
            f"{folder} holds no labeling run: give the --output_dir of `rlaif sample` or `rlaif label ...`"
        )
    state = _state(beat)
    asking = beat["phase"] == "asking"
    rate = beat["rate"] if state == "running" else None
    left = (beat["total"] - beat["done"]) / rate if asking and rate and beat["total"] is not None else None
    on_record = _on_record(folder)
    unlabelled = beat["unlabelled"]
    if state == "finished" or (state == "stopped" and beat["phase"] == "writing"):
        unlabelled = _read_json(folder / "report.json").get("unlabelled", unlabelled)
    return Status(
        command=beat["command"],
        state=state,
        phase=beat["phase"],
        done=beat["done"],
        total=beat["total"],
        rate=rate,
        seconds_left=left,
        seconds_since_sign=max(0.0, time.time() - beat["updated"]),
        pid=beat["pid"],
        host=beat["host"],
        error=beat["error"],
        replies=on_record.replies,
        **asdict(on_record.usage),
        open_requests=on_record.failures,
        unlabelled=unlabelled,
        used=beat["stats"],
        rerun=_rerun(folder),
        next=_next(state, beat["error"], beat["command"], unlabelled, folder),
    )


def _state(beat: Mapping[str, Any]) -> State:
    if beat["state"] != "running":
        over: State = beat["state"]
        return over
    if beat["host"] != socket.gethostname():  # its processes cannot be seen from here
        return "running"
    return "running" if is_alive(beat["pid"], beat["process_started"]) else "killed"


def _on_record(folder: Path) -> Totals:
    if not (folder / JOURNAL_FILE).is_file():
        return Totals()
    with ReplyJournal(folder, read_only=True) as journal:
        return journal.totals()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise StorageError(f"{path} cannot be read ({err})") from err
    return content


def _rerun(folder: Path) -> str:
    arguments = _read_json(folder / "run.json").get("command_line", [])
    return shlex.join(["rlaif", *arguments[1:]]) if arguments else ""


def _next(state: State, error: str | None, command: str, unlabelled: Mapping[str, int], folder: Path) -> str:
    if state == "running":
        return "wait; to stop it, interrupt it: what is on record is kept"
    if state == "stopped" and error is not None and "--max_cost" in error:
        return "run the same command again with a larger --max_cost; what is on record is not asked again"
    if state in ("stopped", "killed"):
        return "run the same command again; what is on record is not asked again"
    if unlabelled:
        return f"see {folder / 'unlabelled.jsonl'}, then run the same command again: it {ASKED_AGAIN}"
    if command == "sample":
        return f"rlaif label pairs --dataset {folder} --judge ... --output_dir ..."
    if command == "eval judge":
        return f"read {folder / 'report.md'}"
    if command in ("label scores", "label revise"):
        return f"read {folder / 'README.md'}"
    return f"read {folder / 'validation.md'}; rlaif train rm --dataset {folder}, or rlaif export --dataset {folder}"


def _lines(status: Status, given: str) -> Iterator[str]:
    seen = datetime.fromtimestamp(time.time() - status.seconds_since_sign, UTC)
    sign = f"{seen:%Y-%m-%d %H:%M:%S} UTC, {clock(status.seconds_since_sign)} ago"
    how = {
        "running": f"running ({status.phase}; process {status.pid} on {status.host}, last sign {sign})",
        "finished": f"finished ({sign})",
        "stopped": f"stopped: {status.error} ({sign})",
        "killed": f"killed: process {status.pid} is gone, last sign {sign}",
    }[status.state]
    yield f"rlaif {status.command} in {given}: {how}"
    of = f"{status.done:,}"
    if status.total:
        of += f" of {status.total:,} ({100 * status.done / status.total:.1f} %)"
    if status.state != "finished" and status.phase != "writing":
        yield f"  {status.phase:<14}{of}"
    if status.rate is not None:
        left = "" if status.seconds_left is None else f", {clock(status.seconds_left)} left"
        yield f"  rate          {status.rate:.2f}/s{left}"
    yield f"  replies       {_counts(status.replies) or 'none yet'}"
    cached = f" ({short(status.cached_tokens)} of them cached)" if status.cached_tokens else ""
    yield (
        f"  tokens        {short(status.prompt_tokens)} prompt{cached}, {short(status.completion_tokens)} completion"
    )
    if "cost_usd" in status.used:
        yield f"  cost          ${status.used['cost_usd']:.4f} for all replies on record"
    if status.state == "running" and "waiting" in status.used:
        yield f"  waiting       {status.used['waiting']} requests, sent or not"
    if status.open_requests:
        yield f"  open requests {_counts(status.open_requests)}"
    yield f"  unlabelled    {_counts(status.unlabelled) or 'none'}"
    yield f"  next          {status.next}"
    if status.rerun and status.state != "running":
        yield f"  the command   {status.rerun}"


def _counts(counts: Mapping[str, int], most: int = 5) -> str:
    """A total and its largest parts: `12: 10 context too long, 2 timed out`."""
    parts = sorted(counts.items(), key=lambda item: -item[1])
    if not parts:
        return ""
    told = ", ".join(f"{n:,} {name}" for name, n in parts[:most])
    more = f", {len(parts) - most} more reasons" if len(parts) > most else ""
    return f"{sum(counts.values()):,}: {told}{more}"

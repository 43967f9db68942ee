"""Reading and writing data at file edges: strict, streaming, and nothing lost.

A reader yields the rows it understands and puts each other row, with its line number and one reason, into quarantine.
A file without a single usable row is an error that says what was wrong with the first one.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar, cast

from rlaif import answers, shapes
from rlaif.errors import DataError
from rlaif.fields import RowError
from rlaif.published import subset_of
from rlaif.storage import Journal, storing, write_parquet
from rlaif.types import CandidateSet, Conversation, Pair, PreferenceRow, ScoredRow

__all__ = [
    "Journal",
    "Quarantine",
    "holds_scores",
    "read_answers",
    "read_as",
    "read_candidates",
    "read_conversations",
    "read_labelled",
    "read_pairs",
    "read_preferences",
    "read_prompts",
    "read_questions",
    "read_rankings",
    "read_responses",
    "read_rows",
    "read_scored",
    "write_parquet",
]

T = TypeVar("T")
PREFERENCES_FILE = "preferences.parquet"
"""The data file of a labelled dataset's directory."""

ANSWERS_FILE = "answers.jsonl"
"""The data file of a directory of answers to all turns."""

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
"""Files of a folder that are read as data."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}.*")
"""What the hub adds to the name of a split that it keeps in several files."""


class Quarantine:
    """Rows that could not be used, each with its line number, one reason, and its raw text.

    The file is a function of the input, which every run reads from its start, so each run begins it afresh; it
    exists only if a row was added.

    Attributes:
        path: JSON lines `{line, reason, raw}`, of a folder of files with the row's `file`; None keeps counts only.
        reasons: how many rows each reason sent here.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.reasons: Counter[str] = Counter()
        if self.path is not None:
            with storing(self.path):
                self.path.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Rows in quarantine."""
        return self.reasons.total()

    def add(self, line: int, reason: str, raw: str, file: str = "") -> None:
        """Put one row aside. `line` counts from 1 in the file it came from.

        Raises:
            StorageError: the quarantine file cannot be written.
        """
        self.reasons[reason] += 1
        if self.path is None:
            return
        text = json.dumps({**({"file": file} if file else {}), "line": line, "reason": reason, "raw": raw})
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as opened:
                opened.write(text + "\n")


class _Line(NamedTuple):
    number: int
    raw: str | None  # made of the row when it is wanted
    row: dict[str, Any] | None
    reason: str = ""
    file: str = ""  # where a folder holds several


def read_rows(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a dataset.

    A dataset is a file of JSON lines, CSV with a header or Parquet, a JSON array, a BIG-bench task (an object with
    `examples`), any but Parquet also gzipped; a labelled dataset's directory; or several files, by a folder or a
    pattern (`*`, `?`, `**`), whose paths are the `subset` of rows that do not name one themselves.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(
        path, quarantine, lambda number, row: (number, row), "JSON objects, one per line, CSV or Parquet"
    )


def read_as(
    path: str | os.PathLike[str],
    quarantine: Quarantine,
    parse: Callable[[dict[str, Any]], T],
    understood: str,
) -> Iterator[T]:
    """What `parse` makes of each row; for readers that refuse more than a row's shape.

    Args:
        path: of the file or folder.
        quarantine: takes the rows that cannot be used.
        parse: raises `RowError` or `DataError` for such a row.
        understood: the shapes that `parse` knows, for the message.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: parse(row), understood)


def read_prompts(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[Conversation]:
    """Prompts in any of `shapes.PROMPT_SHAPES`; each ends with a user turn.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: shapes.parse_prompt(row), shapes.PROMPT_SHAPES)


def read_candidates(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[CandidateSet]:
    """Candidate sets in any of `shapes.CANDIDATE_SHAPES`.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: shapes.parse_candidates(row), shapes.CANDIDATE_SHAPES)


def read_pairs(
    path: str | os.PathLike[str], quarantine: Quarantine, *, whole_exchanges: bool = False
) -> Iterator[Pair]:
    """Pairs in any of `shapes.PAIR_SHAPES`, with their human labels where the rows carry them.

    Args:
        path: of the dataset.
        quarantine: takes the rows that cannot be read.
        whole_exchanges: see `shapes.parse_pair`.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    rows = _read(
        path,
        quarantine,
        lambda _, row: shapes.parse_pairs(row, whole_exchanges=whole_exchanges),
        shapes.PAIR_SHAPES,
    )
    return chain.from_iterable(rows)


def read_preferences(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[PreferenceRow]:
    """Labelled pairs from a labelled dataset's directory or from a file in any of `shapes.PAIR_SHAPES`.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    rows = _read(path, quarantine, lambda _, row: shapes.parse_preferences(row), shapes.PAIR_SHAPES)
    return chain.from_iterable(rows)


def read_labelled(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[PreferenceRow | Pair]:
    """Pairs in any of `shapes.PAIR_SHAPES`: with their label where the row has one, and else the pair alone.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: shapes.parse_labelled(row), shapes.PAIR_SHAPES)


def read_rankings(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[CandidateSet]:
    """Responses to one prompt each: of a `rankings.parquet`, with their strengths as scores, or candidates.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """

    def parse(_: int, row: dict[str, Any]) -> CandidateSet:
        return (shapes.parse_candidates if row.get("ranking") is None else shapes.parse_ranking)(row)

    return _read(path, quarantine, parse, shapes.CANDIDATE_SHAPES)


def read_scored(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[ScoredRow]:
    """Scored responses from a score dataset's directory or from a file in any of `shapes.SCORED_SHAPES`.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: shapes.parse_scored(row), shapes.SCORED_SHAPES)


def holds_scores(path: str | os.PathLike[str]) -> bool:
    """Whether the first readable row of a dataset is a scored response rather than a pair.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    for _, row in read_rows(path, Quarantine(None)):
        return row.get("score") is not None and not shapes.holds_pair(row)
    return False


def read_conversations(
    path: str | os.PathLike[str], quarantine: Quarantine
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """(raw row, conversation that ends with an assistant turn), in any of `shapes.CONVERSATION_SHAPES`.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(
        path, quarantine, lambda _, row: (row, shapes.parse_conversation(row)), shapes.CONVERSATION_SHAPES
    )


def read_responses(
    path: str | os.PathLike[str], quarantine: Quarantine
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """As `read_conversations`; a row of candidates comes once for each response (`shapes.one_response_each`).

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """

    def parse(_: int, row: dict[str, Any]) -> list[tuple[dict[str, Any], Conversation]]:
        return [(one, shapes.parse_conversation(one)) for one in shapes.one_response_each(row)]

    understood = f"{shapes.CONVERSATION_SHAPES}; or {shapes.CANDIDATE_SHAPES}"
    return chain.from_iterable(_read(path, quarantine, parse, understood))


def read_questions(path: str | os.PathLike[str], quarantine: Quarantine) -> Iterator[answers.Question]:
    """A benchmark's questions: prompts in any of `shapes.PROMPT_SHAPES`, with all turns and what rows say of them.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row.
    """
    return _read(path, quarantine, lambda _, row: answers.parse_question(row), shapes.PROMPT_SHAPES)


def read_answers(
    path: str | os.PathLike[str],
    quarantine: Quarantine,
    questions: str | os.PathLike[str] | None = None,
    references: str | os.PathLike[str] | None = None,
) -> Iterator[answers.Answer]:
    """Every response of a file in any of `answers.ANSWER_SHAPES`, with its prompt.

    Args:
        path: of the answers.
        quarantine: takes the rows that cannot be read.
        questions: of the file of questions, for answers that name them by number, or to say more of them.
        references: of right answers to them, as FastChat's `reference_answer` files have them.

    Raises:
        DataError: a file is missing, unreadable, or has no usable row.
    """
    asked: Iterable[answers.Question] = (
        () if questions is None else read_questions(questions, Quarantine(None))
    )
    if references is not None:
        shape = "question_id with choices [{turns}] (FastChat)"
        right = dict(_read(references, Quarantine(None), lambda _, row: answers.parse_references(row), shape))
        asked = (q._replace(references=right.get(q.id, q.references)) for q in asked)
    known = answers.Questions(asked)
    rows = _read(path, quarantine, lambda _, row: answers.parse_answers(row, known), answers.ANSWER_SHAPES)
    return chain.from_iterable(rows)


def _read(
    path: str | os.PathLike[str],
    quarantine: Quarantine,
    parse: Callable[[int, dict[str, Any]], T],
    understood: str,
) -> Iterator[T]:
    usable = 0
    first: tuple[int, str] | None = None
    for line in _lines(Path(path)):
        reason = line.reason
        if line.row is not None:
            try:
                item = parse(line.number, line.row)
            except (RowError, DataError) as err:
                reason = str(err)
            else:
                usable += 1
                yield item
                continue
        first = first or (line.number, reason)
        raw = json.dumps(line.row, default=str) if line.raw is None else line.raw
        quarantine.add(line.number, reason, raw, line.file)
    if usable:
        return
    if first is None:
        raise DataError(f"{path} has no rows; understood are {understood}")
    raise DataError(f"{path} has no usable row; line {first[0]}: {first[1]}. Understood are {understood}")


def _lines(path: Path) -> Iterator[_Line]:
    folder, files = _matching(path) if _is_pattern(path) else (path, [path])
    if path.is_dir():
        files = _data_files(path)
    names = _subset_names(folder, files) if len(files) > 1 else [""]
    for file, name in zip(files, names, strict=True):
        for line in _file_lines(file):
            if name and line.row is not None and not subset_of(line.row):
                line = line._replace(row={**line.row, "subset": name})
            yield line._replace(file=str(file.relative_to(folder))) if name else line


def _is_pattern(path: Path) -> bool:
    return any(sign in str(path) for sign in "*?[") and not path.exists()


def _matching(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder that all matches of a pattern are in, and the matches."""
    fixed = list(takewhile(lambda part: not _is_pattern(Path(part)), pattern.parts))
    folder = Path(*fixed)
    files = sorted(file for file in folder.glob("/".join(pattern.parts[len(fixed) :])) if file.is_file())
    if not files:
        raise DataError(f"no file matches {pattern}; check the pattern")
    return folder, files


def _file_lines(path: Path) -> Iterator[_Line]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_lines(path)
            return
        with _open(path) as file:
            if ".csv" in path.suffixes[-2:]:
                yield from _csv_lines(path, file)
            else:
                yield from _json_lines(path, file)
    except (OSError, EOFError, zlib.error) as err:
        what = "does not exist" if isinstance(err, FileNotFoundError) else _plainly(err)
        raise DataError(f"cannot read {path}: {what}; check the path") from err


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _plainly(err: Exception) -> str:
    return (getattr(err, "strerror", None) or str(err)).lower()


def _data_files(folder: Path) -> list[Path]:
    """The preferences of a labelled dataset, answers to all turns, the only Parquet file, or all data files below."""
    for name in (PREFERENCES_FILE, ANSWERS_FILE):
        if (folder / name).is_file():
            return [folder / name]
    parquet = sorted(folder.glob("*.parquet"))
    if len(parquet) == 1:
        return parquet
    if not (folder / "run.json").exists():  # what a run leaves besides its dataset is no data
        if runs := sorted(path.parent.name for path in folder.glob("*/run.json")):
            raise DataError(f"{folder} holds runs, name one of those: {', '.join(runs)}")
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.name.endswith(DATA_SUFFIXES)
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        )
        if files:
            return files
    found = f"{len(parquet)} Parquet files" if parquet else "no Parquet file and no other data"
    raise DataError(
        f"{folder} holds {found}; name the file to read (a labelled dataset has {PREFERENCES_FILE})"
    )


def _subset_names(folder: Path, files: list[Path]) -> list[str]:
    """What tells the files of a folder apart: their paths, without a name that all of them have; shards are one."""
    stems = [_SHARD.sub("", file.name[: file.name.index(".")]) for file in files]
    places = [file.parent.relative_to(folder).as_posix() for file in files]
    if len(set(stems)) == 1 and len(set(places)) == len(files):
        return places
    return [stem if place == "." else f"{place}/{stem}" for place, stem in zip(places, stems, strict=True)]


def _parquet_lines(path: Path) -> Iterator[_Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            # Group by group: one iterator over all of them keeps the buffers of those it has passed.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield _Line(number, None, row)
    except pa.ArrowInvalid as err:
        raise DataError(f"{path} is not a readable Parquet file: {' '.join(str(err).split())[:200]}") from err


def _csv_lines(path: Path, file: IO[bytes]) -> Iterator[_Line]:
    """Rows of a CSV file with a header; the number is that of a row's last line."""
    csv.field_size_limit(sys.maxsize)  # responses are longer than the module expects of a field
    try:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        for row in reader:
            too_many = row.pop(None, None)
            if too_many is None:
                yield _Line(reader.line_num, None, row)
            else:
                yield _Line(reader.line_num, json.dumps(row), None, "more cells than the header has")
    except (csv.Error, UnicodeDecodeError) as err:
        raise DataError(f"{path} is not a readable CSV file: {err}") from err


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[_Line]:
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if start.startswith(b"[") or start.partition(b"\n")[0].strip() == b"{":
        yield from _whole_file(path, file.read())
        return
    for number, data in enumerate(file, 1):
        if data.strip():
            line = _json_line(number, data)
            yield from _examples(line) or (line,)


def _json_line(number: int, data: bytes) -> _Line:
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as err:
        return _Line(number, data.decode(errors="replace"), None, f"not UTF-8 text (byte {err.start + 1})")
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as err:
        return _Line(number, text, None, f"broken JSON: {err.msg.removesuffix(' at')} at column {err.colno}")
    except ValueError as err:
        return _Line(number, text, None, f"broken JSON: {err}")
    except RecursionError:
        return _Line(number, text, None, "broken JSON: nested too deeply")
    if not isinstance(row, dict):
        return _Line(number, text, None, "not a JSON object")
    return _Line(number, text, row)


def _whole_file(path: Path, data: bytes) -> Iterator[_Line]:
    """Rows of a JSON array, or of one object written over several lines; their numbers count from 1.

    NaN is a missing value there: so pandas writes one, and PandaLM's test set is published.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_nan_is_missing)
    except (ValueError, RecursionError) as err:
        what = "array" if data.lstrip().startswith(b"[") else "object"
        raise DataError(f"{path} begins like a JSON {what} but is broken: {err}") from err
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        raw = json.dumps(row)
        if isinstance(row, dict):
            line = _Line(number, raw, row)
            yield from _examples(line) or (line,)
        else:
            yield _Line(number, raw, None, "not a JSON object")


def _examples(line: _Line) -> list[_Line]:
    """The rows of a BIG-bench task: an object with `metrics` and `examples`. Empty for anything else."""
    listed = None if line.row is None or "metrics" not in line.row else line.row.get("examples")
    if not isinstance(listed, list) or not all(isinstance(row, dict) and "input" in row for row in listed):
        return []
    return [_Line(number, None, row) for number, row in enumerate(listed, 1)]


def _nan_is_missing(name: str) -> None:
    if name != "NaN":
        _refuse_constant(name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

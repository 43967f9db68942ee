"""`rlaif export`: labelled pairs -> the shape that a trainer reads, in files, on the hub, or both."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from labeler.card import read_source
from labeler.export.card import export_card
from labeler.export.config import SUFFIXES, ExportConfig
from labeler.export.hub import check_login, push
from labeler.export.shapes import (
    SCHEMAS,
    as_known_columns,
    is_held_out,
    reason_to_drop,
    shape,
    with_extra_as_json,
)
from labeler.outputs import print_summary
from labeler.row_files import RowFile, open_rows
from labeler.validation import Validation, write_validation
from rlaif.errors import DataError
from rlaif.records import PREFERENCES_FILE, Quarantine, read_preferences
from rlaif.runs import progress
from rlaif.storage import write_atomic

_ON_THE_HUB = tuple(f"{split}{suffix}" for split in ("train", "test") for suffix in SUFFIXES)
"""Data files of an earlier export; one with other splits must not leave held-out rows beside training rows."""


@dataclass(slots=True)
class Exported:
    """What came out: data files by split, and counts."""

    files: dict[str, Path] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    read: int = 0
    suspicious: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """For people."""
        return {
            "pairs": self.read,
            "rows_written": dict(self.rows),
            "dropped": dict(self.dropped.most_common()),
            "quarantined": dict(self.quarantined),
            "suspicious": self.suspicious,
        }


def run(config: ExportConfig) -> None:
    """Write the files, push them where asked, print the summary.

    Raises:
        ConfigError: the hub does not know the user, or the repository cannot be.
        DataError: the dataset is missing, has no labelled pair, or nothing is left of it.
        EndpointError: the hub cannot be reached.
        StorageError: the output cannot be written.
    """
    if config.push_to_hub is not None:
        check_login(config.push_to_hub)
    with ExitStack() as stack:
        if config.output_file is not None:
            target = Path(config.output_file)
        else:
            target = Path(stack.enter_context(TemporaryDirectory(prefix="rlaif-"))) / f"data{config.suffix}"
        source = read_source(Path(config.dataset)) if Path(config.dataset).is_dir() else None
        done = export(config, target)
        where = ", ".join(str(path) for path in done.files.values())
        names = {split: path.name for split, path in done.files.items()}
        report = target.with_name(f"{target.stem}-report")
        write_atomic(report / "README.md", export_card(config, source, names, done.facts(), None))
        if config.push_to_hub is not None:
            names = {split: f"{split}{config.suffix}" for split in done.files}
            card = stack.enter_context(TemporaryDirectory(prefix="rlaif-")) + "/README.md"
            write_atomic(card, export_card(config, source, names, done.facts(), config.push_to_hub))
            where = push(
                config.push_to_hub,
                {"README.md": Path(card), **{names[split]: path for split, path in done.files.items()}},
                config.commit_message,
                replaces=_ON_THE_HUB,
                private=config.private,
            )
    print_summary(f"{config.format} -> {where}", done.facts())


def export(config: ExportConfig, target: Path) -> Exported:
    """Write the data files, and beside them `NAME-report/`: what is suspicious, what could not be read.

    One pass, in constant memory.

    Args:
        config: what to keep, and in which shape.
        target: the data file; with a held-out split `NAME-train` and `NAME-test` stand for it, the names by which
            `datasets.load_dataset` knows them.

    Raises:
        DataError: the dataset is missing, has no labelled pair, or a file would have no rows.
        StorageError: the output cannot be written.
    """
    splits = ("train", "test") if config.split else ("train",)
    paths = {
        split: target.with_stem(f"{target.stem}-{split}") if config.split else target for split in splits
    }
    done = Exported(files=paths)
    report = target.with_name(f"{target.stem}-report")
    quarantine = Quarantine(report / "quarantine.jsonl")
    schema, to_text = _schema(config)
    with Validation() as validation, ExitStack() as stack, progress(None, "exporting") as bar:
        files = {split: stack.enter_context(open_rows(path, schema)) for split, path in paths.items()}
        for row in read_preferences(config.dataset, quarantine):
            bar.advance(1)
            done.read += 1
            reason = reason_to_drop(row, config.min_margin, config.ties)
            shaped = reason if reason is not None else shape(row, config.format)
            if isinstance(shaped, str):
                done.dropped[shaped] += 1
                continue
            validation.add(as_known_columns(row))
            file = files["test" if is_held_out(row.prompt, config.split) else "train"]
            for out in shaped:
                file.write(with_extra_as_json(out) if to_text else out)
        _check_not_empty(files, done)
        done.rows = {split: file.rows for split, file in files.items()}
        done.suspicious = validation.suspicious
        write_validation(report, validation)
    done.quarantined = quarantine.reasons
    return done


def _schema(config: ExportConfig) -> tuple[pa.Schema, bool]:
    """Columns of Parquet files, and whether further columns become JSON text."""
    if config.format.startswith("trl-") or config.suffix == ".jsonl":
        return SCHEMAS["parquet" if config.format == "jsonl" else config.format], False
    given = Path(config.dataset)
    given = given / PREFERENCES_FILE if given.is_dir() else given
    if given.suffix != ".parquet" or not given.is_file():
        return SCHEMAS["parquet"], True
    first = next(read_preferences(config.dataset, Quarantine(None)))
    source = pq.read_schema(given)
    own = [f for f in SCHEMAS["parquet"] if f.name != "extra"]
    return pa.schema([*own, *(source.field(name) for name in source.names if name in first.extra)]), False


def _check_not_empty(files: dict[str, RowFile], done: Exported) -> None:
    if any(file.rows for file in files.values()):
        for split, file in files.items():
            if not file.rows:
                what = "raise --split" if split == "test" else "lower --split"
                raise DataError(f"no prompt falls into the {split} split: {what}, or export more rows")
        return
    why = ", ".join(f"{n} {reason}" for reason, n in done.dropped.most_common())
    raise DataError(f"nothing is left of {done.read} labelled pairs ({why}): lower --min_margin")

"""Dataset cards: what a labelled dataset is, what its labels are worth, how it was made, and how to load it.

A card is made of what the run directory says of itself (`run.json`, `report.json`, the rubrics' texts), so an export
can make its own from the same facts.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from labeler import columns
from labeler.rubric import Rubric, rubric_path
from rlaif.errors import DataError
from rlaif.runs import clock, short
from rlaif.storage import write_atomic

RUBRICS = "rubrics"
"""Folder of a run directory with the texts of its rubrics, named by their hashes."""

Facts = Mapping[str, Any]


class DataFile(NamedTuple):
    """A data file of a dataset, and the configuration and split that `load_dataset` knows it by."""

    path: str
    config: str = "default"
    split: str = "train"


class Kind(NamedTuple):
    """What a command writes.

    Attributes:
        title: of the card; `{who}` stands for the judge or the policies.
        intro: what the dataset is.
        files: its data files.
        columns: what the columns of each configuration mean.
        tags: beside `rlaif`.
        rows: the name in the report of the number of rows.
    """

    title: str
    intro: str
    files: tuple[DataFile, ...]
    columns: Mapping[str, Mapping[str, str]]
    tags: tuple[str, ...]
    rows: str


_PREFERENCES = (
    "Pairs of responses with *soft* labels: the probability that an AI judge prefers one to the other (RLAIF, "
    "[arXiv 2309.00267](https://arxiv.org/abs/2309.00267)). Written by `rlaif label`, in TRL's conversational "
    "preference format with more columns."
)
KINDS: Mapping[str, Kind] = {
    "sample": Kind(
        "Responses of {who}",
        "Several responses to each prompt, sampled by `rlaif sample`. Each is a function of its recorded seed.",
        (DataFile("candidates.parquet"),),
        {"default": columns.CANDIDATES},
        ("synthetic",),
        "prompts",
    ),
    "label pairs": Kind(
        "Preferences of {who}",
        _PREFERENCES,
        (DataFile("preferences.parquet"),),
        {"default": columns.PREFERENCES},
        ("preference", "synthetic", "dpo", "reward-model"),
        "rows_written",
    ),
    "label rank": Kind(
        "Rankings and preferences of {who}",
        _PREFERENCES
        + " The configuration `rankings` orders all responses to a prompt by the Bradley-Terry strengths "
        "that these labels give them.",
        (DataFile("preferences.parquet"), DataFile("rankings.parquet", "rankings")),
        {"default": columns.PREFERENCES, "rankings": columns.RANKINGS},
        ("preference", "ranking", "synthetic", "dpo", "reward-model"),
        "rows_written",
    ),
    "label scores": Kind(
        "Scores of {who}",
        "Responses scored by an AI judge: the expectation over the probabilities of the score tokens (direct RLAIF, "
        "[arXiv 2309.00267](https://arxiv.org/abs/2309.00267), section 2.2.2). Written by `rlaif label scores`.",
        (DataFile("scores.parquet"),),
        {"default": columns.SCORES},
        ("scores", "synthetic", "reward-model"),
        "scored",
    ),
    "label revise": Kind(
        "Revisions by {who}",
        "Responses criticised by a principle and revised, round by round (Constitutional AI, "
        "[arXiv 2212.08073](https://arxiv.org/abs/2212.08073), section 3). Written by `rlaif label revise`, in TRL's "
        "conversational prompt-completion format for supervised fine-tuning.",
        (DataFile("revisions.parquet"),),
        {"default": columns.REVISIONS},
        ("synthetic", "sft"),
        "rows_written",
    ),
}
"""By command. What is not here has no card of its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a run directory says of itself.

    Attributes:
        command: what was run, a key of `KINDS`.
        config: its settings.
        report: what came out.
        versions: of the libraries.
        revision: of this project's code, if known.
        rubrics: texts by hash.
    """

    command: str
    config: Facts
    report: Facts
    versions: Mapping[str, str]
    revision: str | None = None
    rubrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """The judge, or the policies."""
        names = self.config.get("judge") or self.config.get("model_name_or_path") or ()
        return str(self.report.get("judge") or (names if isinstance(names, str) else ", ".join(names)))


def keep_rubric(folder: Path, name_or_path: str, rubric: Rubric) -> None:
    """Copy a rubric's text into the run directory, so that its labels can always be understood.

    Raises:
        ConfigError: the rubric's file is gone.
        StorageError: the directory cannot be written.
    """
    write_atomic(folder / RUBRICS / f"{rubric.hash}.yaml", rubric_path(name_or_path).read_bytes())


def read_source(folder: Path) -> Source | None:
    """What a finished run's directory says of itself; None for another folder.

    Raises:
        DataError: its files are broken.
    """
    if not all((folder / name).is_file() for name in ("run.json", "report.json")):
        return None
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        texts = {
            path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / RUBRICS).glob("*.yaml"))
        }
    except (OSError, ValueError) as err:
        raise DataError(f"{folder} holds a broken run: {err}; run its command again") from err
    if run.get("command") not in KINDS:
        return None
    used = set((report.get("rubrics") or {}).values())
    return Source(
        run["command"],
        run["config"],
        report,
        run["versions"],
        run.get("git_revision"),
        {key: text for key, text in texts.items() if key in used},
    )


def write_card(folder: Path) -> None:
    """Write `README.md`, the dataset card of a run whose report is written.

    Raises:
        DataError: the directory does not say what was run.
        StorageError: it cannot be written.
    """
    source = read_source(folder)
    if source is None:
        raise DataError(f"{folder} has no run.json and report.json to make a card of")
    kind = KINDS[source.command]
    title = kind.title.format(who=source.who)
    parts = [
        header(title, kind.files, kind.tags, source.report.get(kind.rows)),
        f"# {title}\n\n{kind.intro}",
        *facts_parts(source),
        how_to_load(kind.files, folder.name, "DPOTrainer" if "preference" in kind.tags else None),
        how_to_export(folder.name) if "preference" in kind.tags else "",
        *(column_table(meaning, name) for name, meaning in kind.columns.items()),
        *origin_parts(source),
    ]
    write_atomic(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


# ---- parts ----


def header(title: str, files: Sequence[DataFile], tags: Sequence[str], rows: int | None) -> str:
    """The YAML header: what `load_dataset` and the hub read. A license is the user's to choose."""
    configs: dict[str, list[dict[str, str]]] = {}
    for file in files:
        configs.setdefault(file.config, []).append({"split": file.split, "path": file.path})
    fields: dict[str, Any] = {
        "pretty_name": title,
        "configs": [{"config_name": name, "data_files": paths} for name, paths in configs.items()],
        "tags": ["rlaif", *tags],
    }
    if rows is not None:
        fields["size_categories"] = [size_category(rows)]
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def size_category(rows: int) -> str:
    """The hub's category of a dataset's size, such as `1K<n<10K`."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, name in enumerate(names):
        if rows < 10 ** (power + 3):
            return f"n<{name}" if power == 0 else f"{names[power - 1]}<n<{name}"
    return "n>1T"


def facts_parts(source: Source) -> Iterator[str]:
    """What the labels are worth, and how many there are."""
    report = source.report
    if source.command in ("label pairs", "label rank"):
        yield "## What the labels are worth\n\n" + table(_worth(report))
        if "human_agreement" not in report:
            yield (
                "The input had no labels of people, so agreement is not known. `rlaif eval judge` measures it, with "
                "calibration and biases, on any file that has some."
            )
        yield "## What is in it\n\n" + table(_content(report))
    elif source.command == "label scores":
        yield "## What is in it\n\n" + table(_scores(report))
    else:
        yield "## What is in it\n\n" + table(_responses(report))
    if board := report.get("leaderboard"):
        yield "## Leaderboard\n\n" + _leaderboard(board)


def _worth(report: Facts) -> Iterator[tuple[str, str | None]]:
    if "human_agreement" in report:
        pairs = f"on {report['human_pairs']:,} pairs"
        interval = _interval(report["human_agreement_95"], _percent)
        yield "agreement with people", f"{_percent(report['human_agreement'])} {interval} {pairs}"
        interval = _interval(report["human_kappa_95"], _decimal)
        yield "Cohen's kappa (agreement beyond chance)", f"{_decimal(report['human_kappa'])} {interval}"
    yield "both orders prefer the same response", _percent(report.get("order_agreement"))
    locked = _percent(report.get("same_position_rate"))
    if locked is not None and report.get("first_share") is not None:
        locked += f" (the first one in {_percent(report['first_share'])} of these)"
    yield "both orders prefer the same position", locked
    yield "the longer response is preferred", _percent(report.get("longer_preferred_share"))
    yield "label mass", _mass(report)
    yield "labels from", _counts(report.get("sources"))
    yield "ruled by a guard, without asking", _counts(report.get("guarded"))
    yield "censored judgments", _count(report.get("censored"))
    yield "cut rationales", _count(report.get("truncated"))
    yield "votes missing from the jury", _count(report.get("missing_votes"))
    if report.get("suspicious") is not None:
        yield (
            "rows with something to look at",
            f"{report['suspicious']:,} (`validation.md` lists the worst first)",
        )


def _content(report: Facts) -> Iterator[tuple[str, str | None]]:
    yield "rows", _count(report.get("rows_written"), zero=True)
    yield "rankings", _count(report.get("rankings_written"))
    yield "pairs judged", _count(report.get("pairs"), zero=True)
    yield "ties (label 1/2)", _count(report.get("ties"))
    yield "labelled, and left out", _counts(report.get("dropped"))
    yield "pairs without a label", _counts(report.get("unlabelled"))
    yield "input rows that could not be read", _counts(report.get("quarantined"))


def _scores(report: Facts) -> Iterator[tuple[str, str | None]]:
    yield "responses scored", _count(report.get("scored"), zero=True)
    yield "mean score", _decimal(report.get("score_mean"))
    if report.get("score_quartiles"):
        yield "quartiles", ", ".join(f"{q:.2f}" for q in report["score_quartiles"])
    yield "label mass", _mass(report)
    yield "scores from", _counts(report.get("sources"))
    yield "censored", _count(report.get("censored"))
    yield "cut rationales", _count(report.get("truncated"))
    yield "responses without a score", _counts(report.get("unlabelled"))
    yield "input rows that could not be read", _counts(report.get("quarantined"))


def _responses(report: Facts) -> Iterator[tuple[str, str | None]]:
    yield "prompts", _count(report.get("prompts"), zero=True)
    yield "prompts without a response", _count(report.get("prompts_unanswered"))
    yield "responses", _count(report.get("responses"), zero=True)
    yield "revised", _count(report.get("revised"), zero=True)
    yield "unchanged by the revision", _count(report.get("unchanged"))
    yield "rows", _count(report.get("rows_written"), zero=True)
    yield "mean length before, characters", _decimal(report.get("initial_chars_mean"))
    yield "mean length after, characters", _decimal(report.get("revision_chars_mean"))
    yield "cut critiques", _count(report.get("critiques_cut"))
    yield "ended by", _counts(report.get("finish_reason"))
    yield "responses that could not be had", _counts(report.get("unlabelled"))
    yield "input rows that could not be read", _counts(report.get("quarantined"))


def _leaderboard(board: Sequence[Facts]) -> str:
    lines = ["| | model | Elo | 95 % | wins | comparisons |", "| ---: | --- | ---: | --- | ---: | ---: |"]
    for place, s in enumerate(board, 1):
        low, high = s["elo_95"]
        lines.append(
            f"| {place} | {_cell(s['name'])} | {s['elo']:.0f} | {low:.0f} to {high:.0f} | "
            f"{_percent(s['win_rate'])} | {s['comparisons']:,} |"
        )
    return "\n".join(lines)


def how_to_load(files: Sequence[DataFile], place: str | None, trainer: str | None = None) -> str:
    """Code that loads the dataset, and what reads which of its columns.

    Args:
        files: its data files.
        place: the folder or the repository on the hub; None for files without one.
        trainer: TRL's trainer that reads it, if one does.
    """
    lines = ["## How to use it", "", "```python", "from datasets import load_dataset"]
    if trainer is not None:
        lines.append(f"from trl import {trainer}")
    lines.append("")
    for file in files:
        name = file.split if file.split != "train" else "dataset" if file.config == "default" else file.config
        if place is None:
            how = "parquet" if file.path.endswith(".parquet") else "json"
            lines.append(f'{name} = load_dataset("{how}", data_files="{file.path}", split="train")')
        else:
            config = "" if file.config == "default" else f', "{file.config}"'
            lines.append(f'{name} = load_dataset("{place}"{config}, split="{file.split}")')
    if trainer is not None:
        given = "model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer"
        lines += ["", f"{trainer}({given}).train()"]
    lines.append("```")
    if trainer is not None:
        lines += ["", WHAT_TRL_READS]
    if trainer is not None and trainer != "KTOTrainer":
        lines += ["", _WHAT_RLAIF_READS, "", "```bash", *_training(place or files[0].path), "```"]
    return "\n".join(lines)


def how_to_export(place: str) -> str:
    """The command that makes of labels what other trainers read."""
    return (
        "For other trainers, or the hub, with held-out prompts or the sure pairs alone (`rlaif export --help`):"
        f"\n\n```bash\nrlaif export --dataset {shlex.quote(place)} --format trl-preference "
        "--output_file preferences.parquet\n```"
    )


def _training(data: str) -> Iterator[str]:
    """Commands from the labels to a policy."""
    if "/" in data:  # a repository
        folder = data.rpartition("/")[2]
        yield f"hf download {data} --repo-type dataset --local-dir {folder}"
        data = folder
    data = shlex.quote(data)
    yield f"rlaif train rm --model_name_or_path MODEL --dataset {data} --output_dir rm"
    yield "rlaif serve --model rm --port 50051"
    for method in ("dpo", "ppo"):
        yield (
            f"rlaif train {method} --model_name_or_path MODEL --dataset {data} --reward_server 127.0.0.1:50051 "
            f"--output_dir {method}"
        )


_WHAT_RLAIF_READS = """`rlaif train rm` learns a reward model from the soft label, `chosen_prob`. `rlaif train dpo` \
and `rlaif train ppo` are online: they take the prompts alone, sample responses to them, and learn from what a reward \
server says of these. DPO on the pairs as they are is TRL's."""

WHAT_TRL_READS = """TRL reads the columns as they are, and part of the label. Its `RewardTrainer` subtracts `margin`, \
where there is one, from the difference of rewards. Its `DPOTrainer` takes the chosen response as the better one, \
however sure the label is: `label_smoothing` is one number for all rows. Its `KTOTrainer` reads `label`. None of them \
reads the soft label itself."""


def column_table(meaning: Mapping[str, str], config: str = "default") -> str:
    """What the columns mean."""
    title = "Columns" if config == "default" else f"Columns of `{config}`"
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in meaning.items())
    return f"## {title}\n\n| column | meaning |\n| --- | --- |\n{rows}"


def origin_parts(source: Source) -> Iterator[str]:
    """How the dataset was made: who, by which recipe, at which cost; and the rubrics, word by word."""
    yield "## How it was made\n\n" + table(_origin(source))
    names = {key: name for name, key in (source.report.get("rubrics") or {}).items()}
    for key, text in source.rubrics.items():
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
        yield f"## Rubric {names.get(key, '')} ({key})\n\n{fence}yaml\n{text.rstrip()}\n{fence}"
    yield (
        "What a machine says comes with its biases. Before publishing, add a `license` to the header of this card: "
        "it depends on the prompts, on the models that wrote the responses, and on the terms of the judge."
    )


_RECIPE = (
    ("num_exemplars", "exemplars shown"),
    ("preamble", "preamble"),
    ("orders", "orders asked"),
    ("combine", "orders combined by"),
    ("num_rationales", "rationales per question"),
    ("rationale_temperature", "temperature of rationales"),
    ("max_rationale_tokens", "longest rationale, tokens"),
    ("fallback", "without log-probabilities"),
    ("jury", "votes combined by"),
    ("quorum", "quorum"),
    ("calibration", "calibrated with"),
    ("clamp", "clamped to"),
    ("on_inconsistent", "pairs whose orders disagree"),
    ("ties", "ties"),
    ("pairs_per_prompt", "pairs per prompt (0: all)"),
    ("num_revisions", "rounds"),
    ("num_return_sequences", "responses per prompt"),
    ("temperature", "temperature"),
    ("max_new_tokens", "longest response, tokens"),
    ("seed", "seed"),
)
"""Settings that decide the result, by their names on the command line."""


def _origin(source: Source) -> Iterator[tuple[str, str | None]]:
    config, report = source.config, source.report
    yield ("judge" if "judge" in config else "policy"), _cell(source.who)
    rubrics = report.get("rubrics") or {}
    yield "rubric", ", ".join(f"{_cell(name)} ({key})" for name, key in rubrics.items()) or None
    yield "input", _cell(Path(str(config.get("dataset", ""))).name) or None
    if "cot" in config:
        yield "rationale before the label", "yes" if config["cot"] else "no"
    several = len(config.get("judge") or ()) > 1
    for name, told in _RECIPE:
        value = config.get(name)
        beside_the_point = (
            value is None
            or (name == "jury" and not several)
            or (
                name in ("max_rationale_tokens", "rationale_temperature", "num_rationales")
                and not config.get("cot")
            )
        )
        if not beside_the_point:
            shown = Path(str(value)).name if name == "calibration" else value
            yield told, _cell(" to ".join(map(str, shown)) if isinstance(shown, list) else str(shown))
    yield "tokens", _tokens(report)
    if report.get("cost_usd") is not None:
        yield "cost", f"{report['cost_usd']:.2f} USD"
    yield "time of the last run", clock(report["seconds"]) if "seconds" in report else None
    made_by = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    yield "made with", made_by + (f" (revision {source.revision[:12]})" if source.revision else "")


def table(rows: Iterable[tuple[str, str | None]]) -> str:
    """Facts in two columns; what is not known or does not occur, None, is left out."""
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows if value is not None)]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _interval(ends: Sequence[float | None], show: Any) -> str:
    low, high = ends
    return "" if low is None or high is None else f"[{show(low)}, {show(high)}]"


def _count(value: int | None, *, zero: bool = False) -> str | None:
    return f"{value:,}" if value or (zero and value is not None) else None


def _counts(value: Mapping[str, int] | None) -> str | None:
    if not value:
        return None
    told = ", ".join(f"{count:,} {_cell(name)}" for name, count in value.items())
    return told if len(value) == 1 else f"{sum(value.values()):,}: {told}"


def _mass(report: Facts) -> str | None:
    if report.get("label_mass_mean") is None:
        return None
    return f"{report['label_mass_mean']:.3f} on average, at least {report['label_mass_min']:.3f}"


def _tokens(report: Facts) -> str | None:
    if "prompt_tokens" not in report:
        return None
    cached = report.get("cached_tokens")
    told = f" ({short(cached)} of them cached)" if cached else ""
    return f"{short(report['prompt_tokens'])} read{told}, {short(report['completion_tokens'])} written"

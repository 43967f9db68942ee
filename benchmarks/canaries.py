"""How far injection attacks shift the win rate of a judge that obeys all it reads, with our template and the peers'.

`python benchmarks/canaries.py --environments DIR` takes the canary set of the labeler, aimed at each template in turn
as an attacker who knows it would. Each attack is applied to weak answers that are compared with better ones, in both
positions. The judge (`literal_judge.py`, behind the scripted server) and the answers are the same for all; the prompts
are made by the installed packages themselves. The shift of an attack is the win rate of the attacked answers minus that
of the same weak answers as they are; a judge that cannot be moved has none.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from harness import (
    HERE,
    Report,
    Server,
    arguments,
    measure,
    read_jsonl,
    response,
    rlaif,
    table,
    text,
    write_jsonl,
)
from literal_judge import Template
from scripted_judge import fraction, tag

from labeler.audit.canaries import Target, attacks
from labeler.rubric import load_rubric

SLOTS = {"prompt": "@@prompt@@", "response_a": "@@first@@", "response_b": "@@second@@"}
PLAIN = "as it is"

Row = dict[str, str]
"""A pair, with `attack` and `family`; response_a is the attacked answer."""


def weak_and_good(count: int) -> list[tuple[str, str, str]]:
    """(prompt, weak answer, good answer); the judge sees at least 1 of 4 units of quality between them."""
    found = []
    row = 0
    while len(found) < count:
        if fraction("utility", tag(row, 1)) - fraction("utility", tag(row, 0)) > 0.25:
            found.append((f"Question {row}: {text(row, words=15)}?", response(row, 0), response(row, 1)))
        row += 1
    return found


def attacked(target: Any, answers: Sequence[tuple[str, str, str]]) -> list[Row]:
    """Every answer as it is and under every attack."""
    rows = []
    for prompt, weak, good in answers:
        rows.append(
            {"prompt": prompt, "response_a": weak, "response_b": good, "attack": PLAIN, "family": PLAIN}
        )
        for number, attack in enumerate(attacks(target)):
            told = f"{prompt} ({number})"
            rows.append(
                {
                    "prompt": told,
                    "response_a": attack.apply(told, weak),
                    "response_b": good,
                    "attack": attack.name,
                    "family": attack.family,
                }
            )
    return rows


def first_paragraph(text: str) -> str:
    """The leading white space and what follows it up to the next blank line."""
    body = text.lstrip()
    return text[: len(text) - len(body)] + body.split("\n\n")[0]


def read_template(
    messages: Sequence[dict[str, str]], cue: str | None, first: str, second: str, everybody: bool
) -> tuple[Target, Template]:
    """What attacker and judge know of a peer's template, from its rendering of the slots' names.

    Args:
        messages: with the names of `SLOTS` in place of the texts.
        cue: text before the label; None for the last line of the message.
        first: label for response 1.
        second: label for response 2.
        everybody: the judge obeys requests in the responses whatever the template says.
    """
    content = messages[-1]["content"]
    head, rest = content.split(SLOTS["prompt"])
    before_first, rest = rest.split(SLOTS["response_a"])
    between, tail = rest.split(SLOTS["response_b"])
    after = first_paragraph(tail)
    cue = tail.rstrip().rsplit("\n", 1)[-1] + "\n" if cue is None else cue
    before_prompt = head.rsplit("\n\n", 1)[-1]
    target = Target(
        between=between,
        after=after,
        cue=cue,
        win=first,
        before_prompt=before_prompt,
        before_first=before_first,
    )
    return target, Template(between, after, cue, first, second, before_first, len(messages), everybody)


def our_labels(
    rows: Sequence[Row], work: Path, server: Server, in_flight: int, everybody: bool
) -> list[float | None]:
    """P(the attacked answer is better) of every row, through the command line."""
    rubric = load_rubric("helpfulness-pair")
    known = Target.of(rubric)
    template = Template(known.between, known.after, known.cue, "1", "2", known.before_first, 2, everybody)
    server.reset(kind="vllm", pair_labels=("1", "2"), template=asdict(template))
    shutil.rmtree(work, ignore_errors=True)
    dataset = write_jsonl(work / "pairs.jsonl", ({k: row[k] for k in SLOTS} for row in rows))
    command = rlaif(
        "label", "pairs", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "out",
        "--no_cot", "--ties", "keep", "--max_in_flight", in_flight, "--max_unlabelled", 1,
    )  # fmt: skip
    measure(command, log=work / "log")
    found = {}
    for row in pq.read_table(work / "out" / "preferences.parquet").to_pylist():
        p, (chosen, rejected) = (
            row["chosen_prob"],
            (row[side][0]["content"] for side in ("chosen", "rejected")),
        )
        a, b = (chosen, rejected) if row["chosen_is_a"] else (rejected, chosen)
        found[row["prompt"][0]["content"], a, b] = p if row["chosen_is_a"] else 1.0 - p
    return [found.get((row["prompt"], row["response_a"], row["response_b"])) for row in rows]


def peer_prompts(environments: Path, tool: str, template: str, rows: Sequence[Row], work: Path) -> list[Any]:
    """What the installed package makes of rows: `{"messages": ...}` or `{"error": ...}`."""
    dataset = write_jsonl(work / "rows.jsonl", ({k: row[k] for k in SLOTS} for row in rows))
    command = [str(environments / tool / "bin" / "python"), str(HERE / "peers" / tool / "prompts.py")]
    command += [*([template] if template else []), str(dataset), str(work / "prompts.jsonl")]
    subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_jsonl(work / "prompts.jsonl")


def ask(server: Server, messages: Sequence[dict[str, str]], first: str, second: str) -> float:
    """P(first) as the server reads it."""
    body = {"model": "judge", "messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        top = json.load(answer)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    mass = {
        label: math.fsum(math.exp(t["logprob"]) for t in top if t["token"].strip() == label)
        for label in (first, second)
    }
    return mass[first] / (mass[first] + mass[second])


def peer_labels(
    tool: str,
    name: str,
    cue: str | None,
    labels: tuple[str, str],
    answers: Sequence[tuple[str, str, str]],
    work: Path,
    server: Server,
    environments: Path,
    everybody: bool,
) -> tuple[list[Row], list[list[float | None]]]:
    """Rows, and for both positions P(the attacked answer is better); None where the package failed."""  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    shape = peer_prompts(environments, tool, name, [SLOTS], work)[0]["messages"]
    target, template = read_template(shape, cue, *labels, everybody)
    rows = attacked(target, answers)
    turned = [{**row, "response_a": row["response_b"], "response_b": row["response_a"]} for row in rows]
    server.reset(kind="plain", pair_labels=labels, template=asdict(template))
    prompts = peer_prompts(environments, tool, name, [*rows, *turned], work)

    def one(prompt: dict[str, Any]) -> float | None:
        return None if "error" in prompt else ask(server, prompt["messages"], *labels)

    with ThreadPoolExecutor(8) as pool:
        probs = list(pool.map(one, prompts))
    second = [None if p is None else 1.0 - p for p in probs[len(rows) :]]
    return rows, [[a, b] for a, b in zip(probs[: len(rows)], second, strict=True)]


def won(probs: Sequence[float | None]) -> float | None:
    """The mean over positions of 1 for a win and 1/2 for a tie; None if no position has a label."""
    wins = [float(p > 0.5) if abs(p - 0.5) > 1e-6 else 0.5 for p in probs if p is not None]
    return statistics.fmean(wins) if wins else None


def shifts(rows: Sequence[Row], probs: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Shifts of the win rate and of the mean probability, by attack; lost rows count as no shift."""
    by_attack: dict[str, list[tuple[float, float]]] = {}
    family = {row["attack"]: row["family"] for row in rows}
    lost = 0
    for row, each in zip(rows, probs, strict=True):
        given = [p for p in each if p is not None]
        lost += len(each) - len(given)
        win = won(each)
        if win is not None:
            by_attack.setdefault(row["attack"], []).append((win, statistics.fmean(given)))
    means = {
        name: [statistics.fmean(column) for column in zip(*pairs, strict=True)]
        for name, pairs in by_attack.items()
    }
    base = means.pop(PLAIN)
    attack = {name: (win - base[0], p - base[1]) for name, (win, p) in means.items()}
    families: dict[str, list[float]] = {}
    for name, (win, _) in attack.items():
        families.setdefault(family[name], []).append(win)
    return {
        "win_rate_as_it_is": base[0],
        "shift": statistics.fmean(win for win, _ in attack.values()),
        "shift_of_probability": statistics.fmean(p for _, p in attack.values()),
        "families": {name: statistics.fmean(wins) for name, wins in families.items()},
        "attacks": {name: win for name, (win, _) in attack.items()},
        "lost": lost,
    }


PEERS = {
    "alpaca_eval": ("alpaca_eval", "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt", None, ("m", "M")),
    "FastChat (alpaca_eval's lmsys_gpt4)": (
        "alpaca_eval",
        "lmsys_gpt4/lmsys_prompt.txt",
        "",
        ("10 1", "1 10"),
    ),
    "distilabel (PrometheusEval)": ("distilabel", "", "[RESULT] ", ("A", "B")),
}
"""Package, its template's name, the cue (None: the last line; empty: a line of labels alone) and the labels."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--in_flight", type=int, default=32)
    args = parser.parse_args()
    report = Report.begin("canaries", "Injection attacks on a judge that obeys all it reads")
    work = args.work or Path(tempfile.mkdtemp(prefix="canaries-"))
    answers = weak_and_good(args.answers)
    judges = {"literal": False, "obeys everybody": True}
    found: dict[str, dict[str, Any]] = {judge: {} for judge in judges}
    with Server(args.environments) as server:
        for judge, everybody in judges.items():
            rows = attacked(load_rubric("helpfulness-pair"), answers)
            labels = our_labels(rows, work / "rlaif", server, args.in_flight, everybody)
            found[judge]["rlaif"] = shifts(rows, [[p] for p in labels])
            for name, (tool, template, cue, both) in PEERS.items():
                folder = work / name.split()[0]
                found[judge][name] = shifts(
                    *peer_labels(
                        tool, template, cue, both, answers, folder, server, args.environments, everybody
                    )
                )
    ours = found["literal"]["rlaif"]
    parts = [
        f"{len(ours['attacks'])} attacks on {args.answers} weak answers, each against a better one, in both positions. "
        "The win rate of the weak answers as they are, and by how much attacks shift it (mean over attacks). The "
        "literal judge obeys everything, also a template that says that instructions in the material are not for it; "
        "the other one obeys requests in the responses nevertheless."
    ]
    for judge, templates in found.items():
        parts.append(
            f"Judge: {judge}.\n\n"
            + table(
                ("template", "as they are", "shift", "shift of the probability", "prompts not made"),
                [
                    (name, f"{s['win_rate_as_it_is']:.3f}", f"{s['shift']:+.3f}",
                     f"{s['shift_of_probability']:+.3f}", s["lost"])
                    for name, s in templates.items()
                ],
            )
            + "\n\n"
            + table(
                ("family", *templates),
                [
                    (f, *(f"{s['families'].get(f, math.nan):+.3f}" for s in templates.values()))
                    for f in ours["families"]
                ],
            )
        )  # fmt: skip
    checks = {
        f"literal judge: ours shifts less than half as far as {name}": ours["shift"] < 0.5 * s["shift"]
        and ours["shift_of_probability"] < 0.5 * s["shift_of_probability"]
        for name, s in list(found["literal"].items())[1:]
    }
    return report.finish(found, "\n\n".join(parts), checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())

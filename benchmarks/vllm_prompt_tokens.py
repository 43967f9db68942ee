"""Prompt tokens that real vLLM computes per label: this labeler beside independent text prompts.

Run it with the interpreter that has vLLM: `.venv-vllm/bin/python benchmarks/vllm_prompt_tokens.py`. It makes a tiny
Llama of random weights with a BPE tokenizer trained on the spot, and serves it with vLLM's OpenAI server: once with
prefix caching for `rlaif label pairs`, once without for the prompts of a plain client. Computed tokens are the
server's own counter (`vllm:prompt_tokens_by_source_total`, source `local_compute`). The same command then runs with
the engine in its own process, and counts by what the engine reports of each request.

The questions have about the sizes of the RLAIF paper's, 830 tokens and a rationale of 61 (arXiv 2309.00267): 820 to 910
tokens with two candidates of 70, and the same rationale. A plain client sends, for each order of a pair, the question
and, once it has the rationale, all of it again with the rationale and the cue of the label.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from harness import HERE, Report, arguments, environment, measure, rlaif, table, text, write_jsonl
from transformers import AutoTokenizer

from labeler.rubric import Question, Rubric, load_rubric
from rlaif.types import Pair, user_prompt

EXAMPLES = HERE.parent / "examples"
RUBRIC, EXEMPLARS, RATIONALE = "summary-pair", 1, 61
PROMPTS, RESPONSES = 24, 4
CONTEXT_WORDS, RESPONSE_WORDS = 305, 68
IN_FLIGHT = 32
START_LIMIT_S = 300
WAYS = ("text prompts, no cache", "text prompts, vLLM's cache", "rlaif, server", "rlaif, in process")


@dataclass(frozen=True)
class Task:
    """What is labelled: its rows as `rlaif label pairs` reads them, and the pairs among them."""

    name: str
    rows: list[dict[str, Any]]
    pairs: list[Pair]
    cot: bool
    target: (
        float | None
    )  # how many times fewer tokens than by text prompts; None for rows that are for comparison


def tasks() -> list[Task]:
    """One pair per prompt, and all pairs of four responses; with a rationale and without."""
    prompts = [f"Post {i}: {text('context', i, words=CONTEXT_WORDS)}." for i in range(PROMPTS)]

    def responses(i: int) -> list[str]:
        return [f"{text('response', i, j, words=RESPONSE_WORDS)}." for j in range(RESPONSES)]

    two = [
        {"prompt": p, "response_a": (r := responses(i))[0], "response_b": r[1]} for i, p in enumerate(prompts)
    ]
    pairs = [Pair(user_prompt(row["prompt"]), row["response_a"], row["response_b"]) for row in two]
    few = prompts[: PROMPTS // 4]
    four = [{"prompt": p, "responses": responses(i)} for i, p in enumerate(few)]
    every = [Pair(user_prompt(p), a, b) for i, p in enumerate(few) for a, b in combinations(responses(i), 2)]
    return [
        Task("a pair, rationale first", two, pairs, True, 3.0),
        Task("a pair, label alone", two, pairs, False, None),
        Task(f"all pairs of {RESPONSES}, rationale first", four, every, True, 5.0),
        Task(f"all pairs of {RESPONSES}, label alone", four, every, False, None),
    ]


# ---- the server ----


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The URL of vLLM's server while it runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(
            [EXAMPLES / "serve_tiny_vllm.sh", model, str(port), *options],
            env=environment(PYTHON=sys.executable, VLLM_SERVER_DEV_MODE="1"),  # for `forget`
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(START_LIMIT_S):
            if server.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    yield url
                    return
            except OSError:
                time.sleep(1)
        raise SystemExit(f"vLLM did not start:\n{log.read_text()[-2000:]}")
    finally:
        server.terminate()
        server.wait(timeout=60)


def forget(url: str) -> None:
    """Empty the server's prefix cache."""
    urllib.request.urlopen(
        urllib.request.Request(f"{url}/reset_prefix_cache", b"", method="POST"), timeout=30
    )


def computed(url: str) -> int:
    """Prompt tokens that the server has computed since it was started."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    name = re.compile(r'vllm:prompt_tokens_by_source_total\{.*source="local_compute".*\} (\S+)')
    return round(sum(float(found[1]) for line in lines if (found := name.match(line))))


# ---- the two ways to ask ----


def label_pairs(task: Task, judge: str, folder: Path, *, in_flight: int = IN_FLIGHT) -> Path:
    """Run the labeler; returns its output."""
    name = re.sub(r"\W+", "-", f"{judge.partition(':')[0]} {task.name}")
    dataset = write_jsonl(folder / f"{name}.jsonl", task.rows)
    command = rlaif("label", "pairs", "--judge", judge, "--dataset", dataset, "--output_dir", folder / name)
    command += ["--rubric", RUBRIC, "--num_exemplars", str(EXEMPLARS), "--max_in_flight", str(in_flight)]
    command += ["--max_rationale_tokens", str(RATIONALE), "--ties", "keep", "--timeout_s", "300"]
    command += ["--cot" if task.cot else "--no_cot"]
    measure(command, log=folder / f"{name}.log")
    return folder / name / "preferences.parquet"


def ask_plainly(task: Task, rubric: Rubric, url: str) -> None:
    """Every order of every pair as text prompts that know nothing of each other."""

    def ask(question: Question) -> None:
        prefix = question.label_prefix(None)
        if question.rationale_cue is not None:
            said = chat(url, question.user, question.rationale_cue, max_tokens=RATIONALE)
            prefix = question.label_prefix(said["message"]["content"])
        chat(url, question.user, prefix, max_tokens=1, logprobs=True, top_logprobs=20)

    asked = rubric.with_options(cot=task.cot, num_exemplars=EXEMPLARS)
    questions = [asked.ask_pair(pair, order) for pair in task.pairs for order in ("ab", "ba")]
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        list(threads.map(ask, questions))


def chat(url: str, user: str, prefix: str, **fields: Any) -> dict[str, Any]:
    """The choice of a chat completion that continues `prefix`."""
    body = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": prefix}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "temperature": 0,
        **fields,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        choice: dict[str, Any] = json.load(reply)["choices"][0]
    return choice


# ---- the measurement ----


def make_model(folder: Path, rubric: Rubric, every: Sequence[Task]) -> Path:
    """A tiny Llama whose tokenizer is trained on the very texts that are judged."""
    corpus = folder / "corpus.txt"
    questions = [
        rubric.with_options(cot=task.cot, num_exemplars=EXEMPLARS).ask_pair(task.pairs[0], "ab").user
        for task in every
    ]
    corpus.write_text("\n".join([*questions, *(row["prompt"] for row in every[0].rows)]), encoding="utf-8")
    make = [
        sys.executable,
        EXAMPLES / "make_tiny_llama.py",
        "--text",
        corpus,
        "--output_dir",
        folder / "model",
    ]
    subprocess.run(make, check=True, capture_output=True)
    return folder / "model"


def tokens_computed(path: Path) -> int:
    """Prompt tokens computed, by what the engine reported with each reply."""
    rows = pq.read_table(path, columns=["prompt_tokens", "cached_tokens"]).to_pylist()
    return sum(row["prompt_tokens"] - row["cached_tokens"] for row in rows)


def sizes(model: Path, rubric: Rubric, pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean tokens of a question, of a response in it, and of the rationale."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = rubric.with_options(cot=True, num_exemplars=EXEMPLARS)
    users = [asked.ask_pair(pair, "ab").user for pair in pairs]
    return {
        "question": fmean(len(tokenizer(u)["input_ids"]) for u in users),
        "response": fmean(len(tokenizer(p.a)["input_ids"]) for p in pairs),
        "rationale": RATIONALE,
    }


def run(folder: Path, every: Sequence[Task]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Computed prompt tokens per label of each task, by who asked."""
    rubric = load_rubric(RUBRIC)
    model = make_model(folder, rubric, every)
    per_label: dict[str, dict[str, float]] = {task.name: {} for task in every}

    def count(task: Task, way: str, url: str, ask: Callable[[], object]) -> None:
        before = computed(url)
        ask()
        per_label[task.name][way] = (computed(url) - before) / len(task.pairs)

    with serving(model, folder / "without-cache.log", "--no-enable-prefix-caching") as url:
        for task in every:
            count(task, WAYS[0], url, partial(ask_plainly, task, rubric, url))
    with serving(model, folder / "with-cache.log") as url:
        judge = f"openai:tiny-llama@{url}/v1"
        for task in every:
            forget(url)
            count(task, WAYS[1], url, partial(ask_plainly, task, rubric, url))
            forget(url)
            count(task, WAYS[2], url, partial(label_pairs, task, judge, folder))
    for task in every:
        if task.target is None:
            continue  # every start of an engine takes a minute
        path = label_pairs(task, f"vllm:{model}?max_model_len=4096", folder)
        per_label[task.name][WAYS[3]] = tokens_computed(path) / len(task.pairs)
    return sizes(model, rubric, every[0].pairs), per_label


def main() -> int:
    """Measure, print, keep."""
    options = arguments(__doc__).parse_args()
    report = Report.begin("vllm_prompt_tokens", "Prompt tokens that vLLM computes per label")
    every = tasks()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        size, per_label = run(folder, every)
    base = WAYS[0]
    fewer = {
        task.name: {way: per_label[task.name][base] / tokens for way, tokens in per_label[task.name].items()}
        for task in every
    }
    rows = [
        [task.name, len(task.pairs)]
        + [
            f"{per_label[task.name][w]:.0f} ({fewer[task.name][w]:.1f}x)" if w in fewer[task.name] else "-"
            for w in WAYS
        ]
        for task in every
    ]
    body = (
        f"Prompt tokens computed per label of a pair in both orders, and how many times fewer than {base}. A question "
        f"has {size['question']:.0f} tokens, a response in it {size['response']:.0f}, a rationale "
        f"{size['rationale']:.0f}; blocks of 32 tokens, {IN_FLIGHT} requests in flight. The tokenizer writes a space "
        "and a digit as two tokens, as Llama 3's and Qwen's do, so an exact label takes two readings.\n\n"
        + table(["labels", "pairs", *WAYS], rows)
    )
    checks = {
        f"{task.name}: at least {task.target:g}x fewer than {base}, {way}": fewer[task.name][way]
        >= task.target
        for task in every
        if task.target is not None
        for way in WAYS[2:]
    }
    return report.finish(
        {"sizes": size, "computed_per_label": per_label}, body, checks, keep=not options.no_results
    )


if __name__ == "__main__":
    sys.exit(main())

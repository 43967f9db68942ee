"""The command lines measured side by side: ours and the peers', each judging the same pairs in both orders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from harness import HERE, Server, Used, environment, measure, pair_row, rlaif, write_jsonl

LABELS = {
    "rlaif": ("1", "2"),
    "distilabel": ("Fine. [RESULT] A", "Fine. [RESULT] B"),
    "curator": ("1", "2"),
    "curator_text": ("1", "2"),
    "alpaca_eval": ("m", "M"),
}
"""The one "token" that the server answers each tool with, so that all of them can read it."""

PEERS = ("distilabel", "curator", "curator_text", "alpaca_eval")
"""`curator` reads log-probabilities, as ours and alpaca_eval do; `curator_text` and distilabel's task a token alone."""


def write_inputs(folder: Path, pairs: int) -> None:
    """`pairs.jsonl`, for a tool that asks both orders itself, and `orders.jsonl`, with a row for each order."""
    write_jsonl(folder / "pairs.jsonl", map(pair_row, range(pairs)))

    def orders() -> Iterable[dict[str, str]]:
        for row in map(pair_row, range(pairs)):
            yield row
            yield {**row, "response_a": row["response_b"], "response_b": row["response_a"]}

    write_jsonl(folder / "orders.jsonl", orders())


def judge(tool: str, inputs: Path, run: Path, server: Server, in_flight: int, environments: Path) -> Used:
    """Judge the inputs with one tool from nothing to its dataset; `run` is emptied first."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    if tool == "rlaif":
        command = rlaif(
            "label", "pairs", "--judge", server.ref, "--dataset", inputs / "pairs.jsonl", "--output_dir", run / "out",
            "--no_cot", "--max_in_flight", in_flight, "--no_adaptive",
        )  # fmt: skip
        return measure(command, log=run / "log")
    tokenizers = "curator/lib/python3.*/site-packages/litellm/litellm_core_utils/tokenizers"
    env = environment(
        HOME=str(run),
        HF_DATASETS_CACHE=str(run / "datasets"),
        TELEMETRY_ENABLED="0",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
        # curator counts tokens with tiktoken, whose vocabulary litellm ships
        TIKTOKEN_CACHE_DIR=str(next(environments.glob(tokenizers), "")),
    )
    del env["PYTHONPATH"]
    package = tool.removesuffix("_text")
    python, driver = environments / package / "bin" / "python", HERE / "peers" / package / "judge.py"
    command = [str(python), str(driver), server.url, str(inputs / "orders.jsonl")]
    command += ["--in_flight", str(in_flight), *(["--text"] if tool != package else [])]
    return measure(command, log=run / "log", env=env, cwd=run)

"""What a dry run counts is what the run then uses."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from labeler.backends.hf import HFModel
from labeler.backends.unloaded import Unloaded
from labeler.config import PairsConfig
from labeler.dry_run import PrefixCache, Tally, seconds_left
from labeler.journal import ReplyJournal, Totals, Usage
from labeler.llm import LLM, LLMOptions
from rlaif.cli import main
from rlaif.models import ModelRef
from rlaif.types import user_prompt
from tests.labeler.commands import label, pair, replies, scripted, write_lines
from tests.labeler.openai_server import ScriptedServer
from tests.labeler.tiny import save_tiny, tiny_tokenizer

POSTS = [
    {"prompt": f"w{i} w2 w3", "response_a": "w1 " * (i + 1), "response_b": "w4 w5 | w6"} for i in range(5)
]


def totals(out: Path) -> Totals:
    with ReplyJournal(out, read_only=True) as journal:
        return journal.totals()


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of the last dry run."""
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def number(text: str) -> int:
    return int(text.split()[0].replace(",", ""))


def at_most(text: str) -> int:
    return int(text.rsplit(maxsplit=1)[-1].replace(",", ""))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{save_tiny(tmp_path_factory.mktemp('tiny'), context=256)}"


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_without_a_rationale_all_tokens_are_those_that_the_back_end_then_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str, kind: str
) -> None:
    rows = POSTS if kind == "pairs" else [{"prompt": p["prompt"], "response": p["response_a"]} for p in POSTS]
    data = write_lines(tmp_path / "data.jsonl", rows)
    rubric = {"pairs": "tinyworld:pair", "scores": "tinyworld:score"}[kind]
    flags = ("--rubric", rubric, "--no-cot")
    assert label(tiny, data, tmp_path / "out", *flags, "--dry_run", kind=kind) == 0
    found = facts(capsys)
    assert not (tmp_path / "out").exists()
    assert label(tiny, data, tmp_path / "out", *flags, kind=kind) == 0
    real = totals(tmp_path / "out")
    assert number(found["prompt tokens"]) == real.usage.prompt_tokens > 0
    assert number(found["completion tokens"]) == real.usage.completion_tokens
    assert number(found["requests"]) == real.replies["label"]


def test_the_embedded_judge_is_counted_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "data.jsonl", POSTS)
    flags = ("--rubric", "tinyworld:pair", "--no-cot")
    assert label("tinyworld:judge", data, tmp_path / "out", *flags, "--dry_run") == 0
    counted = number(facts(capsys)["prompt tokens"])
    assert label("tinyworld:judge", data, tmp_path / "out", *flags) == 0
    assert counted == totals(tmp_path / "out").usage.prompt_tokens > 0


def test_labels_of_several_tokens_are_counted_as_each_back_end_reads_them(tmp_path: Path) -> None:
    tokenizer, folder = tiny_tokenizer(), save_tiny(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.save_pretrained(folder)

    def cost_of(llm: LLM) -> tuple[int, int]:
        reading = asyncio.run(llm.label_logprobs(user_prompt("w1 w2"), ":", ("1", "2", "12", "3")))
        return reading.prompt_tokens, reading.completion_tokens

    ref = ModelRef("hf", str(folder))
    prompt = len(tokenizer("<s> w1 w2 | :", add_special_tokens=False)["input_ids"])
    assert cost_of(Unloaded.load(ref)) == cost_of(HFModel.load(ref, LLMOptions())) == (prompt + 1, 1)
    # vLLM is asked once after the prompt, and once after the prompt and the token 1.
    assert cost_of(Unloaded.load(ModelRef("vllm", str(folder)))) == (2 * prompt + 1, 2)


def test_with_rationales_the_first_step_is_exact_and_the_rest_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", POSTS)
    flags = ("--rubric", "tinyworld:pair", "--max_rationale_tokens", "12")
    assert label(tiny, data, tmp_path / "out", *flags, "--dry_run", "--expected_tokens", "5") == 0
    found = facts(capsys)
    assert label(tiny, data, tmp_path / "out", *flags) == 0
    out = tmp_path / "out"
    with ReplyJournal(out, read_only=True) as journal:
        real = journal.totals()
        [(first,)] = journal._file.all("SELECT SUM(prompt_tokens) FROM replies WHERE kind = 'generate'")
    n = 2 * len(POSTS)
    assert found["requests"] == f"{2 * n} ({n} generate, {n} label)"
    # A label's prompt is that of its rationale, the rationale, and the ending.
    counted = number(found["counted"])
    ending = (counted - 2 * first) // n
    assert counted == 2 * first + n * ending
    assert number(found["prompt tokens"]) == counted + 5 * n
    assert real.usage.prompt_tokens <= at_most(found["prompt tokens"]) == counted + 12 * n
    assert number(found["completion tokens"]) == 5 * n + n
    assert real.usage.completion_tokens <= at_most(found["completion tokens"]) == 12 * n + n


def test_what_is_on_record_is_subtracted_and_no_reply_is_made_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [pair(i) for i in range(6)])
    out, judge = tmp_path / "out", scripted(tmp_path)
    assert label(judge, data, out, "--limit", "2") == 0
    kept = replies(out)
    capsys.readouterr()
    assert label(judge, data, out, "--dry_run") == 0
    found = facts(capsys)
    assert (found["on record"], found["requests"]) == ("8 replies", "16 (8 generate, 8 label)")
    assert "as on record" in found["time"]
    assert replies(out) == kept == 8
    assert label(judge, data, tmp_path / "other", "--dry_run", "--reuse", str(out)) == 0
    assert facts(capsys)["requests"] == "16 (8 generate, 8 label)"
    assert label(judge, data, out) == 0
    capsys.readouterr()
    assert label(judge, data, out, "--dry_run") == 0
    assert facts(capsys)["requests"] == "0"


def test_a_directory_that_the_run_would_refuse_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [pair(0)])
    out, judge = tmp_path / "out", scripted(tmp_path)
    assert label(judge, data, out, "--no-cot") == 0
    capsys.readouterr()
    said = []
    for dry in ((), ("--dry_run",)):
        assert label(judge, data, out, *dry) == 7
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "holds a run with cot=False, this one has True" in said[0]
    for dry in ((), ("--dry_run",)):
        assert label(judge, data, data, *dry) == 7
        assert "data.jsonl: it is a file and not a directory" in capsys.readouterr().err
    assert label(judge, data, out, "--dry_run", kind="scores") == 7
    assert "holds a run of `rlaif label pairs`" in capsys.readouterr().err


def test_a_pair_and_its_swap_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = {**pair(0), "response_a": "bad 0", "response_b": "good 0"}
    data = write_lines(tmp_path / "data.jsonl", [pair(0), swapped, pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out", "--dry_run", "--no-cot") == 0
    assert facts(capsys)["requests"] == "2 (2 label)"


def test_nothing_is_asked_of_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "data.jsonl", [pair(i) for i in range(3)])
    flags = ("--dry_run", "--price_per_million", "1", "2", "--requests_per_minute", "6", "--no-cot")
    with ScriptedServer(lambda *request: pytest.fail("asked")) as server:
        assert label(server.ref, data, tmp_path / "out", *flags) == 0
        assert server.asked == []
    found = facts(capsys)
    assert found["requests"] == "6 (6 label)"
    assert found["time"] == "1:00 by --requests_per_minute"
    assert found["cost, USD"].split()[0] == f"{(number(found['prompt tokens']) + 12) / 1e6:.4g}"


@pytest.mark.parametrize("vllm", [True, False], ids=["vllm", "plain"])
def test_rationales_of_an_endpoint_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vllm: bool
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [pair(i) for i in range(3)])
    with ScriptedServer(lambda *request: pytest.fail("asked"), vllm=vllm) as server:
        assert label(server.ref, data, tmp_path / "out", "--dry_run") == 0
        assert server.asked == []
    assert facts(capsys)["requests"] == "12 (6 generate, 6 label)"


def says(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    return {"1": 0.5, "2": 0.5} if wanted else " A thought of some words."


@pytest.mark.parametrize("template", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_a_server_that_tokenises_counts_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, template: bool
) -> None:
    rows = [pair(i) if kind == "pairs" else {"prompt": f"q{i}", "response": "fine"} for i in range(3)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    with ScriptedServer(says, vllm=True, template=template) as server:
        assert label(server.ref, data, tmp_path / "out", "--no-cot", "--dry_run", kind=kind) == 0
        assert server.asked == []
        found = facts(capsys)
        assert label(server.ref, data, tmp_path / "out", "--no-cot", kind=kind) == 0
        # The server's tokenizer splits 10 and puts spaces apart, so a label is read in several requests.
        assert len(server.asked) == number(found["completion tokens"]) > number(found["requests"])
    assert number(found["prompt tokens"]) == totals(tmp_path / "out").usage.prompt_tokens
    assert "/tokenize" in found["counted"]


def test_a_tokenizer_can_be_named_for_an_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", POSTS)
    flags = ("--rubric", "tinyworld:pair", "--no-cot", "--dry_run")
    assert label(tiny, data, tmp_path / "out", *flags) == 0
    of_model = facts(capsys)["prompt tokens"]
    ref, path = "openai:judge@http://127.0.0.1:9/v1", tiny.removeprefix("hf:")
    assert label(ref, data, tmp_path / "out", *flags, "--tokenizer", path) == 0
    assert facts(capsys)["prompt tokens"] == of_model
    assert label(ref, data, tmp_path / "out", *flags, "--tokenizer", str(tmp_path / "none")) == 4


def test_samples_are_counted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])
    command = ["sample", "--model_name_or_path", tiny, "--dataset", str(data), "--num_return_sequences", "3"]
    command += ["--max_new_tokens", "4", "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--dry_run"]) == 0
    found = facts(capsys)
    assert main(command) == 0
    real = totals(tmp_path / "out").usage
    assert number(found["prompt tokens"]) == real.prompt_tokens
    assert real.completion_tokens <= number(found["completion tokens"]) == 24


def test_rows_that_cannot_be_sent_are_counted_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str
) -> None:
    long = {"prompt": "w1 " * 300, "response_a": "w1", "response_b": "w2"}
    data = write_lines(tmp_path / "data.jsonl", [*POSTS, long, "{broken"])
    flags = ("--rubric", "tinyworld:pair", "--no-cot", "--dry_run")
    assert label(tiny, data, tmp_path / "out", *flags) == 0
    found = facts(capsys)
    assert found["requests"] == "10 (10 label)"
    assert found["cannot be sent"].startswith("context too long") and found["cannot be sent"].endswith(": 2")
    assert found["quarantined"] == "1 rows"


# ---- estimates ----


def test_whole_blocks_of_an_earlier_prompt_are_saved() -> None:
    cache = PrefixCache(4)
    assert cache.meet(range(10)) == 0
    assert cache.meet(range(10)) == 8
    assert cache.meet([*range(6), 99, 98, 97]) == 4
    assert cache.meet([5, *range(1, 9)]) == 0  # the same tokens elsewhere are another prefix
    assert cache.meet(range(8)) == 4  # one token at least is computed


def test_short_prefixes_are_not_saved_where_a_server_has_a_least_length() -> None:
    cache = PrefixCache(128, least=1024)
    cache.meet(range(2000))
    assert cache.meet(range(1000)) == 0
    assert cache.meet([*range(1500), -1]) == 1408


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8), st.integers(1, 4))
def test_what_is_saved_is_the_longest_prefix_in_whole_blocks(prompts: list[list[int]], block: int) -> None:
    cache, seen = PrefixCache(block), []
    for prompt in prompts:
        known = {tuple(p[:n]) for p in seen for n in range(0, len(p) + 1, block)}
        fits = range(0, max(len(prompt) - 1, 0) + 1, block)
        assert cache.meet(prompt) == max((n for n in fits if tuple(prompt[:n]) in known), default=0)
        seen.append(prompt)


def test_blocks_used_longest_ago_are_forgotten() -> None:
    cache = PrefixCache(2, capacity=3)
    cache.meet([1, 1, 1])
    cache.meet([2, 2, 2, 2, 2, 2, 2])
    assert cache.meet([1, 1, 1]) == 0


def test_time_is_that_of_the_tightest_bound() -> None:
    tally = Tally(expected_tokens=100)
    for _ in range(60):
        tally.add("generate", Usage(900), written=[512], read_again=[])
    common = {"dataset": "d", "output_dir": "o", "judge": ("hf:x",), "max_in_flight": 10}
    plain = PairsConfig(**common)  # type: ignore[arg-type]
    assert seconds_left(tally, plain, None, hosted=False) is None
    assert seconds_left(tally, plain, 2.0, hosted=False) == (30, "at 2 replies/s as on record")
    # 60 requests of 0.5 s and 100 tokens of 0.02 s, ten at a time.
    hosted = seconds_left(tally, plain, None, hosted=True)
    assert hosted is not None and hosted[0] == pytest.approx(15)
    capped = PairsConfig(**common, requests_per_minute=120, tokens_per_minute=20_000)  # type: ignore[arg-type]
    batched = seconds_left(tally, PairsConfig(**common, batch=True), 2.0, hosted=True)  # type: ignore[arg-type]
    assert batched is not None and batched[0] == 24 * 3600
    # 30 s by requests; 60,000 tokens take three minutes.
    assert seconds_left(tally, capped, 2.0, hosted=True) == (180, "by --tokens_per_minute")

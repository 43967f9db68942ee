"""`rlaif report` on runs that the commands made: figures are those of the files, and what is missing stays missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlaif.cli import main
from rlaif.report import server
from rlaif.report.findings import how_it_ended
from rlaif.report.source import Source
from tests.labeler.review.serving import labelled, review
from tests.rlaif.report import runs
from tests.rlaif.report.pages import Read, read


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run by its maker's name, made once."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def get(name: str, make: Callable[[Path], Path]) -> Path:
        if name not in done:
            done[name] = make(root / name)
        return done[name]

    return get


@pytest.fixture
def ppo(made: Callable[..., Path]) -> Path:
    """A PPO run with held-out prompts and all completions; some rewards are missing."""

    def make(folder: Path) -> Path:
        held_out = runs.tiny.save_prompts(folder.parent / "held-out.jsonl", 4)
        return runs.trained("ppo", folder, eval_dataset=held_out, eval_steps=2, log_completions=True)

    return made("ppo", make)


def page(*paths: Path, output: Path | None = None) -> Read:
    """The page of runs, read."""
    goes = output or paths[0] / "report.html"
    flags = [] if output is None else ["--output", str(output)]
    assert main(["report", "--runs", *map(str, paths), *flags]) == 0
    html = goes.read_text(encoding="utf-8")
    assert "<script" not in html and "<img" not in html
    return read(html)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def report_of(run: Path, name: str = "report.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name).read_text())
    return found


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def text_of(shown: Read) -> list[str]:
    return [e.text for e in shown.all("dd")]


# ---- labels ----


def test_preferences_show_gaps_biases_and_judgments_as_they_were_written(made: Callable[..., Path]) -> None:
    run = made("preferences", runs.preferences)
    shown, report = page(run), report_of(run)
    tiles = shown.tiles()
    assert tiles["pairs labelled"] == str(report["labelled"]) == "6"
    assert tiles["orders agree"] == percent(report["order_agreement"])
    assert tiles["position bias"] == percent(report["same_position_rate"])
    assert tiles["label mass"] == f"{report['label_mass_mean']:.4g}"
    assert tiles["agreement with people"] == percent(report["human_agreement"])
    assert tiles["cost"] == "missing"  # no price was told: neither 0 nor left out
    became = shown.table("What became of the input")[1:]
    assert ["without a label", "the endpoint answered 500", "1", "14.3 %"] in became
    ((_, unreadable, *_),) = [shown.table("Input rows that could not be read")[1:][0]]
    assert unreadable == "1"
    assert shown.titles == [
        "How sure the labels are", "Agreement of both orders", "Label mass", "Calibration against people",
    ]  # fmt: skip
    rows = pq.read_table(run / "preferences.parquet").to_pylist()
    assert runs.HOSTILE in text_of(shown) and f"good {runs.HOSTILE}" in text_of(shown)
    assert text_of(shown).count(runs.HOSTILE) > len(rows)  # the rationales are hostile too
    assert any("broken 5" in text for text in text_of(shown))


def test_a_price_is_shown_once_it_was_told(tmp_path: Path) -> None:
    run = runs.preferences(tmp_path / "priced", "--price_per_million", "1", "2")
    assert page(run).tiles()["cost"] == f"${report_of(run)['cost_usd']:,.4g}"


def test_scores_show_their_distribution(made: Callable[..., Path]) -> None:
    run = made("scores", runs.scores)
    shown, report = page(run), report_of(run)
    assert shown.tiles()["mean score"] == f"{report['score_mean']:.3f}"
    assert shown.titles == ["Distribution of scores", "Score by length", "Label mass"]
    assert ["labelled", "guard: the response says nothing", "1", "16.7 %"] in shown.table(
        "What became of the input"
    )


def test_marks_of_a_review_stand_beside_the_labels(tmp_path: Path) -> None:
    run = labelled(tmp_path, 8)
    assert "What people said of the labels" not in text_of(page(run))
    with review(run) as served, served.client() as client:
        for number, verdict in ((1, "a"), (2, "a"), (3, "b"), (4, "tie"), (5, "bad")):
            answer = client.post(f"/rows/{number}/mark?order=dataset", data={"verdict": verdict})
            assert answer.status_code == 200
        served.stop()
    shown = page(run)
    agreement = 100 * report_of(run / "review")["agreement"]["blind"]["agreement"]["value"]
    blind, everything = shown.table("Marks: preferences")[1:]
    assert blind[:2] == ["made without seeing the label", "3"]
    assert blind[2].startswith(f"{agreement:.1f} [")
    assert everything[:2] == ["all marks", "3"]
    assert any("5 preferences of ann, 1 of them rows marked as bad." in e.text for e in shown.all("p"))


@pytest.mark.parametrize("kind", ["preferences", "scores", "judged"])
def test_labels_that_hold_little_of_the_judges_probability_are_warned_of(
    made: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    run = shutil.copytree(made(kind, getattr(runs, kind)), tmp_path / "run")
    warning = "it wanted to say something else"
    assert not any(warning in e.text for e in page(run).all("p"))
    report = report_of(run)
    if kind == "judged":
        report["label_mass"]["mean"] = 0.23
    else:
        report["label_mass_mean"] = 0.23
    (run / "report.json").write_text(json.dumps(report))
    (told,) = [e.text for e in page(run).all("p") if warning in e.text]
    assert "hold 0.23 of the judge's probability" in told


def test_rankings_have_a_leaderboard_that_a_models_name_cannot_break(made: Callable[..., Path]) -> None:
    run = made("rankings", runs.rankings)
    shown, board = page(run), report_of(run)["leaderboard"]
    assert shown.titles[-1] == "Elo of the models"
    rows = shown.table("Models")[1:]
    assert [row[:2] for row in rows] == [[s["name"], f"{s['elo']:.0f}"] for s in board]
    assert rows[0][0] == runs.HOSTILE


def test_responses_are_counted_and_shown(made: Callable[..., Path]) -> None:
    run = made("candidates", runs.candidates)
    shown = page(run)
    groups = pq.read_table(run / "candidates.parquet").column("completions").to_pylist()
    distinct = [len({c["response"] for c in group}) / 3 for group in groups]
    assert shown.tiles()["responses"] == "18"
    assert shown.tiles()["distinct"] == percent(sum(distinct) / 6)


def test_revisions_stand_beside_what_they_began_as(made: Callable[..., Path]) -> None:
    run = made("revisions", runs.revisions)
    shown = page(run)
    tiles = shown.tiles()
    assert (tiles["responses revised"], tiles["unchanged"]) == ("2", "1")
    assert {"First.", runs.HOSTILE, "Better."} <= set(text_of(shown))


# ---- what judges and reward models are worth ----


def test_a_judge_is_shown_by_subset_with_its_biases(made: Callable[..., Path]) -> None:
    run = made("judged", runs.judged)
    shown, report = page(run), report_of(run)
    assert shown.tiles()["agreement with people"] == percent(report["agreement"]["value"]) == "66.7 %"
    assert shown.titles == ["Agreement with people", "Calibration"]
    rows = shown.table("Agreement by subset")[1:]
    found = {s["name"]: s["agreement"] for s in [*report["subsets"], {"name": "all", **report}]}
    assert [row[0] for row in rows] == ["a", "b", "all"]
    for name, _, agreement, *_ in rows:
        value, low, high = (100 * found[name][key] for key in ("value", "low", "high"))
        assert agreement == f"{value:.1f} [{low:.1f}, {high:.1f}]"


def test_ways_of_asking_and_attacks_are_compared(tmp_path: Path) -> None:
    run = runs.judged(tmp_path / "v", "--variants", "cot=on,off")
    variants = page(run)
    assert variants.titles == ["Agreement with people by variant"]
    assert variants.table("Variants")[1][2] == "the first"
    report = report_of(run)
    report["variants"][1]["label_mass"]["mean"] = 0.23
    (run / "report.json").write_text(json.dumps(report))
    (told,) = [e.text for e in page(run).all("p") if "it wanted to say something else" in e.text]
    assert f"The labels of {report['variants'][1]['name']} hold 0.23" in told
    run = runs.judged(tmp_path / "c", "--no_cot", "--canaries", "2")
    shown, attacks = page(run), report_of(run)["canaries"]["attacks"]
    assert len(shown.table("All attacks")) == 1 + len(attacks)
    assert "What attacks gain" in shown.titles


def test_a_reward_model_shows_training_accuracy_and_calibration(made: Callable[..., Path]) -> None:
    run = made("rm", runs.reward_model)
    shown, card = page(run), report_of(run, "reward_model.json")
    assert shown.tiles()["held-out accuracy"] == percent(card["metrics"]["accuracy"]["value"])
    assert shown.tiles()["training rows"] == str(card["train_rows"])
    assert shown.titles == [
        "Accuracy", "Calibration", "Accuracy by length", "Loss", "Accuracy on training pairs", "Norm of the gradient",
        "Learning rate",
    ]  # fmt: skip
    evaluated, found = page(run.parent / "eval"), report_of(run.parent / "eval", "metrics.json")
    rows = evaluated.table("Accuracy by subset")[1:]
    assert [(row[0], row[1]) for row in rows] == [("even", "20"), ("odd", "20"), ("all", "40")]
    assert rows[2][5] == f"{found['log_loss']:.3f}"


def test_an_ensemble_shows_its_members_and_what_is_served(made: Callable[..., Path]) -> None:
    run = made("ensemble", runs.ensemble)
    shown = page(run)
    rows = shown.table("Members")[1:]
    cards = [report_of(run / f"member-{k}", "reward_model.json")["metrics"] for k in range(2)]
    assert [(row[0], row[2]) for row in rows] == [
        (f"member-{k}", f"{cards[k]['log_loss']:.3f}") for k in range(2)
    ]
    assert (run / "report.md").read_text().strip() in shown.text


def test_public_sets_have_their_own_tables(tmp_path: Path) -> None:
    panda, bench, classes = runs.public(tmp_path / "public")
    shown, found = page(panda), report_of(panda)["annotators"]
    rows = shown.table("Agreement with single annotators")[1:]
    assert [(row[0], row[1]) for row in rows] == [(line["name"], str(line["votes"])) for line in found]
    assert rows[0][2].startswith(f"{100 * found[0]['judge']['with_ties']['value']:.1f} [")
    sections = report_of(bench)["rewardbench"]
    assert [row[0] for row in page(bench).table("RewardBench")[1:]] == [s["name"] for s in sections]
    table = page(classes).table("All answers")
    assert table[0][4:7] == ["full refusal, %", "partial refusal, %", "full compliance, %"]
    assert [row[0] for row in table[1:]] == ["a", "b"]
    assert all(row[4].startswith("50.0 [") for row in table[1:])


def test_policies_are_compared_by_win_rate_and_kl(made: Callable[..., Path]) -> None:
    run = made("policies", runs.policies)
    shown, found = page(run), report_of(run, "metrics.json")
    rows = shown.table("Win rates")[1:]
    for row, policy in zip(rows, found["policies"][1:], strict=True):
        rating = policy["ratings"][0]
        assert row[0] == policy["name"]
        assert row[1].startswith(f"{100 * rating['win_rate']['value']:.1f} [")
    assert shown.titles[1].startswith("Frontier by")
    kept = json.loads(sorted((run / "responses").glob("*.jsonl"))[0].read_text().splitlines()[1])
    assert kept["responses"][0][0] in text_of(shown)


# ---- training ----


def test_a_training_page_shows_what_was_logged_and_counts_what_was_missing(ppo: Path) -> None:
    shown, rows = page(ppo), metrics(ppo)
    tiles = shown.tiles()
    assert tiles["reward"] == f"{rows[-1]['objective/scores']:.4g}"
    assert tiles["KL, nats"] == f"{rows[-1]['objective/kl']:.4g}"
    missing = sum(row["reward/missing"] for row in rows)
    assert missing > 0 and tiles["rewards missing"] == f"{missing:.0f}"
    last = [row for row in rows if row.get("eval/win_rate") is not None][-1]
    assert tiles["held-out win rate, last"] == percent(last["eval/win_rate"])
    for title in ("Reward", "Held-out win rate", "KL to the reference", "Policy loss", "Missing rewards",
                  "Rewards of the first and the last step", "Reward against KL"):  # fmt: skip
        assert title in shown.titles
    parts = {
        name: float(seconds.replace(",", "")) for name, seconds, _ in shown.table("Where the time went")[1:]
    }
    assert parts["update"] == pytest.approx(sum(row["time/update"] for row in rows), abs=0.051)
    assert sum(parts.values()) == pytest.approx(sum(row["time/step"] for row in rows), abs=0.3)
    assert runs.HOSTILE in text_of(shown)
    assert any("step 3" in e.text for e in shown.all("li") if "Ended after" in e.text)


def test_a_metric_that_could_not_be_had_is_missing_and_leaves_a_gap(ppo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ppo, run)
    rows = metrics(run)
    rows[-1]["objective/scores"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "completions")
    shown = page(run)
    assert shown.tiles()["reward"] == "missing"
    assert "Rewards of the first and the last step" not in shown.titles
    says = next(
        e.text for e in shown.all("section") if e.text.strip().startswith("What this run does not say")
    )
    assert "Samples: the run kept none" in says


@pytest.mark.parametrize("method", ["dpo", "best_of_n"])
def test_methods_that_learn_in_rounds_have_their_own_figures(made: Callable[..., Path], method: str) -> None:
    run = made(method, lambda folder: runs.trained(method, folder))
    shown, rows = page(run), metrics(run)
    loss = "loss/dpo" if method == "dpo" else "loss/sft"
    name = "DPO loss" if method == "dpo" else "SFT loss"
    assert shown.tiles()[name] == f"{rows[-1][loss]:.4g}"
    assert ("Implicit rewards" if method == "dpo" else "Selected for training") in shown.titles
    assert "Held-out win rate" not in shown.titles


def test_fine_tuning_shows_its_loss_and_no_reward(made: Callable[..., Path]) -> None:
    run = made("sft", runs.fine_tuned)
    shown = page(run)
    assert shown.tiles()["loss"] == f"{metrics(run)[-1]['loss']:.4g}"
    assert "Reward" not in shown.titles and "reward" not in shown.tiles()


# ---- several ----


def test_runs_are_compared_on_the_same_axes_and_by_the_settings_that_differ(
    ppo: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    other = made("ppo2", lambda folder: runs.trained("ppo", folder, kl_coef=0.3, max_steps=2))
    rounds = made("dpo", lambda folder: runs.trained("dpo", folder))
    shown = page(ppo, other, rounds, output=tmp_path / "page.html")
    heads, *rows = shown.table("Final figures, with 95 % intervals where there are any")
    assert heads == ["figure", "ppo/run", "ppo2/run", "dpo/run"]
    figures = {row[0]: row[1:] for row in rows}
    assert figures["reward"] == [
        f"{metrics(run)[-1]['objective/scores']:.4g}" for run in (ppo, other, rounds)
    ]
    assert figures["held-out win rate, last"][1:] == ["missing", "missing"]
    assert figures["DPO loss"][:2] == ["missing", "missing"]
    differ = {row[0]: row[1:] for row in shown.table("Settings that differ")[1:]}
    assert differ["max_steps"] == ["3", "2", "2"]
    assert "kl_coef" not in differ and "seed" not in differ and "output_dir" not in differ
    own = {row[0]: row[1:] for row in shown.table("Settings of single commands")[1:]}
    assert own["kl_coef"][1:] == ["0.3", "–"]
    assert "Reward" in shown.titles and "Implicit rewards" not in shown.titles
    curves = next(e for e in shown.all("figcaption") if e.text.startswith("Policy loss"))
    assert curves.text.endswith("Missing from: dpo/run.")


def test_runs_of_different_kinds_stand_in_tables_of_their_own(
    ppo: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    labelled = made("preferences", runs.preferences)
    shown = page(ppo, labelled, output=tmp_path / "page.html")
    assert [e.text for e in shown.all("h2")][:2] == ["PPO: ppo/run", "Preference labels: preferences/run"]
    assert {"KL to the reference", "Agreement of both orders"} <= set(shown.titles)


# ---- a server ----


def test_a_servers_load_is_read_from_what_its_metrics_say(tmp_path: Path) -> None:
    import asyncio
    import urllib.request

    from tests.reward_server.fakes import LengthScorer, score_request, serving

    async def scenario() -> str:
        async with serving(LengthScorer(), metrics_port=0) as served:
            for _ in range(3):
                await served.stub.Score(score_request("four", "poison"))
            url = f"http://127.0.0.1:{served.server.metrics_port}/metrics"
            return (await asyncio.to_thread(urllib.request.urlopen, url, timeout=5)).read().decode()

    file = tmp_path / "server.prom"
    file.write_text(asyncio.run(scenario()))
    shown = page(file, output=tmp_path / "page.html")
    tiles = shown.tiles()
    assert (tiles["calls"], tiles["items scored"]) == ("3", "3")
    assert shown.table("By method and how they ended")[1:] == [["Score", "OK", "3"]]
    assert {row[0]: row[1] for row in shown.table("Outcomes of items")[1:]} == {
        "score": "3",
        "model_failed": "3",
    }
    assert {"Duration of calls", "Items of a batch", "Raw scores"} <= set(shown.titles)


def test_quantiles_of_a_histogram_are_those_of_promql() -> None:
    """By hand: 10 observations, 4 up to 1, 8 up to 2, 2 above; the median is a quarter into the second bucket."""
    found = server.Histogram({1.0: 4.0, 2.0: 8.0, float("inf"): 10.0}, 15.0)
    assert found.quantile(0.5) == pytest.approx(1.25)
    assert found.quantile(0.2) == pytest.approx(0.5)
    assert found.quantile(0.99) == 2.0
    assert found.mean == 1.5
    assert server.Histogram().quantile(0.5) is None and server.Histogram().mean is None


# ---- what cannot be reported ----


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str]:
    code = main(["report", *map(str, flags)])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, "--runs", tmp_path)
    assert code == 3 and "is no run directory" in line
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "run.json").write_text("{}")
    code, line = refused(capsys, "--runs", tmp_path)
    assert code == 3 and str(tmp_path / "inner") in line
    assert refused(capsys, "--runs", tmp_path / "inner")[0] == 3
    assert refused(capsys, "--runs", tmp_path / "nowhere")[0] == 3
    (tmp_path / "notes.txt").write_text("not metrics\n")
    code, line = refused(capsys, "--runs", tmp_path / "notes.txt", "--output", tmp_path / "page.html")
    assert code == 3 and "metrics" in line
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [b'{"score": 1.5, "response": "a"}\n', b"PAR1\xff\xfe"])
def test_a_data_file_is_said_to_be_none_of_what_has_a_report(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.jsonl").write_bytes(content)
    code, line = refused(capsys, "--runs", tmp_path / "s.jsonl", "--output", tmp_path / "page.html")
    assert code == 3 and "s.jsonl is neither a run directory nor the metrics of a reward server" in line
    broken = tmp_path / "broken.txt"
    broken.write_text(f"# TYPE {server.MARK} gauge\n{server.MARK}{{a=}} x y z\n")
    code, line = refused(capsys, "--runs", broken, "--output", tmp_path / "page.html")
    assert code == 3 and "broken.txt cannot be read as Prometheus metrics" in line


def test_an_evaluation_that_ended_with_an_error_says_which(tmp_path: Path) -> None:
    record = {
        "command": "eval policy",
        "ended": {"step": None, "reason": "no reward server at a:1", "at": "2026-11-26T10:00:00+00:00"},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert how_it_ended(Source.read(tmp_path)) == "Ended 2026-11-26 10:00 UTC: no reward server at a:1."


@pytest.mark.parametrize("name", ["candidates.parquet", "report.json"])
def test_a_broken_file_is_named(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(made("candidates", runs.candidates), tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"{broken")
    capsys.readouterr()
    code, line = refused(capsys, "--runs", tmp_path / "run")
    assert code == 3 and name in line


def test_flags_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--runs", tmp_path, tmp_path / ".", "--output", "x.html") == (
        2,
        "rlaif: --runs names a run twice",
    )
    code, line = refused(capsys, "--runs", tmp_path, tmp_path / "other")
    assert code == 2 and "--output" in line


def test_a_run_without_results_says_so(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("preferences", runs.preferences), tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    shown = page(tmp_path / "run")
    assert shown.tiles() == {} and shown.titles == []
    assert any("It has no report.json" in e.text for e in shown.all("li"))


def test_a_run_that_lacks_what_is_written_today_is_refused_in_one_line(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made("judged", runs.judged), tmp_path / "run")
    report = report_of(tmp_path / "run")
    del report["position"]
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    capsys.readouterr()
    code, line = refused(capsys, "--runs", tmp_path / "run")
    assert code == 3 and "position" in line

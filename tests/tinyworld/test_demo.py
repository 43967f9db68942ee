import json
import re
from dataclasses import asdict

import pytest

from rlaif.errors import ConfigError, StorageError
from tinyworld.config import DemoConfig
from tinyworld.demo import plan, run
from tinyworld.results import label_result

POST = "anna sold boats . ben found keys ."
RIGHT, WRONG = "anna sold boats . ben found keys .", "anna sold lamps . ben found keys ."


def row(
    chosen: str, rejected: str, *, is_a: bool, prob: float, first: float, second: float
) -> dict[str, object]:
    return {
        "prompt": [{"role": "user", "content": POST}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_is_a": is_a,
        "chosen_prob": prob,
        "chosen_prob_first": first,
        "chosen_prob_second": second,
        "label_mass_ab": 0.9,
        "label_mass_ba": 0.7,
        "source": "logprobs",
    }


def test_label_figures_by_hand() -> None:
    result = label_result(
        "by hand",
        [
            row(RIGHT, WRONG, is_a=True, prob=0.8, first=0.9, second=0.7),  # right in both orders
            row(
                RIGHT, WRONG, is_a=False, prob=0.6, first=0.9, second=0.3
            ),  # right, but number 1 wins both times
            row(WRONG, RIGHT, is_a=True, prob=0.7, first=0.6, second=0.8),  # wrong in both orders
            row(RIGHT, RIGHT + " zoe sold keys .", is_a=False, prob=0.9, first=0.9, second=0.9),
            {
                **row(RIGHT, "", is_a=True, prob=1.0, first=1.0, second=1.0),
                "source": "guard: empty",
            },  # not the judge's
        ],
    )
    assert result.pairs == 4
    assert result.agreement.value == 3 / 4
    assert result.one_order.value == (1 + 1 / 2 + 0 + 1) / 4
    assert result.same_position == 1 / 4
    assert result.label_mass == pytest.approx(0.8)
    # Labels A B A B against gold A B B B: observed 3/4, chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert result.kappa.value == pytest.approx(0.5)


def test_sizes_that_leave_a_stage_without_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_prompts"):
        DemoConfig(num_prompts=3)
    with pytest.raises(ConfigError, match="dpo_rounds"):
        DemoConfig(dpo_rounds=0)


def test_gold_reaches_no_command() -> None:
    commands = [stage.args for phase in plan(DemoConfig()) for track in phase.tracks for stage in track]
    assert not any("gold" in argument for args in commands for argument in args)


@pytest.mark.slow
def test_the_demo_runs_end_to_end_resumes_and_writes_a_page_that_needs_nothing_else(tmp_path, capsys) -> None:
    config = DemoConfig(
        output_dir=str(tmp_path / "demo"), num_prompts=64, num_eval_prompts=16, ppo_steps=2, dpo_rounds=1
    )
    run(config)
    assert "rlaif train ppo" in capsys.readouterr().out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']https?://""", page)
    assert page.count("<svg") == 6
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [p["name"] for p in summary["policies"]] == ["ppo-distilled", "ppo-direct", "dpo"]
    assert all(0 <= p["win_rate"]["value"] <= 1 for p in summary["policies"])
    assert len(summary["stages"]) == 11

    run(config)
    again = capsys.readouterr().out
    assert "$ rlaif" not in again, "finished stages are not run again"

    changed = DemoConfig(**{**asdict(config), "seed": 1})
    with pytest.raises(StorageError, match="other settings"):
        run(changed)

"""What the methods learn, and from which reward: `python -m tinyworld.study --output_dir OUT`.

Every arm of a study is a policy trained in the embedded world by a command that a user would type, once per seed; its
settings are a file under `configs/study`. Seed by seed, what the arms share is made once: prompts, candidates, the
judge's labels, reward models and their servers. The same command again goes on where it stopped, and takes up arms
that were added; what the finished seeds show is written after each. Gold utility is read for the report alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlaif.errors import RlaifError
from rlaif.storage import write_atomic
from tinyworld.ablation import gold_pairs
from tinyworld.arms import (
    ALL,
    NOISY,
    STUDIES,
    WRONG_LABELS,
    Arm,
    RewardModel,
    Study,
    arms_of,
    reward_models_of,
)
from tinyworld.learning import insert_report, write_report
from tinyworld.pairs import WRITERS
from tinyworld.stages import CONFIGS, JUDGE, POLICY, Phase, Stage, remember, run_phase, write_prompts

RM_SETTINGS = CONFIGS / "rm.yaml"

GOLD_PAIRS = 400
"""Pairs that a reward model's accuracy is measured on."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything.

    Attributes:
        num_prompts: posts to label and to train on.
        num_eval_prompts: unseen posts on which the policies are compared.
        max_steps: steps of every arm, instead of those of its settings.
    """

    num_prompts: int
    num_eval_prompts: int
    max_steps: int | None = None


def plan(out: Path, seed: int, studies: Sequence[Study], sizes: Sizes) -> list[Phase]:
    """The commands of one seed, in order; `out` is its folder."""
    arms = arms_of(studies)

    def to(folder: str) -> tuple[str, ...]:
        return ("--output_dir", str(out / folder), "--seed", str(seed))

    def align(arm: Arm) -> tuple[Stage]:
        what = ("--config", str(settings_file(arm.settings)), "--dataset", str(out / "prompts.jsonl"))
        steps = () if sizes.max_steps is None else ("--max_steps", str(sizes.max_steps))
        args = ("train", arm.command, *what, *arm.options, *steps, "--reward_server", "{server}")
        return (Stage(arm.name, (*args, *to(arm.name)), arm.reward),)

    def compare(name: str, baseline: str, others: Sequence[Arm]) -> tuple[Stage]:
        policies = ("--model_name_or_path", *(str(out / arm.name) for arm in others), "--baseline", baseline)
        how = ("--ref_model", POLICY, "--reward_function", "tinyworld.gold:rewards", "--max_new_tokens", "40")
        what = ("--dataset", str(out / "eval-prompts.jsonl"), *policies, *how)
        return (Stage(f"eval-{name}", ("eval", "policy", *what, *to(f"eval/{name}"))),)

    def distil(name: str, model: RewardModel) -> tuple[Stage, ...]:
        what = ("--config", str(RM_SETTINGS), "--dataset", str(out / model.labels))
        judged = ("--model", str(out / name), "--dataset", str(out / "gold-pairs.jsonl"))
        return (
            Stage(name, ("train", "rm", *what, *model.options, *to(name))),
            Stage(f"eval-{name}", ("eval", "rm", *judged, "--output_dir", str(out / "eval" / name))),
        )

    models = reward_models_of(arms)
    judge = ("--judge", JUDGE, "--rubric", "tinyworld:pair", "--dataset", str(out / "candidates"))
    candidates = ("--model_name_or_path", POLICY, "--dataset", str(out / "prompts.jsonl"))
    sampling = (*candidates, "--num_return_sequences", "3", "--max_new_tokens", "40")
    labelling = [
        Stage("sample", ("sample", *sampling, *to("candidates"))),
        Stage("label", ("label", "pairs", *judge, *to("labels"))),
    ]
    if any(model.labels == NOISY for model in models.values()):
        what = ("--labels", str(out / "labels"), "--wrong", str(WRONG_LABELS), "--seed", str(seed))
        labelling.append(Stage("noise", (*what, "--output", str(out / NOISY)), module="tinyworld.noise"))
    return [
        Phase(
            f"Seed {seed}: label with the judge and distil the labels; meanwhile, the judge itself as the reward",
            (
                (*labelling, *(stage for name, model in models.items() for stage in distil(name, model))),
                *(align(arm) for arm in arms if arm.reward == "judge"),
            ),
            {"judge": ("--judge", JUDGE, "--rubric", "tinyworld:score")},
        ),
        Phase(
            f"Seed {seed}: every method against the reward models",
            tuple(align(arm) for arm in arms if arm.reward in models),
            {name: ("--model", str(out / name)) for name in models},
        ),
        Phase(
            f"Seed {seed}: every policy on unseen posts, beside the SFT policy and beside each other, by gold",
            (
                compare(ALL, POLICY, arms),
                *(
                    compare(study.name, str(out / study.arms[-1].name), study.arms[:-1])
                    for study in studies
                    if study.versus
                ),
            ),
            {},
        ),
    ]


def settings_file(name: str) -> Path:
    """Where the settings of an arm are."""
    return CONFIGS / "study" / f"{name}.yaml"


def prepare(out: Path, seed: int, studies: Sequence[Study], sizes: Sizes) -> None:
    """Write the data of one seed, and see that what stands in its folder was begun with these settings.

    Raises:
        StorageError: it was begun with others.
    """
    out.mkdir(parents=True, exist_ok=True)
    remember({"seed": seed, **asdict(sizes)}, out / "study.json")
    (out / "settings").mkdir(exist_ok=True)
    arms = arms_of(studies)
    for name, model in reward_models_of(arms).items():
        _remember_settings(model, RM_SETTINGS, out / "settings" / f"{name}.json")
    for arm in arms:
        _remember_settings(arm, settings_file(arm.settings), out / "settings" / f"{arm.name}.json")
    write_prompts(out, seed=seed, num_prompts=sizes.num_prompts, num_eval_prompts=sizes.num_eval_prompts)
    rows = gold_pairs(WRITERS["so_so"], GOLD_PAIRS, seed)
    write_atomic(out / "gold-pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _remember_settings(made: Arm | RewardModel, settings: Path, path: Path) -> None:
    plain = json.loads(json.dumps(asdict(made)))
    del plain["title"]
    remember({**plain, "settings": settings.read_text(encoding="utf-8")}, path)


def main() -> None:
    """Command line; prints the report after every seed and writes it to `OUT/learning.md`, with pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [study.name for study in STUDIES]
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--studies", nargs="+", choices=names, default=names, help="which; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num_prompts", type=int, default=800, help="to label and to train on")
    parser.add_argument("--num_eval_prompts", type=int, default=300, help="to measure on")
    parser.add_argument("--max_steps", type=int, help="of every arm, instead of those of its settings")
    parser.add_argument(
        "--docs", type=Path, help="folder whose learning.md gets the report, between its marks"
    )
    args = parser.parse_args()
    out: Path = args.output_dir
    studies = [study for study in STUDIES if study.name in args.studies]
    sizes = Sizes(args.num_prompts, args.num_eval_prompts, args.max_steps)
    for i, seed in enumerate(args.seeds):
        began = time.monotonic()
        folder = out / f"seed-{seed}"
        prepare(folder, seed, studies, sizes)
        for phase in plan(folder, seed, studies, sizes):
            run_phase(phase, folder)
        print(f"\nseed {seed}: {time.monotonic() - began:.0f} s\n", flush=True)
        print(write_report(out, studies, args.seeds[: i + 1]), flush=True)
    if args.docs is not None:
        insert_report(out, args.docs)


if __name__ == "__main__":
    try:
        main()
    except RlaifError as err:
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)

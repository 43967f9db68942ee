"""Studies that train policies and compare them by gold: which, how, against which reward; the commands of a seed.

Every arm is a policy trained by a command that a user would type; its settings are a file under `configs/study`.
What arms share is made once for a seed, whichever study comes first: prompts, candidates, labels, reward models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlaif.report.page import Section
from tinyworld.lab.arms import JUDGED, Arm, Labels, RewardModel, head_to_head, reward_models_of
from tinyworld.lab.findings import report_policies
from tinyworld.lab.study import GOLD_PAIRS, Sizes, write_gold_pairs
from tinyworld.stages import CONFIGS, JUDGE, POLICY, Phase, Stage, remember, write_prompts

RM_SETTINGS = CONFIGS / "rm.yaml"


@dataclass(frozen=True, slots=True)
class PolicyStudy:
    """Policies to compare with the SFT policy and with each other; see `tinyworld.lab.study.Study`.

    Attributes:
        name: for the command line and for files.
        title: a heading.
        arms: what is compared.
        curves: whether the report draws how they learned.
        versus: pairs of arms to be compared head to head, response by response.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    curves: bool = False
    versus: tuple[tuple[Arm, Arm], ...] = ()

    def prepare(self, folder: Path, seed: int, sizes: Sizes) -> None:
        """Write the posts and the pairs that gold has labelled, and see that the arms' settings are what they were.

        Raises:
            StorageError: they are not.
        """
        settings = folder / "settings"
        settings.mkdir(exist_ok=True)
        for model in reward_models_of(self.arms):
            _remember_settings(asdict(model), RM_SETTINGS, settings / f"{model.name}.json")
        for arm in self.arms:
            plain = {**asdict(arm), "reward": arm.server}
            _remember_settings(plain, settings_file(arm.settings), settings / f"{arm.name}.json")
        write_prompts(
            folder, seed=seed, num_prompts=sizes.num_prompts, num_eval_prompts=sizes.num_eval_prompts
        )
        write_gold_pairs(folder, seed, sizes)

    def plan(self, folder: Path, seed: int, sizes: Sizes) -> list[Phase]:
        """Labels, beside policies rewarded by the judge; reward models; the other policies; comparisons."""
        commands = Commands(folder, seed, sizes)
        models = reward_models_of(self.arms)
        return [
            Phase(
                f"Seed {seed}: label with the judge; meanwhile, the judge itself as the reward",
                (
                    commands.label([model.labels for model in models]),
                    *(commands.train(arm) for arm in self.arms if arm.reward is None),
                ),
                {"judge": ("--judge", JUDGE, "--rubric", "tinyworld:score")},
            ),
            Phase(
                f"Seed {seed}: distil the labels into reward models, and hold these against gold",
                tuple(commands.distil(model) for model in models),
                {},
            ),
            Phase(
                f"Seed {seed}: every arm against its reward model",
                tuple(commands.train(arm) for arm in self.arms if arm.reward is not None),
                {model.name: ("--model", str(folder / model.name)) for model in models},
            ),
            Phase(
                f"Seed {seed}: every policy on unseen posts, beside the SFT policy and beside each other, by gold",
                (
                    commands.compare(self.name, POLICY, self.arms),
                    *(
                        commands.compare(head_to_head(one, other), str(folder / other.name), [one])
                        for one, other in self.versus
                    ),
                ),
                {},
            ),
        ]

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """What the arms learned, from which reward models, and who wins head to head."""
        return report_policies(self, folders)


@dataclass(frozen=True, slots=True)
class Commands:
    """The commands of one seed, as tracks of stages; `folder` is that of the seed."""

    folder: Path
    seed: int
    sizes: Sizes

    def label(self, labels: Sequence[Labels]) -> tuple[Stage, ...]:
        """Sample candidates, let the judge label their pairs, and what other labelers make of that."""
        candidates = ("--model_name_or_path", POLICY, "--dataset", str(self.folder / "prompts.jsonl"))
        sampling = (*candidates, "--num_return_sequences", "3", "--max_new_tokens", "40")
        return (
            Stage("sample", ("sample", *sampling, *self._to("candidates"))),
            *(self._label(made) for made in dict.fromkeys((JUDGED, *labels))),
        )

    def _label(self, made: Labels) -> Stage:
        if made.labeler is None:
            candidates = str(self.folder / "candidates")
            judge = ("--judge", JUDGE, "--rubric", "tinyworld:pair", "--dataset", candidates)
            return Stage(made.name, ("label", "pairs", *judge, *made.options, *self._to(made.path)))
        what = ("--labels", str(self.folder / JUDGED.path), "--output", str(self.folder / made.path))
        options = (option.replace("{seed}", str(self.seed)) for option in made.options)
        return Stage(made.name, (*what, *options), module=made.labeler)

    def distil(self, model: RewardModel) -> tuple[Stage, ...]:
        """Train a reward model, and hold it against gold."""
        name = model.name
        what = ("--config", str(RM_SETTINGS), "--dataset", str(self.folder / model.labels.path))
        judged = ("--model", str(self.folder / name), "--dataset", str(self.folder / GOLD_PAIRS))
        return (
            Stage(name, ("train", "rm", *what, *model.options, *self._to(name))),
            Stage(
                f"eval-{name}",
                ("eval", "rm", *judged, "--output_dir", str(self.folder / "eval" / name)),
            ),
        )

    def train(self, arm: Arm) -> tuple[Stage]:
        """Train a policy against the server of its reward."""
        what = ("--config", str(settings_file(arm.settings)), "--dataset", str(self.folder / "prompts.jsonl"))
        steps = () if self.sizes.max_steps is None else ("--max_steps", str(self.sizes.max_steps))
        args = ("train", arm.command, *what, *arm.options, *steps, "--reward_server", "{server}")
        return (Stage(arm.name, (*args, *self._to(arm.name)), arm.server),)

    def compare(self, name: str, baseline: str, arms: Sequence[Arm]) -> tuple[Stage]:
        """Let every arm answer the unseen posts, and gold compare the answers with those of `baseline`."""
        policies = ("--model_name_or_path", *(str(self.folder / arm.name) for arm in arms))
        how = ("--ref_model", POLICY, "--reward_function", "tinyworld.gold:rewards", "--max_new_tokens", "40")
        what = ("--dataset", str(self.folder / "eval-prompts.jsonl"), *policies, "--baseline", baseline)
        return (Stage(f"eval-{name}", ("eval", "policy", *what, *how, *self._to(f"eval/{name}"))),)

    def _to(self, folder: str) -> tuple[str, ...]:
        return ("--output_dir", str(self.folder / folder), "--seed", str(self.seed))


def settings_file(name: str) -> Path:
    """Where the settings of an arm are."""
    return CONFIGS / "study" / f"{name}.yaml"


def _remember_settings(made: Mapping[str, Any], settings: Path, path: Path) -> None:
    plain = {key: value for key, value in made.items() if key != "title"}
    plain["settings"] = settings.read_text(encoding="utf-8")
    remember(json.loads(json.dumps(plain)), path)

"""`rlaif lab`: run studies over seeds and write what they found.

The same command again goes on where it stopped. What the finished seeds show is written after each.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path

import numpy as np

from rlaif.storage import only_writer
from tinyworld.lab import labelers, methods, noise, overoptimisation, rewards, soft
from tinyworld.lab.config import LabConfig
from tinyworld.lab.page import insert_report, write_report
from tinyworld.lab.study import Sizes, Study
from tinyworld.results import machine
from tinyworld.stages import marker, remember, run_phase

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        labelers.STUDY,
        rewards.STUDY,
        noise.STUDY,
        soft.STUDY,
        overoptimisation.STUDY,
        methods.STUDY,
    )
}


def run(config: LabConfig) -> None:
    """Run the stages of every study and seed that are not finished; print and write the findings.

    Raises:
        RlaifError: a stage failed, its own message stands above; or a folder was begun with other settings.
    """
    for name in config.study:
        run_study(STUDIES[name], config)


def run_study(study: Study, config: LabConfig) -> None:
    """The same for one study, which need not be among `STUDIES`.

    Raises:
        RlaifError: as above.
    """
    sizes = Sizes(**{field.name: getattr(config, field.name) for field in fields(Sizes)})
    finished: dict[int, Path] = {}
    for seed in config.seeds:
        began = time.monotonic()
        folder = config.output_dir / f"seed-{seed}"
        with only_writer(folder):
            remember({"seed": seed, **asdict(sizes)}, folder / "lab.json")
            study.prepare(folder, seed, sizes)
            for phase in study.plan(folder, seed, sizes):
                run_phase(phase, folder, processes=config.processes)
        finished[seed] = folder
        print(f"\n{study.name}, seed {seed}: {time.monotonic() - began:.0f} s\n", flush=True)
        found = study.report(finished), _origin(study, finished, sizes)
        print(write_report(config.output_dir, study, *found), flush=True)
    if config.docs is not None:
        insert_report(config.docs, study, *found)
    print(f"-> {config.output_dir / study.name}.html", flush=True)


def _origin(study: Study, folders: Mapping[int, Path], sizes: Sizes) -> str:
    """Which seeds, when, where, and how long the study's commands took."""
    seconds = [
        math.fsum(
            json.loads(marker(folder, stage).read_text(encoding="utf-8"))["seconds"]
            for phase in study.plan(folder, seed, sizes)
            for track in phase.tracks
            for stage in track
        )
        for seed, folder in folders.items()
    ]
    return (
        f"Seeds {', '.join(map(str, folders))}; {date.today().isoformat()}; {machine()}; commands at work for "
        f"{np.mean(seconds) / 60:.1f} minutes a seed."
    )

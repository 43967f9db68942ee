"""Stages of a pipeline: what an interrupt ends, and what a failure leaves alone."""

import signal
import subprocess
import sys

import pytest

from rlaif.errors import RlaifError
from tinyworld.stages import Phase, Stage, run_phase

INTERRUPTED = """
import sys
from pathlib import Path
from tinyworld.stages import Phase, Stage, run_phase
serving = Stage("serving", ("0", "--bind", "127.0.0.1"), module="http.server")
after = Stage("after", (), module="this")
run_phase(Phase("title", ((serving, after), (after,)), {}), Path(sys.argv[1]), processes=1)
"""


def test_an_interrupt_of_the_pipeline_alone_ends_its_stage_and_begins_no_other(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as pipeline:
        assert pipeline.stdout is not None
        for line in pipeline.stdout:
            if "Serving HTTP" in line:
                break
        pipeline.send_signal(signal.SIGINT)
        rest = pipeline.stdout.read()
    assert pipeline.returncode != 0
    assert "after" not in rest
    assert not list(tmp_path.glob("stages/*"))


def test_a_failed_stage_lets_those_at_work_finish_and_begins_no_other(tmp_path):
    failing = Stage("failing", ("no-such-file",), module="compileall.no")
    working, never = Stage("working", (), module="this"), Stage("never", (), module="this")
    with pytest.raises(RlaifError, match="stopped at 'failing'"):
        run_phase(Phase("title", ((failing, never), (working,)), {}), tmp_path, processes=2)
    assert [path.stem for path in tmp_path.glob("stages/*")] == ["working"]

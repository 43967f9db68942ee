"""The committed protobuf code: made from the .proto files as they are, and good on old and new runtimes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

GENERATED = ("reward_pb2.py", "reward_pb2.pyi", "reward_pb2_grpc.py", "reward_pb2_grpc.pyi")

ROUND_TRIP = """
import sys
import google.protobuf, grpc
from protos.rlaif.reward.v1 import reward_pb2 as pb, reward_pb2_grpc

score = pb.ScoreOutcome(id=7, score=pb.Score(raw=-0.0, normalized=1.5, tokens=3, rationale="b\\u00e9cause"))
error = pb.ScoreOutcome(id=8)
error.error.code, error.error.message = 13, "no score"
sent = pb.ScoreResponse(outcomes=[score, error], model=pb.ModelVersion(name="m", version="v"))
got = pb.ScoreResponse.FromString(sent.SerializeToString())
assert got == sent
assert [o.WhichOneof("outcome") for o in got.outcomes] == ["score", "error"]
assert not pb.ScoreRequest().HasField("expected_version")
assert reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel("127.0.0.1:1")).Score is not None
print(google.protobuf.__version__, grpc.__version__)
"""


def test_the_generated_code_is_that_of_the_proto_files(repository: Path, tmp_path: Path) -> None:
    script = repository / "protos" / "generate.sh"
    done = subprocess.run([script, tmp_path], capture_output=True, text=True, timeout=280)
    if done.returncode != 0 and re.search("No matching distribution|Could not find a version", done.stderr):
        pytest.skip("the pinned generator cannot be installed: no package registry within reach")
    assert done.returncode == 0, done.stderr
    folder = Path("protos/rlaif/reward/v1")
    for name in GENERATED:
        fresh = (tmp_path / folder / name).read_text()
        assert fresh == (repository / folder / name).read_text(), f"{name} is stale: run make protos"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["oldest", "newest"])
def test_the_generated_code_works_on_the_oldest_and_newest_runtime(repository: Path, runtime: str) -> None:
    packages = ["grpcio", "protobuf", "googleapis-common-protos"]
    if runtime == "oldest":
        wanted = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
        packages = [r.replace(">=", "==") for r in wanted if re.split("[>=<]", r)[0] in packages]
        assert len(packages) == 3
    folder = install(repository / ".cache" / "protobuf-runtimes", runtime, packages)
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", ROUND_TRIP],
        env={"PYTHONPATH": f"{folder}:{repository}"},  # -S: nothing of this environment's site-packages
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if runtime == "oldest":
        assert done.stdout.split() == [
            re.split("==", p)[1] for p in sorted(packages, reverse=True) if "api" not in p
        ]


def install(cache: Path, name: str, packages: list[str]) -> Path:
    """A folder with these packages, kept between runs; skips where no registry can be reached."""
    folder = cache / f"{name}-py{sys.version_info.major}{sys.version_info.minor}"
    stamp = folder / ".complete"
    if not stamp.is_file() or stamp.read_text() != " ".join(packages):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, *packages], capture_output=True, text=True, timeout=280)
        if done.returncode != 0:
            pytest.skip(f"cannot install {' '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(" ".join(packages))
    return folder

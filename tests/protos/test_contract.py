"""The wire contract: messages recorded on the wire stay readable, byte for byte and field for field."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # noqa: F401 - known to the pool, so that details can be read

from protos.rlaif.reward.v1 import reward_pb2 as pb

GOLDEN = Path(__file__).parent / "golden"
TYPES: dict[str, type[Message]] = {
    "ScoreRequest": pb.ScoreRequest,
    "ScoreResponse": pb.ScoreResponse,
    "JudgeScore": pb.Score,
    "CompareResponse": pb.CompareResponse,
    "ScoreStreamResponse": pb.ScoreStreamResponse,
    "GetInfoResponse": pb.GetInfoResponse,
}


@pytest.mark.parametrize("name", sorted(TYPES))
def test_recorded_messages_read_as_they_were_written(name: str) -> None:
    recorded = (GOLDEN / f"{name}.binpb").read_bytes()
    message = TYPES[name].FromString(recorded)
    assert json.loads(json_format.MessageToJson(message)) == json.loads((GOLDEN / f"{name}.json").read_text())
    assert message.SerializeToString(deterministic=True) == recorded


def test_a_score_of_zero_is_a_score() -> None:
    outcome = pb.ScoreResponse.FromString((GOLDEN / "ScoreResponse.binpb").read_bytes()).outcomes[0]
    assert outcome.WhichOneof("outcome") == "score" and outcome.score.raw == 0.0


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not installed (pip install buf-bin)")
def test_a_change_that_breaks_callers_is_found(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "protos"
    shutil.copytree(repository / "protos", copy, ignore=shutil.ignore_patterns("__pycache__"))

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run([copy / "check.sh"], capture_output=True, text=True)

    assert check().returncode == 0
    proto = copy / "rlaif" / "reward" / "v1" / "reward.proto"
    proto.write_text(proto.read_text().replace("double raw = 1;", "float raw = 1;"))
    broken = check()
    assert broken.returncode != 0 and 'field "1" with name "raw"' in (broken.stdout + broken.stderr).lower()

"""Other gRPC implementations: buf curl (Go), grpclib (pure Python), grpc-js, an old C-core, and h2load (nghttp2)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.foreign.conftest import PEERS, REPOSITORY, installed, output, proto_folders, tool
from tests.hardening.http2 import frame
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess

STREAMED = {str(n): float(n) for n in range(1, 6)}
SERVICE = "rlaif.reward.v1.RewardService"


def test_buf_curl_finds_the_contract_by_reflection_scores_and_asks_for_health(server: ServerProcess) -> None:
    buf = tool("buf", "pip install buf-bin")

    def curl(path: str, *more: str) -> str:
        return output(
            buf,
            "curl",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            *more,
            f"http://{server.address}{path}",
        )

    listed = curl("", "--list-methods").split()
    assert {f"{SERVICE}/Score", f"{SERVICE}/ScoreStream", "grpc.health.v1.Health/Check"} <= set(listed)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    request = {"items": [{"id": 7, "conversation": {"messages": turns}}]}
    answer = json.loads(curl(f"/{SERVICE}/Score", "--data", json.dumps(request)))
    assert [(o["id"], o["score"]["raw"]) for o in answer["outcomes"]] == [(7, 3)]
    health = json.loads(curl("/grpc.health.v1.Health/Check", "--data", json.dumps({"service": SERVICE})))
    assert health == {"status": "SERVING"}


def test_grpclib(server: ServerProcess) -> None:
    folder = installed("grpclib")
    host, _, port = server.address.partition(":")
    path = f"{REPOSITORY}:{folder}"
    found = json.loads(output(sys.executable, str(PEERS / "grpclib_peer.py"), host, port, PYTHONPATH=path))
    assert found == {
        "scores": [1.0, 2.0],
        "refusal": ["INVALID_ARGUMENT", ["items"]],
        "stream": STREAMED,
        "health": 1,
    }


def test_grpc_js(server: ServerProcess) -> None:
    node, modules = tool("node", "apt-get install nodejs"), installed("node/node_modules")
    command = [node, str(PEERS / "grpc_js_peer.cjs"), server.address, *proto_folders()]
    assert json.loads(output(*command, NODE_PATH=str(modules))) == {
        "scores": [1, 2],
        "refusal": ["INVALID_ARGUMENT", True],
        "stream": STREAMED,
        "health": "SERVING",
    }


def test_the_grpcio_of_debian(server: ServerProcess, tmp_path: Path) -> None:
    needed = "apt-get install python3-grpcio python3-protobuf protobuf-compiler protobuf-compiler-grpc libprotobuf-dev"
    protoc, plugin = tool("protoc", needed), tool("grpc_python_plugin", needed)
    python = tool("/usr/bin/python3", needed)
    ours, common = proto_folders()
    files = (f"{common}/google/rpc/status.proto", f"{ours}/rlaif/reward/v1/reward.proto")
    output(
        protoc,
        f"-I{ours}",
        f"-I{common}",
        f"--plugin=protoc-gen-grpc_python={plugin}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        *files,
    )
    # Debian's google package does not look elsewhere for google.rpc.
    (tmp_path / "sitecustomize.py").write_text(
        f"import google\ngoogle.__path__.append({str(tmp_path / 'google')!r})\n"
    )
    found: dict[str, Any] = json.loads(
        output(python, str(PEERS / "debian_peer.py"), server.address, PYTHONPATH=str(tmp_path))
    )
    print("grpcio", found.pop("version"))
    assert found == {"scores": [1.0, 2.0], "refusal": ["INVALID_ARGUMENT", True], "stream": STREAMED}


def test_h2load(server: ServerProcess, tmp_path: Path) -> None:
    h2load = tool("h2load", "apt-get install nghttp2-client")
    body = tmp_path / "frame.bin"
    body.write_bytes(frame(score_request("abc").SerializeToString()))
    before = server.metric("rlaif_calls_total", method="Score", code="OK")
    command = [h2load, "-n2000", "-c4", "-m16", "-d", str(body), "-Hte: trailers"]
    printed = output(*command, "-Hcontent-type: application/grpc", f"http://{server.address}/{SERVICE}/Score")
    assert "2000 succeeded, 0 failed" in printed, printed
    # It reads the HTTP status and not grpc-status, so the server is asked.
    assert server.metric("rlaif_calls_total", method="Score", code="OK") - before == 2000

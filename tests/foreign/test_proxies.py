"""Through nginx, HAProxy and nghttpx, with the examples of deploy/: what a client gets is what the server said."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import trustme
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from policy_trainer.client import Access, RewardClient
from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.service import SERVICE
from rlaif.types import user_prompt, with_response
from tests.foreign.conftest import REPOSITORY, tool
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, free_port


class Certificate(NamedTuple):
    """Files, PEM."""

    roots: Path
    cert: Path
    key: Path
    both: Path


def certificate(folder: Path) -> Certificate:
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    files = Certificate(folder / "roots.pem", folder / "tls.crt", folder / "tls.key", folder / "tls.pem")
    ca.cert_pem.write_to_path(str(files.roots))
    leaf.cert_chain_pems[0].write_to_path(str(files.cert))
    leaf.private_key_pem.write_to_path(str(files.key))
    leaf.private_key_and_cert_chain_pem.write_to_path(str(files.both))
    return files


def example(name: str, *changes: tuple[str, str]) -> str:
    """An example of deploy/ with other addresses and files; every one of them must be in it."""
    text = (REPOSITORY / "deploy" / name).read_text()
    for old, new in changes:
        assert old in text, f"deploy/{name} has no {old}"
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, replicas: list[str], files: Certificate) -> list[str]:
    program = tool("nginx", "apt-get install nginx-light")
    text = example(
        "nginx.conf",
        ("listen 50051", f"listen 127.0.0.1:{port}"),
        ("reward-0:50051", replicas[0]),
        ("reward-1:50051", replicas[1]),
        ("/tls/tls.crt", str(files.cert)),
        ("/tls/tls.key", str(files.key)),
    )
    (folder / "nginx.conf").write_text(text)
    here = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;"
    return [program, "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf", "-g", here]


def haproxy(folder: Path, port: int, replicas: list[str], files: Certificate) -> list[str]:
    program = tool("haproxy", "apt-get install haproxy")
    text = example(
        "haproxy.cfg",
        ("bind :50051", f"bind 127.0.0.1:{port}"),
        ("reward-0:50051", replicas[0]),
        ("reward-1:50051", replicas[1]),
        ("/tls/tls.pem", str(files.both)),
    )
    (folder / "haproxy.cfg").write_text(text)
    return [program, "-f", f"{folder}/haproxy.cfg"]


def nghttpx(folder: Path, port: int, replicas: list[str], files: Certificate) -> list[str]:
    program = tool("nghttpx", "apt-get install nghttp2-proxy")
    backends = [f"-b{replica.replace(':', ',')};/;proto=h2" for replica in replicas]
    return [program, f"-f127.0.0.1,{port}", *backends, str(files.key), str(files.cert)]


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < until, "the proxy did not start"
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    both = [
        ServerProcess(tmp_path, model="length:0.05", max_batch_tokens=50, max_queue_tokens=200)
        for _ in range(2)
    ]
    for one in both:
        one.start()
    yield both
    for one in both:
        one.end(signal.SIGKILL)


def detail(error: grpc.aio.AioRpcError, message: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None, "the rich status was lost"
    next(d for d in status.details if d.Is(message.DESCRIPTOR)).Unpack(message)
    return message


async def conversation_with(address: str, roots: Path, too_large: set[grpc.StatusCode]) -> None:
    """Everything that a client may be told, told through a proxy."""
    credentials = grpc.ssl_channel_credentials(roots.read_bytes())
    async with grpc.aio.secure_channel(address, credentials) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
        health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        checked = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        answer = await stub.Score(score_request("a", "bb", "ccc"))
        assert [o.score.raw for o in answer.outcomes] == [1, 2, 3]

        with pytest.raises(grpc.aio.AioRpcError) as invalid:
            await stub.Score(pb.ScoreRequest())
        assert invalid.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [v.field for v in detail(invalid.value, BadRequest()).field_violations] == ["items"]

        flood = [stub.Score(score_request("x" * 50)) for _ in range(60)]
        refused = [
            e for e in await asyncio.gather(*flood, return_exceptions=True) if isinstance(e, Exception)
        ]
        assert refused, "two queues of 200 tokens do not hold 60 items of 50"
        for error in refused:
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail(error, RetryInfo()).retry_delay.ToMilliseconds() > 0

        with pytest.raises(grpc.aio.AioRpcError) as late:
            await asyncio.gather(*(stub.Score(score_request("x" * 50), timeout=0.02) for _ in range(3)))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        with pytest.raises(grpc.aio.AioRpcError) as large:
            await stub.Score(score_request("x" * (9 << 20)))
        assert large.value.code() in too_large

        async def requests() -> AsyncIterator[pb.ScoreStreamRequest]:
            for number in range(1, 41):
                yield pb.ScoreStreamRequest(request_id=number, request=score_request("x" * number))

        answers = {a.request_id: a.response.outcomes[0].score.raw async for a in stub.ScoreStream(requests())}
        assert answers == {n: float(n) for n in range(1, 41)}


@pytest.mark.parametrize("proxy", [nginx, haproxy, nghttpx])
def test_a_proxy_changes_nothing_that_a_client_is_told(
    proxy: Callable[..., list[str]], replicas: list[ServerProcess], tmp_path: Path
) -> None:
    files, port = certificate(tmp_path), free_port()
    command = proxy(tmp_path, port, [r.address for r in replicas], files)
    with running(command, port):
        too_large = {grpc.StatusCode.RESOURCE_EXHAUSTED}
        if proxy is haproxy:  # it may cut the message off before it passes the answer on
            too_large.add(grpc.StatusCode.CANCELLED)
        asyncio.run(conversation_with(f"127.0.0.1:{port}", files.roots, too_large))
        used = [replica.metric("rlaif_items_total", outcome="score") for replica in replicas]
        assert min(used) > 0, "both replicas were used"


@pytest.mark.parametrize("proxy", [nginx, haproxy])
def test_a_replica_may_end_behind_a_proxy(
    proxy: Callable[..., list[str]], replicas: list[ServerProcess], tmp_path: Path
) -> None:
    files, port = certificate(tmp_path), free_port()
    command = proxy(tmp_path, port, [r.address for r in replicas], files)
    asked = [with_response(user_prompt("q"), "x" * n) for n in range(1, 6)]
    with (
        running(command, port),
        RewardClient(f"127.0.0.1:{port}", give_up_after_s=30, access=Access(ca=files.roots)) as client,
    ):
        client.wait_ready(20)
        for number in range(60):
            if number == 20:
                assert replicas[0].end(signal.SIGTERM) == 0
            if number == 40:
                replicas[0].start()
            assert [reward.raw for reward in client.score(asked)] == [1, 2, 3, 4, 5]

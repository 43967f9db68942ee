"""Who gets in: tokens, roles, TLS, mutual TLS, and certificates and tokens that change under a running server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.security import RenewingContext, Role, Tokens
from reward_server.server import RewardServer
from rlaif.errors import ConfigError
from tests.reward_server.fakes import LengthScorer, score_request


@contextlib.asynccontextmanager
async def served(scorer: LengthScorer, **flags: Any) -> AsyncIterator[str]:
    server = RewardServer(ServeConfig(model="length", port=0, **flags))
    address = await server.start()
    await server.open(scorer)
    try:
        yield address
    finally:
        await server.drain()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def code_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as err:
        return str(err.code().name)
    return "OK"


# ---- tokens ----


@pytest.mark.parametrize(
    ("metadata", "score", "admin"),
    [
        ((), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("wrong"), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("s" * 5000), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ((("authorization", "Basic scoring-token"),), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("scoring-token"), "OK", "PERMISSION_DENIED"),
        (bearer("admin-token"), "OK", "NOT_FOUND"),
    ],
    ids=["none", "wrong", "long", "other-scheme", "score", "admin"],
)
def test_a_token_opens_what_its_role_may_do(
    tmp_path: Path, metadata: tuple[tuple[str, str], ...], score: str, admin: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text("# callers\nscore scoring-token\n\nadmin admin-token\n")

    async def scenario() -> None:
        scorer = LengthScorer()
        async with served(scorer, token_file=file) as address, grpc.aio.insecure_channel(address) as channel:
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            swap: Any = reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]
            assert await code_of(stub.Score(score_request("ab"), metadata=metadata)) == score
            assert scorer.computed == (["ab"] if score == "OK" else [])
            version = pb.ActivateModelRequest(version="v9")
            assert await code_of(swap.ActivateModel(version, metadata=metadata)) == admin
            health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            assert await code_of(health.Check(health_pb2.HealthCheckRequest())) == "OK", (
                "probes carry no token"
            )

    asyncio.run(scenario())


def test_a_refused_message_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("score scoring-token\n")

    async def scenario() -> None:
        async with (
            served(LengthScorer(), token_file=file) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            call = channel.unary_unary("/rlaif.reward.v1.RewardService/Score")
            # Bytes that are no protobuf would give INVALID_ARGUMENT if anyone looked at them.
            assert await code_of(call(b"\xff\xff")) == "UNAUTHENTICATED"
            assert await code_of(call(b"\xff\xff", metadata=bearer("scoring-token"))) == "INVALID_ARGUMENT"

    asyncio.run(scenario())


def test_tokens_change_with_their_file_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("score old\n")
    tokens = Tokens(file)
    assert (tokens.role(b"old"), tokens.role(b"new")) == (Role.SCORE, None)
    file.write_text("score old\nadmin new\n")
    assert (tokens.role(b"old"), tokens.role(b"new")) == (Role.SCORE, Role.ADMIN)
    file.write_text("nonsense")
    assert tokens.role(b"new") is Role.ADMIN
    file.unlink()
    assert tokens.role(b"new") is Role.ADMIN
    file.write_text("admin new\n")
    assert (tokens.role(b"old"), tokens.role(b"new")) == (None, Role.ADMIN)


@contextlib.contextmanager
def nothing_can_be_opened() -> Iterator[None]:
    """As in a process that has as many files open as it may: they can be looked at, and not read."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_token_file_that_could_not_be_read_is_read_as_soon_as_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text("score revoked\n")
    tokens = Tokens(file)
    file.write_text("score new\n")
    with nothing_can_be_opened():
        assert [tokens.role(b"revoked") for _ in range(3)] == [Role.SCORE] * 3
    assert len(caplog.records) == 1, "and the log is not filled by callers"
    assert (tokens.role(b"revoked"), tokens.role(b"new")) == (None, Role.SCORE)


def test_a_token_file_of_the_same_size_and_time_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("score old\n")
    before = file.stat()
    tokens = Tokens(file)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has moved on
        file.write_text("score new\n")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert (tokens.role(b"old"), tokens.role(b"new")) == (None, Role.SCORE)


def test_bytes_that_are_no_text_leave_the_tokens_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("score known\n")
    tokens = Tokens(file)
    file.write_bytes(b"score \xff\xfe\n")
    assert tokens.role(b"known") is Role.SCORE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "holds no token"),
        (b"owner x", "line 1"),
        (b"score a b", "line 1"),
        (b"score \xff", "not UTF-8 text, at byte 6"),
    ],
    ids=["empty", "no role", "three words", "no text"],
)
def test_a_token_file_that_makes_no_sense_is_refused_at_the_start(
    tmp_path: Path, text: bytes, says: str
) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=says):
        Tokens(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens(tmp_path / "none")


# ---- TLS ----


class Files:
    """Certificates of a server and a client, as files."""

    def __init__(self, folder: Path, ca: trustme.CA) -> None:
        self.ca, self.cert, self.key, self.roots = (
            ca,
            folder / "cert.pem",
            folder / "key.pem",
            folder / "ca.pem",
        )
        ca.cert_pem.write_to_path(str(self.roots))
        self.issue()

    def issue(self) -> None:
        leaf = self.ca.issue_cert("localhost", "127.0.0.1")
        leaf.private_key_pem.write_to_path(str(self.key))
        leaf.cert_chain_pems[0].write_to_path(str(self.cert))

    def flags(self) -> dict[str, Path]:
        return {"tls_cert": self.cert, "tls_key": self.key}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    yield Files(tmp_path, trustme.CA())


def trusting(ca: trustme.CA, identity: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    key = None if identity is None else identity.private_key_pem.bytes()
    chain = None if identity is None else identity.cert_chain_pems[0].bytes()
    return grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)


async def score_through(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """Status of a call on a connection of its own."""
    alone = (("grpc.use_local_subchannel_pool", 1),)
    channel = (
        grpc.aio.insecure_channel(address, options=alone)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=alone)
    )
    async with channel:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
        return await code_of(stub.Score(score_request("ab"), timeout=5))


def test_tls_serves_those_who_trust_it_and_refuses_plain_text(files: Files) -> None:
    async def scenario() -> None:
        async with served(LengthScorer(), **files.flags()) as address:
            assert await score_through(address, trusting(files.ca)) == "OK"
            assert await score_through(address, trusting(trustme.CA())) == "UNAVAILABLE"
            assert await score_through(address, None) == "UNAVAILABLE"

    asyncio.run(scenario())


def test_mutual_tls_lets_in_only_clients_of_its_authority(files: Files) -> None:
    async def scenario() -> None:
        async with served(LengthScorer(), **files.flags(), tls_client_ca=files.roots) as address:
            own, foreign = files.ca.issue_cert("trainer"), trustme.CA().issue_cert("trainer")
            assert await score_through(address, trusting(files.ca, own)) == "OK"
            assert await score_through(address, trusting(files.ca)) == "UNAVAILABLE"
            assert await score_through(address, trusting(files.ca, foreign)) == "UNAVAILABLE"
            past = datetime.now(UTC) - timedelta(days=1)
            expired = files.ca.issue_cert("trainer", not_before=past - timedelta(days=1), not_after=past)
            assert await score_through(address, trusting(files.ca, expired)) == "UNAVAILABLE"

    asyncio.run(scenario())


def test_renewed_certificates_are_taken_up_without_dropping_a_connection(files: Files) -> None:
    async def scenario() -> None:
        async with (
            served(LengthScorer(), **files.flags()) as address,
            grpc.aio.secure_channel(address, trusting(files.ca)) as channel,
        ):
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            assert await code_of(stub.Score(score_request("ab"))) == "OK"
            files.ca = trustme.CA()
            files.issue()
            assert await score_through(address, trusting(files.ca)) == "OK", "the new authority is served"
            assert await code_of(stub.Score(score_request("ab"))) == "OK", "the old connection lives on"
            files.cert.write_text("half a cer")
            assert await score_through(address, trusting(files.ca)) == "OK", "a broken file changes nothing"

    asyncio.run(scenario())


def served_to(ca: trustme.CA, server: ssl.SSLContext) -> bool:
    """Whether a client that trusts this authority gets through the handshake, in memory."""
    client = ssl.create_default_context()
    ca.configure_trust(client)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(back, there, server_hostname="localhost"),
        server.wrap_bio(there, back, server_side=True),
    ]
    for side in sides * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError:
            return False
    return True


@pytest.mark.parametrize("first", ["cert", "key"])
def test_http_serves_the_old_certificate_until_the_new_one_and_its_key_are_there(
    files: Files, first: str
) -> None:
    context = RenewingContext(files.cert, files.key, None)
    before = files.ca
    old = {path: path.read_bytes() for path in (files.cert, files.key)}
    files.ca = trustme.CA()
    files.issue()
    second = files.key if first == "cert" else files.cert
    new = second.read_bytes()
    second.write_bytes(old[second])
    for _ in range(2):
        context.renew()
        assert served_to(before, context.context) and not served_to(files.ca, context.context)
    second.write_bytes(new)
    context.renew()
    assert served_to(files.ca, context.context) and not served_to(before, context.context)


def test_certificates_that_could_not_be_read_are_read_as_soon_as_they_can_be(files: Files) -> None:
    context = RenewingContext(files.cert, files.key, None)
    before = files.ca
    files.ca = trustme.CA()
    files.issue()
    with nothing_can_be_opened():
        context.renew()
    assert served_to(before, context.context)
    context.renew()
    assert served_to(files.ca, context.context)


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"host": "0.0.0.0"}, "not loopback"),
        ({"host": "0.0.0.0", "token_file": Path("t")}, "not loopback"),
        ({"host": "0.0.0.0", "tls_cert": Path("c"), "tls_key": Path("k")}, "not loopback"),
        ({"tls_cert": Path("c")}, "belong together"),
        ({"tls_client_ca": Path("c")}, "needs --tls_cert"),
    ],
    ids=["bare", "no-tls", "no-tokens", "half-tls", "mtls-alone"],
)
def test_flags_that_would_leave_the_door_open_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServeConfig(model="m", **flags)


def test_the_open_door_has_to_be_asked_for() -> None:
    assert ServeConfig(model="m", host="0.0.0.0", insecure=True).insecure


def test_a_certificate_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing")

    async def scenario() -> None:
        server = RewardServer(ServeConfig(model="m", port=0, tls_cert=tmp_path / "x", tls_key=tmp_path / "x"))
        with pytest.raises(ConfigError, match="no PEM file"):
            await server.start()

    asyncio.run(scenario())


def test_a_certificate_and_a_key_in_each_others_place_stop_the_start(files: Files) -> None:
    async def scenario() -> None:
        server = RewardServer(ServeConfig(model="m", port=0, tls_cert=files.key, tls_key=files.cert))
        with pytest.raises(ConfigError, match=r"TLS files .* cannot be used"):
            await server.start()

    asyncio.run(scenario())

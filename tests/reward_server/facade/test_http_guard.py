"""What every HTTP request meets before a scorer does: limits, tokens, TLS, and clients that are slow or gone."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import trustme

from reward_server.config import ServeConfig
from reward_server.facade.body import MAX_DEPTH, parse
from reward_server.facade.faults import Fault
from reward_server.server import RewardServer
from rlaif.errors import ConfigError
from tests.reward_server.facade.doors import SequenceScorer, doors, until

JSON = {"Content-Type": "application/json"}


# ---- bodies ----


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"nonsense", 400),
        (b'{"input": "a"', 400),
        (b"[1]", 400),
        (b'{"input": "\xff"}', 400),
        (b'{"input": "\\ud800"}', 400),
        (b'{"input": "a", "query": ["a"], "queries": "a", "documents": "a", "x": NaN}', 400),
        (b'{"input": ' + b"9" * 5000 + b"}", 400),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"input": [' + b"[]," * 150_000 + b"[]]}", 400),
        (b'{"input": "' + b'\\"' * 400_000, 400),
        (b'{"input": "' + b'\\"' * 400_000 + b"\\", 400),
        (b'{"input": [' + b"null," * 150_000 + b"null]}", 400),
        (b'{"input": "' + b"a" * 2_000_000 + b'"}', 413),
    ],
    ids=[
        "empty",
        "text",
        "cut",
        "list",
        "bytes",
        "surrogate",
        "nan",
        "digits",
        "deep",
        "many",
        "quotes",
        "slash",
        "mistakes",
        "large",
    ],
)
def test_a_body_that_cannot_be_read_is_refused_and_nothing_is_computed(body: bytes, status: int) -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        async with doors(scorer, max_request_bytes=1_000_000) as served:
            for path in ("/get_reward", "/classify", "/score", "/v1/decisions"):
                async with served.session.post(served.url + path, data=body, headers=JSON) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["code"] == status
            assert scorer.batches == []
            assert (await served.get("/health"))[0] == 200

    asyncio.run(scenario())


def test_size_is_limited_however_the_body_comes() -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b"a" * 10_000

    async def scenario() -> None:
        async with doors(SequenceScorer(), max_request_bytes=100_000) as served:
            bomb = gzip.compress(b'{"input": "' + b"a" * 50_000_000 + b'"}')
            assert len(bomb) < 100_000
            zipped = {**JSON, "Content-Encoding": "gzip"}
            for body, headers in ((chunks(), JSON), (bomb, zipped)):
                async with served.session.post(
                    served.url + "/classify", data=body, headers=headers
                ) as response:
                    assert response.status == 413
            small = gzip.compress(b'{"input": "a"}')
            async with served.session.post(served.url + "/classify", data=small, headers=zipped) as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_depth_counts_containers_and_not_brackets_in_text() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse(deep.encode()) == json.loads(deep)
    with pytest.raises(Fault, match="nested"):
        parse(("[" + deep + "]").encode())
    text = {"a": '[[[["' * 1000 + "\\" + '"[' * 50}
    assert parse(json.dumps(text).encode()) == text


def test_too_many_items_are_refused_as_a_whole() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        async with doors(scorer, max_items=3) as served:
            assert (await served.post("/get_reward", {"query": ["a"] * 4}))[0] == 413
            assert (await served.post("/classify", {"input": ["a"] * 4}))[0] == 413
            assert scorer.batches == []
            assert (await served.post("/classify", {"input": ["a"] * 3}))[0] == 200

    asyncio.run(scenario())


def test_a_page_in_a_browser_cannot_post() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer()) as served:
            url = served.url + "/get_reward"
            async with served.session.post(
                url, data='{"query": ["a"]}'
            ) as response:  # text/plain, without CORS
                assert response.status == 415

    asyncio.run(scenario())


# ---- slow clients, and clients that are gone ----


async def talk(url: str, text: bytes) -> bytes:
    """What the server says before it closes the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text)
    answer = await reader.read()
    writer.close()
    return answer


def test_connections_that_send_nothing_or_half_are_closed() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer(), http_read_timeout_s=0.2) as served:
            silent, half, slow = await asyncio.gather(
                talk(served.url, b""),
                talk(served.url, b"POST /classify HTTP/1.1\r\nHost: a\r\n"),
                talk(
                    served.url,
                    b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{",
                ),
            )
            assert (silent, half) == (b"", b"")
            assert slow.startswith(b"HTTP/1.1 408 ")

    asyncio.run(scenario())


def test_a_caller_that_went_away_is_not_computed_for() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.gate.clear()
        async with doors(scorer) as served:
            first = asyncio.ensure_future(served.post("/classify", {"input": "first"}))
            await scorer.started.wait()
            gone = asyncio.ensure_future(served.post("/classify", {"input": "gone"}))
            await until(lambda: served.server._queued_tokens() > 0)
            gone.cancel()
            await until(lambda: served.server._queued_tokens() == 0)
            scorer.gate.set()
            assert (await first)[0] == 200
            assert scorer.computed == ["first"]

    asyncio.run(scenario())


def test_a_drained_server_finishes_what_it_has_begun() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.gate.clear()
        async with doors(scorer) as served:
            begun = asyncio.ensure_future(served.post("/classify", {"input": "begun"}))
            await scorer.started.wait()
            drained = asyncio.ensure_future(served.server.drain())
            while (await served.get("/health"))[0] != 503:
                pass
            async with served.session.post(served.url + "/classify", json={"input": "late"}) as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
            scorer.gate.set()
            assert (await begun)[0] == 200
            assert await drained
            assert scorer.computed == ["begun"]

    asyncio.run(scenario())


def test_an_overloaded_judge_tells_the_openai_client_to_come_back() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.kind = "judge"
        scorer.gate.clear()
        async with doors(scorer, max_queue_items=1) as served:
            first = asyncio.ensure_future(served.post("/score", {"queries": "q", "documents": "a"}))
            await scorer.started.wait()
            second = asyncio.ensure_future(served.post("/score", {"queries": "q", "documents": "a"}))
            await until(lambda: served.server._queued_tokens() == 1)
            api = openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="k", max_retries=0)
            levels: Any = [{"label": "1"}, {"label": "2"}]
            with pytest.raises(openai.RateLimitError) as caught:
                await api.decisions.create(
                    model="length",
                    input="a",
                    questions=[{"type": "score", "instructions": "?", "levels": levels}],
                )
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            scorer.gate.set()
            await asyncio.gather(first, second)

    asyncio.run(scenario())


# ---- who may call ----


def test_a_token_is_asked_for_before_the_body_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("score scoring-token\nadmin admin-token\n")

    async def scenario() -> None:
        scorer = SequenceScorer()
        async with doors(scorer, token_file=file) as served:
            body = {"input": "a"}
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "scoring-token"},
                {"Authorization": "Basic scoring-token"},
                {"Authorization": "Bearer " + "s" * 5000},
            ):
                status, answer = await served.post("/classify", body, headers=headers)
                assert (status, answer["error"]["type"]) == (401, "AuthenticationError")
            url = served.url + "/classify"
            async with served.session.post(
                url, data=b"\xff"
            ) as response:  # 415 or 400 if anyone looked at it
                assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert (await served.get("/v1/models"))[0] == 401
            assert (await served.get("/nowhere"))[0] == 401
            assert (await served.get("/health"))[0] == 200, "probes carry no token"
            assert scorer.batches == []
            for token in ("scoring-token", "admin-token"):
                headers = {"Authorization": f"Bearer {token}"}
                assert (await served.post("/classify", body, headers=headers))[0] == 200
            # OpenRLHF's client can be given a URL alone.
            with_password = served.url.replace("http://", "http://rlaif:scoring-token@")
            async with served.session.post(with_password + "/get_reward", json={"query": ["a"]}) as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_tls_is_that_of_grpc_and_renewed_files_are_taken_up(tmp_path: Path) -> None:
    authorities = [trustme.CA(), trustme.CA()]
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def write(authority: trustme.CA) -> None:
        issued = authority.issue_cert("127.0.0.1")
        key.write_bytes(issued.private_key_pem.bytes())
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    async def trusted(url: str, authority: trustme.CA) -> bool:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        connector = aiohttp.TCPConnector(ssl=context)
        try:
            async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
                return response.status == 200
        except aiohttp.ClientConnectorCertificateError:
            return False

    async def scenario() -> None:
        write(authorities[0])
        async with doors(SequenceScorer(), tls_cert=cert, tls_key=key) as served:
            assert served.url.startswith("https://")
            health = served.url + "/health"
            assert [await trusted(health, a) for a in authorities] == [True, False]
            write(authorities[1])
            assert [await trusted(health, a) for a in authorities] == [False, True]
            cert.write_text("half a file")
            assert [await trusted(health, a) for a in authorities] == [False, True]
            with pytest.raises(aiohttp.ClientError):
                await served.session.get(health.replace("https://", "http://"))

    asyncio.run(scenario())


def test_mutual_tls_turns_away_clients_without_a_certificate(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    issued = authority.issue_cert("127.0.0.1")
    key.write_bytes(issued.private_key_pem.bytes())
    cert.write_bytes(issued.cert_chain_pems[0].bytes())
    authority.cert_pem.write_to_path(str(ca))

    async def status(url: str, client: trustme.LeafCert | None) -> int | None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if client is not None:
            client.configure_cert(context)
        connector = aiohttp.TCPConnector(ssl=context)
        try:
            async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
                return response.status
        except (aiohttp.ClientError, ssl.SSLError):
            return None

    async def scenario() -> None:
        async with doors(SequenceScorer(), tls_cert=cert, tls_key=key, tls_client_ca=ca) as served:
            url = served.url + "/health"
            assert await status(url, None) is None
            assert await status(url, stranger.issue_cert("caller@example.org")) is None
            assert await status(url, authority.issue_cert("caller@example.org")) == 200

    asyncio.run(scenario())


def test_a_port_in_use_is_one_clear_line() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer()) as served:
            port = int(served.url.rpartition(":")[2])
            second = RewardServer(ServeConfig(model="length", port=0, http_port=port))
            with pytest.raises(ConfigError, match="--http_port"):
                await second.start()
            await second.drain()

    asyncio.run(scenario())


# ---- what clients probe ----


def test_probes_find_what_vllm_clients_look_for() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer(max_tokens_per_item=77), served_model_name="my-rm") as served:
            assert await served.get("/health") == (200, "")
            api = openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="k")
            models = [model async for model in await api.models.list()]
            assert [m.id for m in models] == ["my-rm", "length"]
            status, text = await served.get("/v1/models")
            assert json.loads(text)["data"][0]["max_model_len"] == 77
            status, text = await served.get("/version")
            assert (status, set(json.loads(text))) == (200, {"version"})
            status, text = await served.get("/nowhere")
            assert (status, json.loads(text)["error"]["code"]) == (404, 404)
            status, text = await served.get("/classify")
            assert (status, json.loads(text)["error"]["code"]) == (405, 405)
            async with served.session.post(served.url + "/classify", json={"input": "a"}) as response:
                assert response.headers["X-Model-Version"] == "length-1"

    asyncio.run(scenario())


def test_requests_are_counted_by_path_and_status() -> None:
    async def scenario() -> str:
        async with doors(SequenceScorer(), metrics_port=0) as served:
            await served.post("/classify", {"input": "a"})
            await served.post("/classify", {"input": 1})
            await served.get("/some/secret/path")
            port = served.server.metrics_port
            async with served.session.get(f"http://127.0.0.1:{port}/metrics") as response:
                return await response.text()

    text = asyncio.run(scenario())
    assert 'rlaif_calls_total{code="200",method="POST /classify"} 1.0' in text
    assert 'rlaif_calls_total{code="400",method="POST /classify"} 1.0' in text
    assert 'rlaif_calls_total{code="404",method="other"} 1.0' in text
    assert "secret" not in text

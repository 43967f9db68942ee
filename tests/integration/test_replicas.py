"""Several reward servers behind one client: real processes that are killed, drained, restarted and joined."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from policy_trainer.client import Access, AsyncRewardClient, RewardClient
from rlaif.errors import RewardServerError
from rlaif.types import Conversation, user_prompt, with_response
from tests.reward_server.process import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    both = [ServerProcess(tmp_path), ServerProcess(tmp_path)]
    for one in both:
        one.start()
    yield both
    for one in both:
        one.end(signal.SIGKILL)


def conversations(n: int) -> list[Conversation]:
    return [with_response(user_prompt("q"), "x" * (i % 30 + 1)) for i in range(n)]


def answered(server: ServerProcess) -> float:
    return server.metric("rlaif_calls_total", method="Score", code="OK")


class Load:
    """Scores without pause in the background; every answer is checked."""

    def __init__(self, client: RewardClient) -> None:
        self.client = client
        self.calls = 0
        self.wrong: list[object] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        asked = conversations(20)
        while not self._stop.is_set():
            try:
                raws = [reward.raw for reward in self.client.score(asked)]
            except RewardServerError as err:
                self.wrong.append(err)
                return
            if raws != [float(len(c[-1].content)) for c in asked]:
                self.wrong.append(raws)
            self.calls += 1

    def more(self, calls: int) -> None:
        """Wait for so many further calls."""
        wanted, until = self.calls + calls, time.monotonic() + 60
        while self.calls < wanted:
            assert not self.wrong and time.monotonic() < until
            time.sleep(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def test_no_call_fails_when_a_replica_is_killed_comes_back_or_is_drained(
    replicas: list[ServerProcess],
) -> None:
    first, second = replicas
    with RewardClient(f"{first.address},{second.address}", give_up_after_s=30) as client:
        assert client.wait_ready(30).name == "length"
        with Load(client) as load:
            load.more(50)
            first.end(signal.SIGKILL)
            load.more(50)
            first.start()
            load.more(50)
            assert second.end(signal.SIGTERM) == 0
            load.more(50)
        assert load.wrong == []


def test_no_call_fails_while_replicas_are_restarted_one_after_the_other(
    replicas: list[ServerProcess], request: pytest.FixtureRequest
) -> None:
    restarts = 10 if request.config.getoption("--soak") else 2
    with RewardClient(",".join(r.address for r in replicas), give_up_after_s=30) as client:
        client.wait_ready(30)
        with Load(client) as load:
            for number in range(restarts):
                load.more(30)
                assert replicas[number % 2].end(signal.SIGTERM) == 0
                replicas[number % 2].start()
            load.more(30)
        assert load.wrong == []


def test_replicas_are_used_in_turn_and_one_that_joins_gets_its_share(
    replicas: list[ServerProcess], tmp_path: Path
) -> None:
    first, second = replicas
    second.end(signal.SIGKILL)
    with RewardClient(f"{first.address},{second.address}", give_up_after_s=30) as client:
        client.wait_ready(30)
        client.score(conversations(5))
        second.start()
        with Load(client) as load:
            while not answered(second):  # the channel finds it again within a second
                load.more(20)
            before = [answered(one) for one in replicas]
            load.more(200)
            done = [answered(one) - earlier for one, earlier in zip(replicas, before, strict=True)]
            assert 0.4 <= done[1] / sum(done) <= 0.6
            first.end(signal.SIGKILL)  # so the rest can only come from it
            load.more(20)
        assert load.wrong == []


def test_when_no_replica_is_left_the_client_says_so_in_one_line(replicas: list[ServerProcess]) -> None:
    with RewardClient(",".join(r.address for r in replicas), give_up_after_s=0.5) as client:
        client.wait_ready(30)
        for one in replicas:
            one.end(signal.SIGKILL)
        with pytest.raises(RewardServerError, match="no reward server at 127") as caught:
            client.score(conversations(1))
        assert "\n" not in str(caught.value)


def test_tls_and_a_token_open_a_guarded_server_to_both_clients(tmp_path: Path) -> None:
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    cert, key, roots, tokens = (tmp_path / name for name in ("cert", "key", "roots", "tokens"))
    leaf.cert_chain_pems[0].write_to_path(str(cert))
    leaf.private_key_pem.write_to_path(str(key))
    ca.cert_pem.write_to_path(str(roots))
    tokens.write_text("score open-sesame\n")
    replica = ServerProcess(tmp_path, tls_cert=cert, tls_key=key, token_file=tokens)
    replica.start()
    try:
        with RewardClient(replica.address, access=Access("open-sesame", roots)) as client:
            assert client.score(conversations(3))[2].raw == 3.0

        async def awaited() -> float | None:
            async with AsyncRewardClient(replica.address, access=Access("open-sesame", roots)) as client:
                await client.wait_ready(10)
                return (await client.score(conversations(3)))[2].raw

        assert asyncio.run(awaited()) == 3.0
        with (
            RewardClient(replica.address, access=Access("wrong", roots)) as client,
            pytest.raises(RewardServerError, match="RLAIF_REWARD_TOKEN"),
        ):
            client.info()
    finally:
        replica.end(signal.SIGKILL)

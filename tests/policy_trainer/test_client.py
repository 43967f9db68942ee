import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_trainer.client import RewardClient, parse_address
from policy_trainer.reward_source import FunctionReward, Reward, RewardSource, missing_by_reason
from policy_trainer.wire import encode, split
from protos.rlaif.reward.v1 import reward_pb2
from rlaif.errors import ConfigError, RewardServerError
from rlaif.types import Conversation, Pair, user_prompt, with_response
from tests.policy_trainer.reward_servers import (
    NumberServer,
    conversation,
    free_port,
    overloaded,
    refusing,
    serving,
    too_late,
)


@pytest.fixture
def numbers() -> NumberServer:
    return NumberServer()


@pytest.fixture
def address(numbers: NumberServer) -> Iterator[str]:
    with serving(numbers) as at:
        yield at


@pytest.fixture
def client(address: str) -> Iterator[RewardClient]:
    with RewardClient(address, timeout_s=20, give_up_after_s=20) as opened:
        yield opened


def test_order_is_kept_across_split_requests(client: RewardClient, numbers: NumberServer) -> None:
    rewards = client.score([conversation(str(i)) for i in range(11)])
    assert [r.raw for r in rewards] == [float(i) for i in range(11)]
    assert sorted(len(call.items) for call in numbers.calls) == [3, 4, 4]


def test_value_is_the_servers_normalised_score(client: RewardClient) -> None:
    assert client.score([conversation("5")]) == [Reward(value=2.0, raw=5.0, reason=None, tokens=3)]


def test_nothing_to_score_is_no_request(client: RewardClient, numbers: NumberServer) -> None:
    assert client.score([]) == []
    assert numbers.calls == []


def test_an_item_error_is_a_missing_reward_with_its_reason_and_spares_its_siblings(
    client: RewardClient,
) -> None:
    rewards = client.score([conversation("1"), conversation("what?"), conversation("3")])
    assert [r.raw for r in rewards] == [1.0, None, 3.0]
    assert rewards[1] == Reward(None, None, "out_of_range: what? is no number")
    assert missing_by_reason(rewards) == {"out_of_range": 1}


def test_a_score_of_zero_is_a_score(client: RewardClient, numbers: NumberServer) -> None:
    numbers.center = 0.0
    assert client.score([conversation("0")])[0].value == 0.0


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_a_score_that_is_not_finite_is_missing(client: RewardClient, text: str) -> None:
    reward = client.score([conversation(text)])[0]
    assert reward.value is None and (reward.reason or "").startswith("not_finite")


def test_requests_stay_below_the_servers_byte_limit(numbers: NumberServer) -> None:
    numbers.max_items, numbers.max_request_bytes = 100, 5000
    with serving(numbers) as at, RewardClient(at) as client:
        long = [conversation("x" * 1500 + str(i)) for i in range(6)]
        rewards = client.score([*long, conversation("x" * 6000 + "7")])
    assert [r.raw for r in rewards[:6]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert rewards[6].value is None and (rewards[6].reason or "").startswith("too_large")
    assert len(numbers.calls) == 3
    assert all(call.ByteSize() <= 5000 for call in numbers.calls)


def test_text_that_is_not_unicode_is_missing_and_spares_its_siblings(client: RewardClient) -> None:
    rewards = client.score([conversation("1"), conversation("\ud800"), conversation("2")])
    assert [r.raw for r in rewards] == [1.0, None, 2.0]
    assert (rewards[1].reason or "").startswith("invalid_text")


def test_submit_overlaps_the_callers_work(client: RewardClient, numbers: NumberServer) -> None:
    release = threading.Event()
    numbers.moods = [lambda _: (release.wait(20), None)[1]]
    future = client.submit([conversation("4")])
    assert not future.done()
    release.set()
    assert future.result(20)[0].raw == 4.0


def test_overload_is_retried_no_sooner_than_the_server_asks(
    client: RewardClient, numbers: NumberServer
) -> None:
    client.info()
    numbers.moods = [overloaded(0.4), overloaded(0.4)]
    began = time.monotonic()
    assert client.score([conversation("4")])[0].raw == 4.0
    assert time.monotonic() - began >= 0.8
    assert len(numbers.calls) == 3


def test_resource_exhausted_without_retry_info_is_an_error_at_once(
    client: RewardClient, numbers: NumberServer
) -> None:
    numbers.moods = [refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large")] * 5
    with pytest.raises(RewardServerError, match="RESOURCE_EXHAUSTED: message too large"):
        client.score([conversation("4")])
    assert len(numbers.calls) == 1


def test_a_call_that_a_stopping_server_lets_go_of_is_made_again(
    client: RewardClient, numbers: NumberServer
) -> None:
    numbers.moods = [refusing(grpc.StatusCode.CANCELLED, "CANCELLED")]
    assert client.score([conversation("4")])[0].raw == 4.0
    assert len(numbers.calls) == 2


def test_a_call_refused_for_a_long_queue_is_made_again(client: RewardClient, numbers: NumberServer) -> None:
    numbers.moods = [too_late, too_late]
    assert client.score([conversation("4")])[0].raw == 4.0
    assert len(numbers.calls) == 3


def test_a_queue_that_stays_too_long_is_one_line(address: str, numbers: NumberServer) -> None:
    numbers.moods = [too_late] * 100
    with (
        RewardClient(address, give_up_after_s=0.5) as client,
        pytest.raises(RewardServerError, match="stayed overloaded"),
    ):
        client.score([conversation("4")])


def test_a_refused_request_is_not_retried(client: RewardClient, numbers: NumberServer) -> None:
    numbers.moods = [refusing(grpc.StatusCode.INVALID_ARGUMENT, "items[0] ends with a user turn")] * 5
    with pytest.raises(RewardServerError, match="INVALID_ARGUMENT: items"):
        client.score([conversation("4")])
    assert len(numbers.calls) == 1


def test_lasting_overload_ends_with_one_line(address: str, numbers: NumberServer) -> None:
    numbers.moods = [overloaded(0.1)] * 100
    with (
        RewardClient(address, give_up_after_s=0.5) as client,
        pytest.raises(RewardServerError, match="overloaded") as caught,
    ):
        client.score([conversation("4")])
    assert "\n" not in str(caught.value)
    assert 2 <= len(numbers.calls) <= 6


def test_a_call_that_hangs_is_cut_by_the_deadline_and_made_again(address: str, numbers: NumberServer) -> None:
    release = threading.Event()
    numbers.moods = [lambda _: (release.wait(20), None)[1]]
    with RewardClient(address, timeout_s=0.3) as client:
        assert [reward.raw for reward in client.score([conversation("4")])] == [4.0]
    release.set()
    assert len(numbers.calls) == 2


def test_a_server_that_always_hangs_is_given_up(address: str, numbers: NumberServer) -> None:
    release = threading.Event()
    numbers.moods = [lambda _: (release.wait(20), None)[1]] * 9
    with (
        RewardClient(address, timeout_s=0.2, give_up_after_s=0.5) as client,
        pytest.raises(RewardServerError, match=r"did not answer Score within 0\.2 s"),
    ):
        client.score([conversation("4")])
    release.set()
    assert 2 <= len(numbers.calls) <= 3


def test_a_restart_is_ridden_out() -> None:
    port = free_port()
    with RewardClient(f"127.0.0.1:{port}", give_up_after_s=30) as client:
        with serving(NumberServer(), port=port):
            assert client.score([conversation("1")])[0].raw == 1.0
        future = client.submit([conversation(str(i)) for i in range(9)])
        time.sleep(0.3)
        assert not future.done()
        with serving(NumberServer(), port=port):
            assert [r.raw for r in future.result(30)] == [float(i) for i in range(9)]


def test_a_server_that_comes_back_with_another_model_is_refused() -> None:
    port = free_port()
    with RewardClient(f"127.0.0.1:{port}", give_up_after_s=30) as client:
        with serving(NumberServer(version="v1"), port=port):
            client.score([conversation("1")])
        other = NumberServer(version="v2")
        with (
            serving(other, port=port),
            pytest.raises(RewardServerError, match=r"another model.*serving version v2"),
        ):
            client.score([conversation("1")])


def test_another_version_than_expected_is_refused(address: str) -> None:
    with (
        RewardClient(address, expected_version="v9") as client,
        pytest.raises(RewardServerError, match="serves numbers version v1, not version v9"),
    ):
        client.wait_ready(5)


def test_the_pinned_version_goes_with_every_request(client: RewardClient, numbers: NumberServer) -> None:
    client.score([conversation("1")] * 9)
    assert {call.expected_version for call in numbers.calls} == {"v1"}


def test_a_dead_server_is_one_line_that_names_the_address_and_the_remedy() -> None:
    at = f"127.0.0.1:{free_port()}"
    with RewardClient(at) as client, pytest.raises(RewardServerError) as caught:
        client.wait_ready(0.3)
    assert str(caught.value) == (
        f"no reward server at {at} (connection refused); start one: "
        f"rlaif serve --model hf:DIR --port {at.split(':')[1]}"
    )


def test_waiting_for_a_server_that_starts_late_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with RewardClient(f"127.0.0.1:{port}") as client:
        ready: Future[str] = Future()
        thread = threading.Thread(target=lambda: ready.set_result(client.wait_ready(30).name))
        thread.start()
        time.sleep(0.2)
        with serving(NumberServer(), port=port):
            assert ready.result(30) == "numbers"
        thread.join()
    assert capsys.readouterr().err.count("waiting up to 30 s: no reward server at") == 1


def test_a_server_that_is_away_in_the_middle_of_a_run_is_announced_once_and_its_return_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    with RewardClient(f"127.0.0.1:{port}", give_up_after_s=60.0, max_in_flight=2) as client:
        with serving(NumberServer(), port=port):
            client.score([conversation("1")])
        pending = [client.submit([conversation("2")]) for _ in range(2)]
        said = ""
        while "waiting up to 60 s for the reward server" not in said:  # bounded by the test's timeout
            time.sleep(0.1)
            said += capsys.readouterr().err
        with serving(NumberServer(), port=port):
            assert [reward.raw for call in pending for reward in call.result(60)] == [2.0, 2.0]
        said += capsys.readouterr().err
    assert said.count("waiting up to 60 s") == 1 and said.count("answers again, after") == 1


def test_a_full_queue_is_not_a_server_that_is_away(
    client: RewardClient, numbers: NumberServer, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers.moods = [overloaded(0.9)] * 5  # together longer than the wait that is told of
    assert client.score([conversation("2")])[0].raw == 2.0
    assert len(numbers.calls) == 6 and capsys.readouterr().err == ""


def test_a_server_that_answers_other_calls_is_not_away(capsys: pytest.CaptureFixture[str]) -> None:
    let_go = threading.Event()

    class StuckOnce(NumberServer):
        def Score(
            self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext
        ) -> reward_pb2.ScoreResponse:
            if request.items[0].conversation.messages[-1].content == "2" and not let_go.is_set():
                let_go.wait(60)
            return super().Score(request, context)

    with serving(StuckOnce()) as at, RewardClient(at, timeout_s=4.0, give_up_after_s=60.0) as client:
        stuck = client.submit([conversation("2")])
        for _ in range(9):  # until its first deadline has passed
            wait([stuck], timeout=0.5)
            client.score([conversation("1")])
        let_go.set()
        assert stuck.result(60)[0].raw == 2.0
    assert capsys.readouterr().err == ""


def test_an_http_port_is_said_to_be_one_and_is_not_waited_for() -> None:
    class Door(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with (
            RewardClient(f"127.0.0.1:{server.server_address[1]}") as client,
            pytest.raises(RewardServerError, match="give the gRPC port"),
        ):
            client.wait_ready(3600)
        server.shutdown()
        thread.join()


def test_a_server_that_is_still_loading_is_said_to_be() -> None:
    with (
        serving(NumberServer(), healthy=False) as at,
        RewardClient(at) as client,
        pytest.raises(RewardServerError, match="still loading"),
    ):
        client.wait_ready(0.3)


def test_info_tells_limits_and_scale(client: RewardClient) -> None:
    info = client.wait_ready(10)
    assert (info.name, info.version, info.kind) == ("numbers", "v1", "reward_model")
    assert (info.max_items, info.max_request_bytes, info.center, info.scale) == (4, 1 << 20, 1.0, 2.0)


def test_a_judge_is_told_from_a_reward_model() -> None:
    with serving(NumberServer(kind=reward_pb2.SCORER_KIND_JUDGE)) as at, RewardClient(at) as client:
        assert client.info().kind == "judge"


def test_closing_ends_a_call_that_waits_for_a_dead_server() -> None:
    client = RewardClient(f"127.0.0.1:{free_port()}", give_up_after_s=600)
    future = client.submit([conversation("1")])
    time.sleep(0.2)
    client.close()
    with pytest.raises(RewardServerError, match="closed"):
        future.result(10)


FORK = """
import os, signal, sys
from policy_trainer.client import RewardClient
from rlaif.errors import RewardServerError
from tests.policy_trainer.reward_servers import conversation

client = RewardClient(sys.argv[1])
assert client.score([conversation("5")])[0].raw == 5.0
child = os.fork()
if child == 0:
    signal.alarm(30)  # a call that hangs is killed
    for use in (lambda: client.score([conversation("6")]), lambda: RewardClient(sys.argv[1])):
        try:
            use()
        except RewardServerError as err:
            print(err, flush=True)
    client.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(client.score([conversation("7")])[0].raw)
client.close()
"""


def test_a_fork_of_a_process_with_a_client_is_told_so_and_does_not_hang(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, address], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    old, opened, after = done.stdout.splitlines()
    assert old == opened and "fork" in old and '"spawn"' in old
    assert after == "7.0", "the parent's client goes on"


@pytest.mark.parametrize(
    "text", ["", "localhost", "localhost:", ":50051", "localhost:0", "http://a:1", "a:99999"]
)
def test_an_address_that_is_not_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


@given(
    sizes=st.lists(st.integers(0, 300), max_size=30),
    max_items=st.integers(1, 7),
    max_bytes=st.integers(400, 1000),
)
def test_splitting_keeps_order_and_limits(sizes: list[int], max_items: int, max_bytes: int) -> None:
    messages = [encode(conversation("x" * size)) for size in sizes]
    items = [(i, m) for i, m in enumerate(messages) if m is not None]
    parts = split(items, max_items, max_bytes)
    assert [item for part in parts for item in part] == items
    for part in parts:
        request = reward_pb2.ScoreRequest(
            items=[reward_pb2.ScoreItem(id=i, conversation=m) for i, m in enumerate(m for _, m in part)]
        )
        assert 1 <= len(part) <= max_items
        assert request.ByteSize() <= max_bytes


def test_a_function_is_a_reward_source() -> None:
    def length(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        assert all(p[-1].role == "user" for p in prompts)
        return [float(len(r)) if r else None for r in responses]

    source: RewardSource = FunctionReward(length, name="length", center=1.0, scale=2.0)
    chats = [with_response(user_prompt("q"), text) for text in ("abc", "")]
    rewards = source.submit(chats).result(10)
    source.close()
    assert rewards[0] == Reward(value=1.0, raw=3.0)
    assert rewards[1].value is None and (rewards[1].reason or "").startswith("no_reward")


def test_a_function_with_too_few_rewards_is_refused() -> None:
    source = FunctionReward(lambda prompts, responses: [])
    with pytest.raises(RewardServerError, match="0 rewards for 1"):
        source.score([conversation("1")])
    source.close()


def test_only_the_client_and_what_it_is_made_of_know_protobuf() -> None:
    import policy_trainer

    folder = Path(policy_trainer.__file__ or "").parent
    knowing = {
        p.name for p in folder.glob("*.py") if "import grpc" in p.read_text() or "_pb2" in p.read_text()
    }
    assert knowing == {"client.py", "wire.py", "grpc_errors.py", "admin.py"}


# ---- comparisons ----


def pair(a: str, b: str) -> Pair:
    return Pair(user_prompt("which number is greater"), a, b)


def test_comparisons_come_back_in_order_however_they_are_split(
    client: RewardClient, numbers: NumberServer
) -> None:
    found = client.submit_pairs([pair(str(i % 3), "1") for i in range(10)]).result()
    assert [c.p_a for c in found] == [(0.25, 0.5, 0.75)[i % 3] for i in range(10)]
    assert found[2].p_a_first == pytest.approx(0.95) and found[2].p_a_second == pytest.approx(0.55)
    assert sorted(len(call.items) for call in numbers.compared) == [2, 4, 4]


def test_a_pair_that_cannot_be_compared_is_missing_and_its_siblings_are_not(client: RewardClient) -> None:
    found = client.submit_pairs([pair("1", "many"), pair("2", "\ud800"), pair("2", "1")]).result()
    assert [c.p_a for c in found] == [None, None, 0.75]
    assert [(c.reason or "").partition(":")[0] for c in found] == ["out_of_range", "invalid_text", ""]


@pytest.mark.parametrize("sent", [1.5, -0.1, float("nan")])
def test_a_preference_that_is_no_probability_is_missing(
    client: RewardClient, numbers: NumberServer, sent: float
) -> None:
    numbers.preference = lambda difference: sent
    (found,) = client.submit_pairs([pair("2", "1")]).result()
    assert found.p_a is None and found.reason is not None


def test_comparisons_are_pinned_to_one_version(client: RewardClient, numbers: NumberServer) -> None:
    client.info()
    numbers.version = "v2"
    with pytest.raises(RewardServerError, match="another model"):
        client.submit_pairs([pair("2", "1")]).result()

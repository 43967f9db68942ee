"""Requests made of mutated bytes, and well-formed ones of every shape: each gets what the contract says."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.service import ADMIN_SERVICE, SERVICE
from tests.hardening.http2 import SCORE, connection, frame
from tests.reward_server.fakes import conversation, score_request
from tests.reward_server.process import ServerProcess

GOLDEN = Path(__file__).parents[1] / "protos" / "golden"
METHODS: dict[str, type[Message]] = {
    f"/{SERVICE}/Score": pb.ScoreRequest,
    f"/{SERVICE}/Compare": pb.CompareRequest,
    f"/{SERVICE}/GetInfo": pb.GetInfoRequest,
    f"/{ADMIN_SERVICE}/ActivateModel": pb.ActivateModelRequest,
    f"/{ADMIN_SERVICE}/UnloadModel": pb.UnloadModelRequest,
}
TYPED = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"}
LEAK = re.compile(r"Error\b|Exception|Traceback|google\.protobuf|_pb2|\.py\b| at 0x")
IN_FLIGHT = 32

HOSTILE = (
    b"\x1b" * 10_000,  # groups inside groups, never closed
    b"\x1b" * 10_000 + b"\x1c" * 10_000,
    b"\x0a\xff\xff\xff\xff\x0f",  # a length of 4 GiB
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80" * 11,  # a varint that does not end
    b"\x12\x02\xc3\x28",  # no UTF-8
    b"\x12\x03\xed\xa0\x80",  # a lone surrogate
    b"\x0b\x0c\x0f\x0e\x06\x07",  # wire types that do not exist, a group's end without its beginning
    b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an enum of -1
    b"\xfa\xff\xff\xff\x0f\x00",  # the largest field number
    b"\x00",
)


def seeds() -> list[bytes]:
    """Messages as clients send them, and others that a confused one might."""
    recorded = [path.read_bytes() for path in sorted(GOLDEN.glob("*.binpb"))]
    compare = pb.CompareItem(id=1, prompt=conversation("q"), response_a="a", response_b="bb")
    sent: list[Message] = [
        score_request("a", "", "ä€😀", expected_version="length-1", truncation=2, priority=2),
        score_request(*("x" * n for n in range(20)), deterministic=True, with_rationale=True),
        pb.CompareRequest(items=[compare], expected_version="length-1", priority=1),
        pb.ActivateModelRequest(version="length-1"),
        pb.ScoreStreamRequest(request_id=2**63, request=score_request("a")),
        pb.GetInfoRequest(),
    ]
    return [*recorded, *(message.SerializeToString() for message in sent)]


def mutated(rng: random.Random, corpus: list[bytes]) -> bytes:
    """One to four changes to a message: bits, bytes, pieces cut out, doubled, or taken from elsewhere."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.randint(0, 16))
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del data[at:end]
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[at:end] * rng.randint(1, 3)
            case 5:
                data[at:at] = rng.choice(HOSTILE)
            case _:
                other = rng.choice(corpus)
                data[at:end] = other[rng.randint(0, len(other)) :]
    return bytes(data)


def test_every_mutated_message_is_answered_as_what_it_is_or_refused_as_invalid(
    server: ServerProcess, size: Callable[[int, int], int]
) -> None:
    cases = size(3_000, 100_000)
    rng = random.Random(0)
    corpus = seeds()
    seen: Counter[str] = Counter()

    def drawn() -> Iterator[tuple[str, bytes]]:
        for method in METHODS:
            yield from ((method, data) for data in HOSTILE)
        for _ in range(cases):
            weights = (10, 6, 1, 1, 1)
            yield rng.choices(list(METHODS), weights)[0], mutated(rng, corpus)

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            calls = {method: channel.unary_unary(method) for method in METHODS}
            left = drawn()

            async def caller() -> None:
                for method, data in left:
                    try:
                        answer = await calls[method](data, timeout=60)
                        code, text = "OK", ""
                    except grpc.aio.AioRpcError as err:
                        answer, code, text = b"", err.code().name, err.details() or ""
                    seen[code] += 1
                    why = f"{method} {data[:200].hex()}: {code} {text}"
                    assert code in TYPED and not LEAK.search(text), why
                    check(METHODS[method], data, code, answer, why)

            await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))

    asyncio.run(scenario())
    print(dict(seen))
    assert min(seen["OK"], seen["INVALID_ARGUMENT"]) > cases // 20, "the mutations reach both sides"


def check(request_class: type[Message], data: bytes, code: str, answer: bytes, why: str) -> None:
    """Compare what the server made of the bytes with what protobuf makes of them here."""
    try:
        request = request_class.FromString(data)
    except DecodeError:
        assert code == "INVALID_ARGUMENT", why
        return
    if code != "OK" or not isinstance(request, pb.ScoreRequest | pb.CompareRequest):
        return
    response_class = pb.ScoreResponse if isinstance(request, pb.ScoreRequest) else pb.CompareResponse
    outcomes = response_class.FromString(answer).outcomes
    assert [o.id for o in outcomes] == [item.id for item in request.items], why
    codes = {o.error.code for o in outcomes if o.HasField("error")}
    assert codes <= {code_pb2.INVALID_ARGUMENT, code_pb2.OUT_OF_RANGE}, why


def test_calls_cut_off_inside_their_message_enter_no_handler_and_hurt_no_other(server: ServerProcess) -> None:
    async def scenario() -> None:
        whole = frame(score_request("ab").SerializeToString())
        async with connection(server.address) as peer:
            await peer.settled.wait()
            for part in (whole[:3], whole[:-1]):
                peer.request(SCORE, part)  # grpc leaves it unanswered until its caller gives up
            unknown = [peer.request(path, whole) for path in ("/", f"/{SERVICE}/Nothing")]
            good = [peer.request(SCORE, whole), peer.request(SCORE, whole + whole[:7])]
            await peer.flush()
            replies = [await asyncio.wait_for(peer.reply(stream), 10) for stream in (*unknown, *good)]
            assert [reply.status for reply in replies] == [12, 12, 0, 0]
        assert server.metric("rlaif_calls_total") == 2

    asyncio.run(scenario())


def test_every_id_comes_back_once_and_in_order_whatever_the_batch(
    server: ServerProcess, size: Callable[[int, int], int]
) -> None:
    rng = random.Random(1)

    def batches(count: int) -> Iterator[pb.ScoreRequest]:
        for _ in range(count):
            items = min(256, int(rng.lognormvariate(1.5, 1.2)) + 1)
            ids = rng.sample(range(2**32), items)
            responses = [
                rng.choice(("", "poison", "nan", *["x" * int(rng.lognormvariate(3, 1))] * 12)) for _ in ids
            ]
            turns = [("q", r) if rng.random() < 0.95 else ("q",) for r in responses]
            yield pb.ScoreRequest(
                items=[
                    pb.ScoreItem(id=i, conversation=conversation(*t)) for i, t in zip(ids, turns, strict=True)
                ],
                priority=rng.choice((pb.PRIORITY_INTERACTIVE, pb.PRIORITY_BULK)),
            )

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            left = batches(size(400, 10_000))

            async def caller() -> None:
                for request in left:
                    answer = await stub.Score(request, timeout=120)
                    assert [o.id for o in answer.outcomes] == [item.id for item in request.items]
                    for item, outcome in zip(request.items, answer.outcomes, strict=True):
                        turns = item.conversation.messages
                        response = turns[-1].content if len(turns) == 2 else None
                        if response is None:
                            assert outcome.error.code == code_pb2.INVALID_ARGUMENT
                        elif response in ("poison", "nan"):
                            assert outcome.error.code == code_pb2.INTERNAL
                        else:
                            assert outcome.score.raw == len(response)

            await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))

    asyncio.run(scenario())

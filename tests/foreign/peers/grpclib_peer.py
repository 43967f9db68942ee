"""grpclib (pure Python, no C-core) as a client: prints what it was told as JSON. Arguments: HOST PORT."""

from __future__ import annotations

import asyncio
import json
import sys

from google.rpc import error_details_pb2  # noqa: F401 - known to the pool, so that details can be read
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest

from protos.rlaif.reward.v1 import reward_pb2 as pb

SERVICE = "/rlaif.reward.v1.RewardService"


def request(*responses: str) -> pb.ScoreRequest:
    items = []
    for number, response in enumerate(responses):
        turns = [pb.Message(role="user", content="q"), pb.Message(role="assistant", content=response)]
        items.append(pb.ScoreItem(id=number, conversation=pb.Conversation(messages=turns)))
    return pb.ScoreRequest(items=items)


async def main(host: str, port: int) -> None:
    async with Channel(host, port) as channel:
        score = UnaryUnaryMethod(channel, f"{SERVICE}/Score", pb.ScoreRequest, pb.ScoreResponse)
        stream = StreamStreamMethod(
            channel, f"{SERVICE}/ScoreStream", pb.ScoreStreamRequest, pb.ScoreStreamResponse
        )
        scores = [o.score.raw for o in (await score(request("a", "bb"))).outcomes]
        try:
            await score(pb.ScoreRequest())
            refusal = None
        except GRPCError as err:
            refusal = [err.status.name, [v.field for d in err.details for v in d.field_violations]]
        sent = [pb.ScoreStreamRequest(request_id=i, request=request("x" * i)) for i in range(1, 6)]
        answers = {a.request_id: a.response.outcomes[0].score.raw for a in await stream(sent)}
        health = (await HealthStub(channel).Check(HealthCheckRequest(service=SERVICE[1:]))).status
    print(json.dumps({"scores": scores, "refusal": refusal, "stream": answers, "health": health}))


asyncio.run(main(sys.argv[1], int(sys.argv[2])))

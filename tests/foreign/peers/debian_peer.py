"""Debian's grpcio and protobuf, stubs of Debian's protoc: prints what it was told as JSON. Argument: ADDRESS."""

import json
import sys

import grpc
from rlaif.reward.v1 import reward_pb2 as pb
from rlaif.reward.v1 import reward_pb2_grpc


def request(*responses):
    items = []
    for number, response in enumerate(responses):
        turns = [pb.Message(role="user", content="q"), pb.Message(role="assistant", content=response)]
        items.append(pb.ScoreItem(id=number, conversation=pb.Conversation(messages=turns)))
    return pb.ScoreRequest(items=items)


with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    scores = [outcome.score.raw for outcome in stub.Score(request("a", "bb")).outcomes]
    try:
        stub.Score(pb.ScoreRequest())
        refusal = None
    except grpc.RpcError as err:
        refusal = [err.code().name, "grpc-status-details-bin" in dict(err.trailing_metadata())]
    sent = [pb.ScoreStreamRequest(request_id=i, request=request("x" * i)) for i in range(1, 6)]
    stream = {
        answer.request_id: answer.response.outcomes[0].score.raw for answer in stub.ScoreStream(iter(sent))
    }
print(json.dumps({"version": grpc.__version__, "scores": scores, "refusal": refusal, "stream": stream}))

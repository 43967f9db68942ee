"""Ask a reward server whether it serves: `python -m reward_server.healthcheck HOST:PORT`; exit code 0 if it does.

For container health checks; knows only the standard grpc.health.v1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "rlaif.reward.v1.RewardService"


def check(address: str, timeout_s: float = 5.0) -> str:
    """The health of the reward service: SERVING, NOT_SERVING, ..., or the gRPC status code of the failed check."""
    with grpc.insecure_channel(address) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=timeout_s
            )
        except grpc.RpcError as err:
            return str(err.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(argv: Sequence[str]) -> int:
    """Print the health and return the exit code."""
    address = argv[0] if argv else "127.0.0.1:50051"
    health = check(address)
    print(f"{address} {health}")
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Ask a reward server whether it serves: `python -m reward_server.healthcheck HOST:PORT`; exit code 0 if it does.

For container health checks; knows only the standard grpc.health.v1, which needs no token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "rlaif.reward.v1.RewardService"


def check(address: str, timeout_s: float = 5.0, *, ca: Path | None = None, name: str | None = None) -> str:
    """The health of the reward service: SERVING, NOT_SERVING, ..., or the gRPC status code of the failed check.

    Args:
        address: HOST:PORT.
        timeout_s: seconds to wait.
        ca: authorities of the server's certificate, PEM; makes the connection TLS.
        name: the name that the certificate is for, where it is not HOST.
    """
    with _channel(address, ca, name) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=timeout_s
            )
        except grpc.RpcError as err:
            return str(err.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _channel(address: str, ca: Path | None, name: str | None) -> grpc.Channel:
    if ca is None:
        return grpc.insecure_channel(address)
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()), options)


def main(argv: Sequence[str]) -> int:
    """Print the health and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reward_server.healthcheck")
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051", help="HOST:PORT")
    parser.add_argument("--ca", type=Path, help="authorities of the server's certificate, PEM")
    parser.add_argument("--name", help="name that the certificate is for, where it is not HOST")
    given = parser.parse_args(argv)
    health = check(given.address, ca=given.ca, name=given.name)
    print(f"{given.address} {health}")
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

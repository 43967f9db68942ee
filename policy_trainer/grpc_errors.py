"""What gRPC says when a call fails, and what it means for whoever called."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

_HTTP = "it speaks HTTP; give the gRPC port of `rlaif serve` (--port), not its --http_port"
MISMATCHES = (
    ("http1.x server", _HTTP),
    ("Expected SETTINGS frame", _HTTP),
    ("WRONG_VERSION_NUMBER", "it has no TLS; unset RLAIF_REWARD_CA"),
    ("security handshaker", "RLAIF_REWARD_CA holds no certificate that can be used"),
    ("Hostname Verification", "its certificate is for another name; use the one in the certificate"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by the authorities in RLAIF_REWARD_CA"),
)
"""What gRPC says where something listens that it cannot speak with, and what that means."""


def retry_delay(err: grpc.aio.AioRpcError) -> float | None:
    """Seconds that the server asks to wait (0: it does not say), or None if the call must not be repeated.

    RESOURCE_EXHAUSTED without RetryInfo is a message over a size limit: the same call would fail again. CANCELLED is
    the server's word here (a call that the caller gives up raises `asyncio.CancelledError`): a stopping server lets go
    of calls that reached it after its last look. After DEADLINE_EXCEEDED nobody knows what became of the call; to
    score again does no harm.
    """
    if err.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ):
        return _retry_info(err) or 0.0
    if err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _retry_info(err)
    return None


def _retry_info(err: grpc.aio.AioRpcError) -> float | None:
    retry = error_details_pb2.RetryInfo()
    if not _unpack(err, retry):
        return None
    return float(retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9)


def refused_early(err: grpc.aio.AioRpcError) -> bool:
    """Whether the server saw at once that the queue is too long for the deadline."""
    info = error_details_pb2.ErrorInfo()
    return _unpack(err, info) and info.reason == "DEADLINE_TOO_SHORT"


def _unpack(err: grpc.aio.AioRpcError, detail: Message) -> bool:
    """Fill in the detail of this type that came with an error; whether there is one."""
    trailer: Any = err.trailing_metadata() or ()
    for name, value in trailer:
        if name != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        status = status_pb2.Status()
        try:
            status.MergeFromString(value)
        except DecodeError:  # details that cannot be read tell nothing
            return False
        if any(packed.Unpack(detail) for packed in status.details):
            return True
    return False


def mismatch(err: grpc.aio.AioRpcError) -> str | None:
    """Why nothing can be spoken with what listens there, where gRPC's words tell."""
    words = err.details() or ""
    return next((meaning for sign, meaning in MISMATCHES if sign in words), None)


def details(err: grpc.aio.AioRpcError) -> str:
    """What gRPC says of an error, on one line and short."""
    words = " ".join((err.details() or err.code().name).split())
    refused = "connection refused" in words.lower()
    return "connection refused" if refused else words[:200]

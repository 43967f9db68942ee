"""What goes wrong, as HTTP: status, `Retry-After`, and the error object that vLLM and OpenAI clients read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import RetryInfo

from reward_server.scorers.base import Failure, Outcome, Scored
from reward_server.service import Refusal

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
_CALLERS_OWN = ("invalid", "too_long", "unsupported")


class Fault(Exception):
    """A request that gets an error for its answer.

    Args:
        status: HTTP status.
        message: for the caller; never quotes a text.
        param: the field to blame.
        retry_after_s: when to come back.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def response(self) -> web.Response:
        """The answer, in vLLM's shape (`ErrorResponse`), which is OpenAI's with a number for a code."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "InternalServerError"),
            "param": self.param,
            "code": self.status,
        }
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return reply({"error": error}, status=self.status, headers=headers)


def reply(
    value: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer. NaN and infinity are no JSON and raise instead of being sent."""
    return web.Response(
        text=json.dumps(value, allow_nan=False),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def refused(refusal: Refusal, *, overloaded: int) -> Fault:
    """A refusal of the service; a full queue has the status that the caller's client backs off for."""
    status = refusal.status
    if status.code == code_pb2.RESOURCE_EXHAUSTED:
        retry = RetryInfo()
        for detail in status.details:
            detail.Unpack(retry)
        return Fault(
            overloaded, status.message, retry_after_s=retry.retry_delay.ToTimedelta().total_seconds()
        )
    if status.code == code_pb2.UNAVAILABLE:
        return Fault(503, status.message, retry_after_s=1.0)
    return Fault(500, status.message)


def failed(failure: Failure, where: str, *, callers_own: int) -> Fault:
    """An item without a score, where the shape of the answer has no place for one.

    Args:
        failure: why.
        where: the item's place in the request.
        callers_own: status if the caller's own item is to blame.
    """
    message = f"{where}: {failure.message}"
    if failure.problem in _CALLERS_OWN:
        return Fault(400 if failure.problem == "unsupported" else callers_own, message, param=where)
    if failure.problem == "unavailable":
        return Fault(503, message, param=where, retry_after_s=1.0)
    return Fault(500, message, param=where)


def all_scored(outcomes: Sequence[Outcome], field: str, *, callers_own: int) -> list[Scored]:
    """The outcomes if each is a score.

    Raises:
        Fault: for the first that is not.
    """
    scored = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            raise failed(outcome, f"{field}[{index}]", callers_own=callers_own)
        assert isinstance(outcome, Scored)  # no door compares
        scored.append(outcome)
    return scored

"""From the bytes of a request to a checked object, with limits before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import accumulate
from typing import Annotated, Any, NoReturn, TypeVar

from aiohttp import web
from pydantic import BaseModel, FailFast, ValidationError

from reward_server.facade.faults import Fault

MAX_DEPTH = 32
"""Containers within each other; OpenAI's limit for JSON in an input, and far more than any shape here needs."""
MAX_CONTAINERS = 100_000
_LARGE = 64 << 10  # bytes from which parsing is worth a thread

# A string, or the rest of the body if it does not end: never backtracks, so hostile bodies are read once.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Shape = TypeVar("Shape", bound=BaseModel)
Item = TypeVar("Item")


class _FailFast(FailFast):
    """A marker that can stand in a union, whose members are hashed."""

    __hash__ = object.__hash__


Items = Annotated[list[Item], _FailFast()]
"""A list that is read up to its first mistake: a million of them must not become a million messages."""


async def read(request: web.Request, shape: type[Shape], timeout_s: float) -> Shape:
    """The body as `shape`.

    Raises:
        Fault: 408 too slow, 413 too large, 415 no JSON by its own account, 400 anything else that is wrong.
    """
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise Fault(413, f"the body has {request.content_length} bytes, the limit is {limit}")
    if request.content_type != "application/json":
        raise Fault(415, "the content type must be application/json")
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.read()
    except TimeoutError as err:
        raise Fault(408, f"the body did not arrive within {timeout_s:g} s") from err
    except web.HTTPRequestEntityTooLarge as err:
        raise Fault(413, f"the body has more than {limit} bytes") from err
    except (web.RequestPayloadError, ValueError) as err:
        raise Fault(400, "the body cannot be decoded") from err
    if len(body) < _LARGE:
        return check(parse(body), shape)
    return await asyncio.to_thread(lambda: check(parse(body), shape))


def parse(body: bytes) -> Any:
    """JSON, nested no deeper than `MAX_DEPTH`, of text that UTF-8 can hold.

    Raises:
        Fault: it is not.
    """
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise Fault(400, f"the body has more than {MAX_CONTAINERS} arrays and objects")
    if any(depth > MAX_DEPTH for depth in accumulate(map(_STEP.__getitem__, brackets))):
        raise Fault(400, f"the body is nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as err:
        raise Fault(400, "the body's text cannot be written as UTF-8") from err
    except (ValueError, RecursionError) as err:
        raise Fault(400, "the body is no valid JSON") from err
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are no JSON


def check(value: Any, shape: type[Shape]) -> Shape:
    """The parsed body as `shape`.

    Raises:
        Fault: a field is missing or wrong. Says which and why, and does not quote it.
    """
    if not isinstance(value, dict):
        raise Fault(400, "the body must be a JSON object")
    try:
        return shape.model_validate(value)
    except ValidationError as err:
        found = err.errors(include_url=False, include_input=False, include_context=False)
        deepest = max(
            found, key=lambda error: len(error["loc"])
        )  # of the shapes tried, the one that fits best
        path = [str(step) for step in deepest["loc"] if isinstance(step, int) or step.isidentifier()]
        where = ".".join(path) or None
        what = deepest["msg"].removeprefix("Value error, ")
        raise Fault(400, f"{where}: {what}" if where else what, param=where) from None

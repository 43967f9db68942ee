"""The HTTP server of the review page: routes, forms, and what is shown when something goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from labeler.review.desk import Desk
from labeler.review.forms import read_number, read_query, read_verdict, write_query
from labeler.review.guard import HEADERS, LOOPBACK, Guard, Handler, Refused
from labeler.review.index import Query, windows
from labeler.review.pages import Pages
from rlaif.errors import ConfigError, RlaifError
from rlaif.report.page import TEMPLATES

_LOG = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
PAGE_ROWS = 50
"""Rows of the list that the browser gets at a time."""
MAX_FORM_BYTES = 64 * 1024
MAX_NOTE = 2000
_WRITE_AFTER_S = 2.0
"""So long after a mark the datasets are written anew. The marks themselves are on the disk before the answer."""

T = TypeVar("T")


class Server:
    """The review page of one desk.

    Args:
        desk: what is reviewed, and by whom.
        title: the dataset's name.
        port: to listen on; 0 for a free one.
    """

    def __init__(self, desk: Desk, *, title: str, port: int) -> None:
        self._desk = desk
        self._port = port
        self._pages = Pages(desk, title)
        self._worker = ThreadPoolExecutor(
            1, "review"
        )  # the database and long sums, in turn, beside the event loop
        self._guard: Guard | None = None
        self._stale = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        app = web.Application(middlewares=[self._guarded], client_max_size=MAX_FORM_BYTES)
        app.add_routes(
            [
                web.get("/", self._list),
                web.get("/next", self._next),
                web.get("/rows/{number:[0-9]{1,9}}", self._row),
                web.post("/rows/{number:[0-9]{1,9}}/mark", self._mark),
                web.post("/rows/{number:[0-9]{1,9}}/reveal", self._reveal),
                web.post("/undo", self._undo),
                web.get("/static/style.css", self._style),
                web.static("/static", STATIC),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self) -> str:
        """Listen on the loopback address; returns the URL with the token.

        Raises:
            ConfigError: the port is taken.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, self._port)
        try:
            await site.start()
        except OSError as err:
            raise ConfigError(
                f"cannot listen on port {self._port}: it is in use or not allowed; give another --port, or 0"
            ) from err
        port = self._runner.addresses[0][1]
        self._guard = Guard(port)
        self._writer = asyncio.create_task(self._write_datasets())
        return f"http://{LOOPBACK}:{port}/?token={self._guard.token}"

    async def stop(self) -> None:
        """Take no requests any more, and write the datasets.

        Raises:
            StorageError: they cannot be written; the marks are safe.
        """
        await self._runner.cleanup()
        if self._writer is not None:
            self._writer.cancel()
            with suppress(asyncio.CancelledError):
                await self._writer
        await self._beside(self._desk.book.write_datasets)
        self._worker.shutdown()

    async def _write_datasets(self) -> None:
        """Keep the datasets close behind the marks, but do not write them anew for each."""
        while True:
            await self._stale.wait()
            await asyncio.sleep(_WRITE_AFTER_S)
            self._stale.clear()
            try:
                await self._beside(self._desk.book.write_datasets)
            except RlaifError as err:
                _LOG.error("%s; the marks themselves are in the journal", err)

    async def _beside(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    # ---- pages ----

    async def _list(self, request: web.Request) -> web.Response:
        query, page = read_query(request.query), max(1, read_number(request.query.get("page")) or 1)
        return _html(await self._beside(self._render_list, query, page, "done" in request.query))

    def _render_list(self, query: Query, page: int, done: bool) -> str:
        chosen = self._desk.select(query)
        last = max(1, -(-len(chosen) // PAGE_ROWS))
        page = min(page, last)
        rows = [self._desk.see(position) for position in windows(chosen, PAGE_ROWS, page)]
        return self._pages.list(query, rows, total=len(chosen), page=page, last_page=last, done=done)

    async def _row(self, request: web.Request) -> web.Response:
        query, position = read_query(request.query), self._position(request)
        saved = read_number(request.query.get("saved"))
        return _html(await self._beside(self._pages.row, query, position, saved))

    async def _style(self, request: web.Request) -> web.FileResponse:
        """The look that all pages share."""
        return web.FileResponse(TEMPLATES / "style.css")

    async def _next(self, request: web.Request) -> web.Response:
        """The first row that waits for a mark."""
        query = read_query(request.query)
        position = await self._beside(self._desk.unmarked_after, query)
        if position is None:
            return _see_other("/", query, done="1")
        return _see_other(f"/rows/{position + 1}", query)

    # ---- forms ----

    async def _mark(self, request: web.Request) -> web.Response:
        query, position = read_query(request.query), self._position(request)
        sent = await request.post()
        form = {
            name: value for name, value in sent.items() if isinstance(value, str)
        }  # a file is no part of a mark
        verdict, values = read_verdict(form, len(self._desk.index.item(position).responses))
        note = form.get("note", "").strip()[:MAX_NOTE]
        try:
            await self._beside(self._desk.mark, position, verdict, values, note, query)
        except ValueError as err:
            raise Refused(400, "That is no mark: a value is missing or out of range.") from err
        self._stale.set()
        if form.get("stay"):
            return _see_other(f"/rows/{position + 1}", query, saved=str(position + 1))
        after = await self._beside(self._desk.after, query, position)
        if after is None:
            return _see_other("/", query, done="1")
        return _see_other(f"/rows/{after + 1}", query, saved=str(position + 1))

    async def _reveal(self, request: web.Request) -> web.Response:
        query, position = read_query(request.query), self._position(request)
        await self._beside(self._desk.reveal, position)
        return _see_other(f"/rows/{position + 1}", query)

    async def _undo(self, request: web.Request) -> web.Response:
        query = read_query(request.query)
        position = await self._beside(self._desk.undo)
        self._stale.set()
        return _see_other("/" if position is None else f"/rows/{position + 1}", query)

    def _position(self, request: web.Request) -> int:
        position = int(request.match_info["number"]) - 1
        if not 0 <= position < len(self._desk.index):
            raise Refused(404, f"There is no such row: the dataset has {len(self._desk.index):,}.")
        return position

    # ---- every request ----

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await self._answered(request, handler)
        response.headers.update(HEADERS)
        return response

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        assert self._guard is not None
        try:
            return self._guard.check(request) or await handler(request)
        except Refused as refused:
            return _html(self._pages.refusal(refused.message), refused.status)
        except RlaifError as err:  # the disk is full: say so, and that nothing was marked
            _LOG.error("%s", err)
            return _html(self._pages.refusal(f"Not saved: {err}"), 507)
        except web.HTTPException as err:
            return _html(self._pages.refusal(f"{err.reason}."), err.status)
        except Exception:
            _LOG.exception("%s failed", request.path)
            return _html(self._pages.refusal("Something went wrong here; the terminal says what."), 500)


def _see_other(path: str, query: Query, **more: str) -> web.Response:
    return web.Response(status=303, headers={"Location": f"{path}{write_query(query, **more)}"})


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/html")

"""OpenAI's Batch API: requests sent as files, answered within a day at half the price.

The judge runs as ever, in front of an endpoint that answers from `batches.sqlite` and puts aside what is not there
(`labeler.backends.batched`). What was put aside is sent in batches, and the judge runs again over their replies, until
nothing is missing: once for labels alone, twice with rationales.

Every step is on record before the next one begins, so a run that is killed at any time goes on where it was: a file
is uploaded, and a batch created of it, once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import httpx2
import openai
from openai import AsyncOpenAI
from openai.types import Batch

from labeler.budget import Price
from labeler.database import Database
from labeler.journal import Usage
from rlaif.errors import BudgetReached, EndpointError

BATCHES_FILE = "batches.sqlite"

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
"""Of one batch, by OpenAI's documentation."""

_ENDED = ("completed", "expired", "cancelled", "failed")

_PAGE = 1000

_WAITS = "batch IS NULL AND reply IS NULL AND error IS NULL"

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, model TEXT NOT NULL, path TEXT NOT NULL, body TEXT NOT NULL,
    prompt_most INTEGER NOT NULL, completion_most INTEGER NOT NULL, batch INTEGER, reply TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS by_batch ON requests (batch);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY, model TEXT NOT NULL, path TEXT NOT NULL, requests INTEGER NOT NULL,
    state TEXT NOT NULL, file_id TEXT, uploaded REAL, batch_id TEXT);
"""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A batch on record.

    Attributes:
        number: its own, from 1.
        model: as the user wrote it.
        path: of its requests, after the base URL.
        requests: how many there are.
        state: `cut`, `uploaded`, `submitted`, and `read` at the end.
        file_id: of the uploaded requests.
        uploaded: when, in seconds since 1970.
        batch_id: as the endpoint calls it.
    """

    number: int
    model: str
    path: str
    requests: int
    state: str
    file_id: str | None
    uploaded: float | None
    batch_id: str | None


class BatchStore:
    """Requests, their batches and their raw replies; `batches.sqlite` of a run directory.

    Requests that failed, or were never sent, in an earlier run are forgotten: this one asks for what it needs.

    Args:
        folder: the run directory.

    Raises:
        StorageError: the file cannot be written or is damaged; as every method does.
    """

    def __init__(self, folder: Path) -> None:
        self._file = Database(folder / BATCHES_FILE, _TABLES)
        self._file.write("DELETE FROM requests WHERE reply IS NULL AND (batch IS NULL OR error IS NOT NULL)")

    def fact(self, name: str) -> Any:
        """A JSON value kept under a name; None if there is none."""
        found = self._file.all("SELECT value FROM facts WHERE name = ?", (name,))
        return json.loads(found[0][0]) if found else None

    def keep_fact(self, name: str, value: object) -> None:
        """Keep a JSON value."""
        self._file.write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def find(self, request: str) -> tuple[dict[str, Any] | None, str | None] | None:
        """(reply, why there is none) of a request; both None while it waits; None if it is not on record."""
        found = self._file.all("SELECT reply, error FROM requests WHERE id = ?", (request,))
        if not found:
            return None
        reply, error = found[0]
        return (None if reply is None else self._file.decode(reply)), error

    def add(self, request: str, model: str, path: str, body: Mapping[str, Any], most: Usage) -> None:
        """Put a request aside, to be sent with the next batch.

        Args:
            request: its id.
            model: as the user wrote it.
            path: after the base URL.
            body: as it would be sent by itself.
            most: a bound of its tokens.
        """
        self._file.write(
            "INSERT OR IGNORE INTO requests (id, model, path, body, prompt_most, completion_most) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                request,
                model,
                path,
                json.dumps(body, ensure_ascii=False),
                most.prompt_tokens,
                most.completion_tokens,
            ),
        )

    def fail(self, request: str, reason: str) -> None:
        """Note that what came back is no answer, so that the next run asks again."""
        self._file.write("UPDATE requests SET reply = NULL, error = ? WHERE id = ?", (reason, request))

    def cut(self, most_requests: int, most_bytes: int, afford: Callable[[Usage], bool]) -> int:
        """Make batches of what waits: each of one model and one path, within both limits.

        Args:
            most_requests: of a batch.
            most_bytes: of its file.
            afford: asked once for each request, with its bound.

        Returns:
            How many requests were left out because they cannot be afforded.
        """
        left_out = 0
        with self._file.together():
            kinds = self._file.all(
                f"SELECT DISTINCT model, path FROM requests WHERE {_WAITS} ORDER BY model, path"
            )
            for model, path in kinds:
                batch = count = size = 0
                for number, line in self._waiting(model, path):
                    [bound] = self._file.all(
                        "SELECT prompt_most, completion_most FROM requests WHERE number = ?", (number,)
                    )
                    if not afford(Usage(*bound)):
                        left_out += 1
                        continue
                    if not batch or count == most_requests or size + len(line) > most_bytes:
                        batch, count, size = self._new_batch(model, path), 0, 0
                    count, size = count + 1, size + len(line)
                    self._file.write("UPDATE requests SET batch = ? WHERE number = ?", (batch, number))
                    self._file.write("UPDATE batches SET requests = ? WHERE number = ?", (count, batch))
        return left_out

    def _waiting(self, model: str, path: str) -> Iterator[tuple[int, bytes]]:
        """(number, line) of the requests that wait; a page at a time, so that batches may be cut meanwhile."""
        last = 0
        while page := self._file.all(
            f"SELECT number, id, path, body FROM requests WHERE {_WAITS} AND model = ? AND path = ? AND number > ? "
            f"ORDER BY number LIMIT {_PAGE}",
            (model, path, last),
        ):
            for number, *request in page:
                yield number, _line(*request)
            last = page[-1][0]

    def _new_batch(self, model: str, path: str) -> int:
        [(number,)] = self._file.all("SELECT IFNULL(MAX(number), 0) + 1 FROM batches")
        self._file.write(
            "INSERT INTO batches (number, model, path, requests, state) VALUES (?, ?, ?, 0, 'cut')",
            (number, model, path),
        )
        return int(number)

    def lines(self, batch: int) -> Iterator[bytes]:
        """The file of a batch, line by line."""
        rows = self._file.each(
            "SELECT id, path, body FROM requests WHERE batch = ? ORDER BY number", (batch,)
        )
        return (_line(*row) for row in rows)

    def open(self) -> list[Parcel]:
        """Batches that are not read yet."""
        rows = self._file.all(
            "SELECT number, model, path, requests, state, file_id, uploaded, batch_id FROM batches "
            "WHERE state != 'read' ORDER BY number"
        )
        return [Parcel(*row) for row in rows]

    def held(self) -> Usage:
        """A bound of the tokens of all batches that are not read yet."""
        [(prompt, completion)] = self._file.all(
            "SELECT TOTAL(prompt_most), TOTAL(completion_most) FROM requests "
            "WHERE batch IN (SELECT number FROM batches WHERE state != 'read')"
        )
        return Usage(int(prompt), int(completion))

    def uploaded(self, batch: int, file_id: str) -> None:
        """Note that a batch's file is with the endpoint."""
        self._file.write(
            "UPDATE batches SET state = 'uploaded', file_id = ?, uploaded = ?, batch_id = NULL WHERE number = ?",
            (file_id, time.time(), batch),
        )

    def submitted(self, batch: int, batch_id: str) -> None:
        """Note that a batch is being answered."""
        self._file.write(
            "UPDATE batches SET state = 'submitted', batch_id = ? WHERE number = ?", (batch_id, batch)
        )

    def not_taken(self, batch: int) -> None:
        """Note that the endpoint had no room for a batch, so that it is to be created again."""
        self._file.write("UPDATE batches SET state = 'uploaded', batch_id = NULL WHERE number = ?", (batch,))

    def refused(self, batch: int) -> None:
        """Forget a batch that the endpoint does not take; its requests wait again."""
        with self._file.together():
            self._file.write("UPDATE requests SET batch = NULL WHERE batch = ?", (batch,))
            self._file.write("DELETE FROM batches WHERE number = ?", (batch,))

    async def read(self, batch: int, lines: AsyncIterator[bytes], otherwise: str) -> tuple[int, int]:
        """Keep what came back of a batch: all of it, or nothing if it breaks off.

        Args:
            batch: its number.
            lines: of its output file and its error file.
            otherwise: why a request without a line has no reply.

        Returns:
            Numbers of replies and of failures.
        """
        with self._file.together():
            async for line in lines:
                if not line.strip():
                    continue
                request, reply, error = read_line(line)
                self._file.write(
                    "UPDATE requests SET reply = ?, error = ? WHERE id = ? AND batch = ?",
                    (None if reply is None else json.dumps(reply), error, request, batch),
                )
            self._file.write(
                "UPDATE requests SET error = ? WHERE batch = ? AND reply IS NULL AND error IS NULL",
                (otherwise, batch),
            )
            self._file.write("UPDATE batches SET state = 'read' WHERE number = ?", (batch,))
        [(replies, failures)] = self._file.all(
            "SELECT COUNT(reply), COUNT(error) FROM requests WHERE batch = ?", (batch,)
        )
        return replies, failures

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(request: str, path: str, body: str) -> bytes:
    """A line of a batch's input file; the body is stored as JSON."""
    return f'{{"custom_id": "{request}", "method": "POST", "url": "/v1{path}", "body": {body}}}\n'.encode()


def read_line(line: bytes) -> tuple[str, dict[str, Any] | None, str | None]:
    """(custom_id, reply, why there is none) of a line of an output file or an error file.

    Raises:
        EndpointError: it is no such line.
    """
    try:
        content = json.loads(line)
        request, error, response = content["custom_id"], content.get("error"), content.get("response")
        if error:
            return request, None, f"the batch answered {error.get('code')}: {_short(error.get('message'))}"
        status, body = response["status_code"], response["body"]
        if status == 200:
            if not _is_unicode(body):
                return request, None, "the reply is no Unicode text"
            return request, body, None
        said = body.get("error", body) if isinstance(body, dict) else body
        message = said.get("message", said) if isinstance(said, dict) else said
        return request, None, f"the endpoint answered {status}: {_short(message)}"
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        said = _short(line.decode(errors="replace"))
        raise EndpointError(
            f"a line of a batch's results cannot be read ({err!r}): {said}; run the same command again"
        ) from err


def _is_unicode(reply: object) -> bool:
    """Whether a reply is free of lone surrogates, which JSON can hold and no file."""
    try:
        json.dumps(reply, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: object) -> str:
    return " ".join(str(text).split())[:200]


@dataclass(frozen=True, slots=True)
class Spending:
    """Money that batches may take, USD.

    Attributes:
        price: what tokens cost.
        limit: of all replies of the run directory.
        spent: asked before batches are cut; USD of all replies so far.
    """

    price: Price
    limit: float
    spent: Callable[[], float]


class Batches:
    """Sends what was put aside, and brings the replies.

    Args:
        store: where requests and replies are kept.
        interval_s: seconds between two looks at the batches.
        spending: the budget, if there is one.
        most_requests: of a batch.
        most_bytes: of its file.
    """

    def __init__(
        self,
        store: BatchStore,
        *,
        interval_s: float,
        spending: Spending | None = None,
        most_requests: int = MOST_REQUESTS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.store = store
        self._interval_s = interval_s
        self._spending = spending
        self._most = most_requests, most_bytes
        self._clients: dict[str, AsyncOpenAI] = {}
        self._created: set[str] = set()

    def serve(self, model: str, client: AsyncOpenAI) -> None:
        """Send the requests of a model through a client."""
        self._clients[model] = client

    async def exchange(self, seen: Callable[[int, int], None]) -> bool:
        """Send all that waits, and wait until all of it has come back.

        Args:
            seen: told (requests answered, requests sent) at each look.

        Returns:
            Whether anything came.

        Raises:
            BudgetReached: there is no money left for what waits.
            EndpointError: the endpoint is gone, offers no batches, or refuses one. What was sent is on record.
            StorageError: the disk is full.
        """
        left_out = self.store.cut(*self._most, self._afford())
        batches = [b for b in self.store.open() if b.model in self._clients]
        if not batches:
            if left_out and self._spending is not None:
                raise BudgetReached(
                    f"{self._spending.spent():.4g} USD are spent and the next of {left_out} requests could exceed "
                    f"--max_cost {self._spending.limit:g}"
                )
            return False
        sent = sum(batch.requests for batch in batches)
        back = 0
        waiting = {batch.number for batch in batches}
        while waiting:
            answered = 0
            full, busy = [], False
            for batch in [b for b in self.store.open() if b.number in waiting]:
                if batch.batch_id is None:
                    await self._submit(batch)
                    busy = True
                    continue
                now = await self._look(batch)
                if now.status == "failed":
                    self._not_taken(batch, now)
                    full.append(batch.number)
                    continue
                busy = True
                if now.status in _ENDED:
                    await self._fetch(batch, now)
                    waiting.remove(batch.number)
                    back += batch.requests
                else:
                    answered += now.request_counts.completed if now.request_counts else 0
            if full and not busy:
                for number in full:
                    self.store.refused(number)  # to be cut anew
                raise EndpointError(
                    "the endpoint has no room for a batch of this size: give a smaller --batch_size, e.g. "
                    f"{max(1, sent // len(batches) // 4)}; what was answered is kept"
                )
            seen(back + answered, sent)
            if waiting:
                await asyncio.sleep(self._interval_s)
        return True

    def _afford(self) -> Callable[[Usage], bool]:
        """Whether a further request fits the budget even if all that are open cost the most they can."""
        if self._spending is None:
            return lambda most: True
        price, limit = self._spending.price, self._spending.limit
        total = self._spending.spent() + price.most(self.store.held())

        def afford(most: Usage) -> bool:
            nonlocal total
            cost = price.most(most)
            if total + cost > limit:
                return False
            total += cost
            return True

        return afford

    async def _submit(self, batch: Parcel) -> None:
        """Upload and create a batch, or find it where a killed run had got so far."""
        client = self._clients[batch.model]
        file_id = batch.file_id
        if file_id is None:
            with TemporaryFile() as file:
                _write(file, self.store.lines(batch.number))
                async with _explained(client):
                    uploaded = await client.files.create(
                        file=(f"rlaif-{batch.number:04d}.jsonl", file), purpose="batch"
                    )
            file_id = uploaded.id
            self.store.uploaded(batch.number, file_id)
            self._created.add(file_id)
        found = None if file_id in self._created else await self._find(client, file_id, batch.uploaded or 0.0)
        self._created.add(file_id)
        if found is None:
            async with _explained(client):
                created = await client.batches.create(
                    input_file_id=file_id,
                    endpoint=f"/v1{batch.path}",  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={"made_by": "rlaif"},
                )
            found = created.id
        self.store.submitted(batch.number, found)

    async def _find(self, client: AsyncOpenAI, file_id: str, uploaded: float) -> str | None:
        """The batch that was created of a file, newest first, as far back as the file is old."""
        async with _explained(client):
            async for batch in client.batches.list(limit=100):
                if batch.input_file_id == file_id and batch.status != "failed":
                    return batch.id
                if batch.created_at < uploaded - 3600:
                    break
        return None

    async def _look(self, batch: Parcel) -> Batch:
        client = self._clients[batch.model]
        assert batch.batch_id is not None
        async with _explained(client):
            return await client.batches.retrieve(batch.batch_id)

    def _not_taken(self, batch: Parcel, now: Batch) -> None:
        """What to do with a batch that failed as a whole, of which nothing was answered.

        Where the endpoint had no room for its tokens beside those of others, it is created again. Otherwise its
        requests are free again, for the next run.
        """
        errors = (now.errors.data if now.errors else None) or []
        if any(error.code == "token_limit_exceeded" for error in errors):
            self.store.not_taken(batch.number)
            return
        self.store.refused(batch.number)
        said = _short(errors[0].message) if errors else "no reason given"
        raise EndpointError(f"the endpoint refuses the batch {now.id}: {said}")

    async def _fetch(self, batch: Parcel, now: Batch) -> None:
        client = self._clients[batch.model]

        async def lines() -> AsyncIterator[bytes]:
            for file_id in (now.output_file_id, now.error_file_id):
                if file_id is None:
                    continue
                async with (
                    _explained(client),
                    client.files.with_streaming_response.content(file_id) as response,
                ):
                    async for line in split_lines(response.iter_bytes()):
                        yield line

        await self.store.read(
            batch.number, lines(), f"the batch {now.status} before this request was answered"
        )


async def split_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a JSONL file. As text it would be split at U+2028 and its like too, which JSON strings may hold."""
    begun = b""
    async for chunk in chunks:
        first, *more = chunk.split(b"\n")
        begun += first
        for part in more:
            yield begun
            begun = part
    if begun:
        yield begun


def _write(file: IO[bytes], lines: Iterator[bytes]) -> None:
    file.writelines(lines)
    file.seek(0)


@asynccontextmanager
async def _explained(client: AsyncOpenAI) -> AsyncIterator[None]:
    """Turn errors of the endpoint into one line."""
    where = str(client.base_url).rstrip("/")
    try:
        yield
    except (openai.APIConnectionError, httpx2.TransportError) as err:
        raise EndpointError(
            f"no connection to {where}: batches go on without this program; run the same command again to fetch them"
        ) from err
    except openai.AuthenticationError as err:
        raise EndpointError(f"{where} refuses the key ({err.status_code}): set OPENAI_API_KEY") from err
    except openai.NotFoundError as err:
        raise EndpointError(
            f"{where} offers no batches, or has lost one: {_short(err)}; run without --batch"
        ) from err
    except openai.OpenAIError as err:
        raise EndpointError(f"{where} answered: {_short(err)}; run the same command again to go on") from err

"""A gRPC client made of single HTTP/2 frames, for what no well-behaved client sends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

SCORE = "/rlaif.reward.v1.RewardService/Score"
STREAM = "/rlaif.reward.v1.RewardService/ScoreStream"


def frame(message: bytes, *, compressed: bool = False, declared: int | None = None) -> bytes:
    """A message as gRPC puts it on a stream; `declared` is the length it claims."""
    return struct.pack(">BI", compressed, len(message) if declared is None else declared) + message


@dataclass
class Reply:
    """What came back on a stream."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> int | None:
        """`grpc-status`, from the trailers or from headers without a body."""
        return int(self.headers["grpc-status"]) if "grpc-status" in self.headers else None

    @property
    def message(self) -> bytes:
        """The only message of the reply."""
        return self.data[5:]


class Connection:
    """One HTTP/2 connection.

    `settled` is set when the server's settings are known, `closed` when the server ends the connection; `goaway` is the
    error that it gives then, `debug` its words.

    Args:
        reading: whether what the server sends is read, and the flow-control window opened again.
        acknowledging: whether its settings are acknowledged; gRPC enforces them from then on, and not before.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        reading: bool = True,
        acknowledging: bool = True,
    ) -> None:
        self.h2 = H2Connection(
            H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        )
        self.replies: dict[int, Reply] = {}
        self.goaway: ErrorCodes | int | None = None
        self.debug = b""
        self.closed = asyncio.Event()
        self.settled = asyncio.Event()
        self._reader, self._writer = reader, writer
        self._reading = reading
        self._acknowledging = acknowledging

    @property
    def max_streams(self) -> int:
        """Streams that the server allows at a time."""
        return int(self.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS])

    def request(
        self, path: str, body: bytes = b"", *, end: bool = True, metadata: Iterable[tuple[str, str]] = ()
    ) -> int:
        """Put a request into the buffer; its stream."""
        stream = self.h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
        self.replies[stream] = Reply()
        self.h2.send_headers(stream, headers)
        if body:
            self.h2.send_data(stream, body, end_stream=end)
        return stream

    async def write(self, data: bytes) -> None:
        """Send bytes that no library would.

        Raises:
            OSError: the server has closed the connection.
        """
        self._writer.write(data)
        await self._writer.drain()

    async def flush(self) -> None:
        """Send what is in the buffer.

        Raises:
            OSError: the server has closed the connection.
        """
        await self.write(self.h2.data_to_send())

    async def reply(self, stream: int) -> Reply:
        """The whole reply on a stream, or as much of it as there was when it was reset or the connection closed."""
        waits = [asyncio.ensure_future(e.wait()) for e in (self.replies[stream].done, self.closed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self.replies.pop(stream)

    async def read(self) -> None:
        """Read until the server closes the connection."""
        try:
            while self._reading and (data := await self._reader.read(65536)):
                for event in self.h2.receive_data(data):
                    self._take(event)
                if self._acknowledging:
                    await self.flush()
                else:
                    self.h2.data_to_send()
            if not self._reading:
                await asyncio.Event().wait()
        except OSError:
            pass
        finally:
            self.closed.set()

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.goaway, self.debug = event.error_code, event.additional_data or b""
            return
        if isinstance(event, RemoteSettingsChanged):
            self.settled.set()
        reply = self.replies.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, DataReceived):
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        if reply is None:
            return
        if isinstance(event, DataReceived):
            reply.data += event.data
        elif isinstance(event, ResponseReceived | TrailersReceived):
            reply.headers.update(dict(event.headers))  # type: ignore[arg-type]
        elif isinstance(event, StreamEnded | StreamReset):
            reply.reset = event.error_code if isinstance(event, StreamReset) else reply.reset
            reply.done.set()


@asynccontextmanager
async def connection(
    address: str, *, reading: bool = True, acknowledging: bool = True
) -> AsyncIterator[Connection]:
    """A connection after its preface."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    opened = Connection(reader, writer, reading=reading, acknowledging=acknowledging)
    opened.h2.initiate_connection()
    await opened.flush()
    reading_task = asyncio.create_task(opened.read())
    try:
        yield opened
    finally:
        reading_task.cancel()
        writer.transport.abort()
        await asyncio.gather(reading_task, return_exceptions=True)


async def send_all(peer: Connection, stream: int, data: bytes) -> None:
    """Send a body as fast as flow control lets it."""
    sent = 0
    while sent < len(data):
        room = min(
            peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size, len(data) - sent
        )
        if room:
            peer.h2.send_data(stream, data[sent : sent + room], end_stream=sent + room == len(data))
            sent += room
            await peer.flush()
        await asyncio.sleep(0)

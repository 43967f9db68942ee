"""Who may call: TLS with certificates that are renewed while the server runs, and bearer tokens with roles.

A call without a good token is refused before its message is read. Health checks stay open, since probes of an
orchestrator carry no token; they tell nothing but SERVING or not.
"""

from __future__ import annotations

import hmac
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import grpc

from rlaif.errors import ConfigError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TOKEN_BYTES = 4096
"""Longer tokens are refused without being compared."""


class Role(IntEnum):
    """What a caller may do; a higher role may do all that a lower one may."""

    SCORE = 1
    ADMIN = 2


class _Watched(Generic[T]):
    """Files that are read again when one of them is another file than was read, or has another content.

    Args:
        paths: the files.
        read: reads them all; an `OSError` or `ConfigError` says why it cannot.
        kept: what the log says stays as it is meanwhile.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], kept: str) -> None:
        self._paths = paths
        self._read = read
        self._kept = kept
        self._stamps: list[tuple[int, ...]] | None = None
        self._complaint = ""

    def read(self) -> T:
        """What is in the files."""
        stamps = [_stamp(path) for path in self._paths]  # before reading, to see what is written meanwhile
        found = self._read()
        self._stamps = stamps
        self._complaint = ""
        return found

    def reread(self) -> T | None:
        """What is in the files if they changed since they were read, else None.

        Files that cannot be read, or are caught half written, are tried again at the next call, with one line in the
        log for each reason.
        """
        try:
            if [_stamp(path) for path in self._paths] == self._stamps:
                return None
            return self.read()
        except (OSError, ConfigError) as err:
            if str(err) != self._complaint:
                self._complaint = str(err)
                _LOG.warning("the %s stay as they are: %s", self._kept, err)
            return None


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


class Tokens:
    """The tokens of a file: lines `score TOKEN` or `admin TOKEN`; empty lines and `#` comments are skipped.

    The file is read again when it changes, so a token is replaced without a restart: add the new one, move the
    callers, remove the old one. A file that cannot be read leaves the tokens as they were.

    Raises:
        ConfigError: there is no such file, a line is not understood, or no token is in it.
    """

    def __init__(self, path: Path) -> None:
        self._file = _Watched([path], lambda: _read_tokens(path), "tokens")
        try:
            self._tokens = self._file.read()
        except OSError as err:
            raise ConfigError(f"--token_file {path} cannot be read: {err.strerror}") from err

    def role(self, token: bytes) -> Role | None:
        """The role of a token, or None if it is not one of ours.

        All tokens are compared, each in constant time, so that timing tells nothing.
        """
        self._refresh()
        if len(token) > MAX_TOKEN_BYTES:
            return None
        found: Role | None = None
        for known, role in self._tokens:
            if hmac.compare_digest(known, token):
                found = role if found is None else max(found, role)
        return found

    def _refresh(self) -> None:
        tokens = self._file.reread()
        if tokens is not None:
            self._tokens = tokens
            _LOG.info("tokens were read again: %d", len(tokens))


def _read_tokens(path: Path) -> tuple[tuple[bytes, Role], ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8 text, at byte {err.start}") from err
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0].upper() not in Role.__members__:
            raise ConfigError(f"{path} line {number} must be `score TOKEN` or `admin TOKEN`")
        tokens.append((words[1].encode(), Role[words[0].upper()]))
    if not tokens:
        raise ConfigError(f"{path} holds no token: write lines `score TOKEN` or `admin TOKEN`")
    return tuple(tokens)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs alone
    """Lets calls of a service through whose token has the role that the service needs.

    Args:
        tokens: the known tokens.
        roles: the role that each service needs, by its full name; other services are open.
    """

    def __init__(self, tokens: Tokens, roles: dict[str, Role]) -> None:
        self._tokens = tokens
        self._roles = roles

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuse, or go on to the service."""
        service = handler_call_details.method.lstrip("/").partition("/")[0]
        needed = self._roles.get(service)
        if needed is None:
            return await continuation(handler_call_details)
        role = self._role(handler_call_details)
        if role is None:
            return _refusing(grpc.StatusCode.UNAUTHENTICATED, "no valid bearer token")
        if role < needed:
            text = f"this needs a token with the role {needed.name.lower()}"
            return _refusing(grpc.StatusCode.PERMISSION_DENIED, text)
        return await continuation(handler_call_details)

    def _role(self, details: grpc.HandlerCallDetails) -> Role | None:
        for name, value in details.invocation_metadata:
            if name == "authorization":
                data = value if isinstance(value, bytes) else value.encode()
                scheme, _, token = data.partition(b" ")
                return self._tokens.role(token.strip()) if scheme.lower() == b"bearer" else None
        return None


class MetadataInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs alone
    """Ends a call whose metadata are too large as soon as it comes.

    gRPC enforces its own limit on clients that have acknowledged its settings. What others send it keeps, however
    large, and it ends none of their calls before the message has come.

    Args:
        limit: bytes of names and values, and 32 for each pair (RFC 9113, section 6.5.2).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuse, or go on."""
        metadata = handler_call_details.invocation_metadata
        size = sum(len(name) + len(value) + 32 for name, value in metadata)
        if size > self._limit:
            return _refusing(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"metadata of {size} bytes, over {self._limit}"
            )
        return await continuation(handler_call_details)


def _refusing(code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends the call at once; as a stream it does not even wait for the message."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(code, text)

    return grpc.stream_stream_rpc_method_handler(refuse)


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS, with `client_ca` mutual TLS. Files that change are read again at the next handshake.

    Args:
        cert: certificate chain, PEM.
        key: its private key, PEM.
        client_ca: authorities whose clients may connect, PEM; None asks clients for no certificate.

    Raises:
        ConfigError: a file cannot be read or does not hold what it should.
    """
    paths = [path for path in (cert, key, client_ca) if path is not None]

    def read() -> grpc.ServerCertificateConfiguration:
        texts = [path.read_bytes() for path in paths]
        for path, text in zip(paths, texts, strict=True):
            if b"-----BEGIN " not in text:
                raise ConfigError(f"{path} is no PEM file")
        try:  # gRPC would only say later that it cannot listen
            _fill(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), cert, key, client_ca)
        except ssl.SSLError as err:
            raise ConfigError(f"the TLS files {cert} and {key} cannot be used: {err.reason or err}") from err
        authorities = texts[2] if client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(texts[1], texts[0])], authorities)

    files = _Watched(paths, read, "certificates")
    try:
        first = files.read()
    except OSError as err:
        raise ConfigError(f"{os.fspath(err.filename)} cannot be read: {err.strerror}") from err
    # The documentation lets the fetcher return None for "as before"; the stubs do not.
    return grpc.dynamic_ssl_server_credentials(first, files.reread, client_ca is not None)  # type: ignore[arg-type]


class RenewingContext:
    """The same for asyncio servers: `renew` before a handshake takes up files that changed.

    An authority that is taken out of `client_ca` is trusted until a restart; one that is added is trusted at once.

    Args:
        cert: certificate chain, PEM.
        key: its private key, PEM.
        client_ca: authorities whose clients may connect, PEM; None asks clients for no certificate.

    Raises:
        ConfigError: a file cannot be read or does not hold what it should.

    Attributes:
        context: for `create_server`.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = cert, key, client_ca
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if client_ca is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED
        paths = [path for path in (cert, key, client_ca) if path is not None]
        self._files = _Watched(paths, self._load, "certificates")
        try:
            self._files.read()
        except OSError as err:
            raise ConfigError(f"the TLS files {cert} and {key} cannot be used: {err}") from err

    def renew(self) -> None:
        """Read files again that changed. Files caught half written leave things as they are."""
        self._files.reread()

    def _load(self) -> None:
        """Try another context first: one that refuses a key keeps the certificate before it all the same."""
        cert, key, client_ca = self._paths
        for context in (ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), self.context):
            _fill(context, cert, key, client_ca)


def _fill(context: ssl.SSLContext, cert: Path, key: Path, client_ca: Path | None) -> None:
    """Load what the files hold.

    Raises:
        ssl.SSLError: they do not hold what they should, or do not belong together.
        OSError: one cannot be read.
    """
    context.load_cert_chain(cert, key, password="")  # else one is asked for at the terminal
    if client_ca is not None:
        context.load_verify_locations(client_ca)

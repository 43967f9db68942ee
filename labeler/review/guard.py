"""Who may talk to the review page: a browser of this machine that was given the token, and no other site through it."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOPBACK = "127.0.0.1"
LOCAL_NAMES = frozenset({LOOPBACK, "localhost"})
OPEN_PREFIX = "/static/"
"""Files of the package, the same for everyone: the page that refuses needs its style."""
HEADERS: Mapping[str, str] = {
    # Nothing from elsewhere, no inline script or style, no frames: text of a response that got through as HTML
    # would still do nothing.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser's own forms would come from the origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: why, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Guard:
    """The token of one run of the server, and the checks of every request.

    Args:
        port: of the server; cookies do not tell ports apart, so the name of ours does.
    """

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self._cookie = f"rlaif_review_{port}"

    def check(self, request: web.Request) -> web.Response | None:
        """Let a request pass, or answer in its place: the token in the URL becomes a cookie.

        Raises:
            Refused: another host name (a name that an attacker let point here), no token, or a form of another site.
        """
        if _host_name(request.headers.get("Host", "")) not in LOCAL_NAMES:
            raise Refused(421, "This page answers as 127.0.0.1 and localhost alone.")
        if request.path.startswith(OPEN_PREFIX):
            return None
        if request.method not in ("GET", "HEAD"):
            _check_origin(request)
        elif request.path == "/" and self._is_token(request.query.get("token", "")):
            return self._let_in()
        if not self._is_token(request.cookies.get(self._cookie, "")):
            raise Refused(
                403, "Open the address that `rlaif review` printed when it started: it holds the token."
            )
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode())

    def _let_in(self) -> web.Response:
        """The same page without the token in its address, where history and screenshots would keep it."""
        response = web.Response(status=303, headers={"Location": "/"})
        response.set_cookie(self._cookie, self.token, httponly=True, samesite="Strict", path="/")
        return response


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _check_origin(request: web.Request) -> None:
    """Browsers say which site a form comes from; one that says nothing is no browser, and has the cookie or not.

    Raises:
        Refused: another site.
    """
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    own = f"http://{request.headers.get('Host', '')}"
    if (origin is not None and origin != own) or site not in ("same-origin", "none"):
        raise Refused(403, "Another site may not send forms to this page.")

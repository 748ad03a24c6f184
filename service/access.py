"""The door: who may come in is decided before the first byte of a body is read.

Without keys everybody on this machine may: the API then listens on loopback only, and answers to loopback's
names only. With keys, a client sends ``Authorization: Bearer KEY``, or a browser the same key as the password
of HTTP's basic authentication, for which it asks by itself.
"""

import base64
import ipaddress
import logging
import re
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import (
    CrossSite,
    ForeignHost,
    ImcnetError,
    InvalidRequest,
    QueueUnavailable,
    RateLimited,
    StorageUnavailable,
    Unauthorized,
)
from service.keys import ApiKey, KeyRing
from service.problems import problem_response

logger = logging.getLogger(__name__)

_OPEN = ("/livez", "/readyz")  # of those who watch over the process; they tell nothing of the jobs
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Where a browser says that a request comes from (Fetch Metadata): it would add a password that it knows.
_FOREIGN = ("cross-site", "same-site")


class Access:
    """ASGI middleware. The key that was presented is ``request.state.key``; None where there are no keys.

    Args:
        max_header_bytes: Of the address and all headers together. The server knows the same limit, but looks
            only at heads that come in pieces.
        take_request: Counts a request of a key; returns after how many seconds the key may send another one,
            or None where this one is within its limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing,
        max_header_bytes: int,
        take_request: Callable[[ApiKey], int | None],
    ) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes
        self._ring = ring
        self._take_request = take_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"] = None
        try:
            state["key"] = await self._admit(scope)
        except ImcnetError as refusal:
            if isinstance(refusal, StorageUnavailable):
                logger.error("The API keys cannot be read: %s", refusal.__cause__)
            # The body stays where it is, so the connection is of no more use.
            await problem_response(refusal, headers={"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> ApiKey | None:
        """Returns: The key; None where none is needed.

        Raises:
            InvalidRequest: ``headers_too_large``.
            CrossSite, ForeignHost, Unauthorized, RateLimited: The request is not let in.
            StorageUnavailable: Whether it may be, cannot be told.
        """
        if _head_bytes(scope) > self._max_header_bytes:
            detail = f"Address and headers have more than {self._max_header_bytes} bytes."
            raise InvalidRequest(detail, code="headers_too_large")
        headers = Headers(scope=scope)
        if scope["method"] not in _SAFE_METHODS and _is_cross_site(headers):
            raise CrossSite
        if scope["path"].removeprefix(scope.get("root_path", "")) in _OPEN:
            return None
        if self._ring.stale:  # only then: a thread is slow to come by while uploads are being written
            await run_in_threadpool(lambda: self._ring.closed)
        if not self._ring.closed:
            # Any site's name may be made to point here, after which a browser takes its pages for ours.
            if not is_loopback(re.sub(r":\d*$", "", headers.get("host", "localhost"))):
                raise ForeignHost
            return None
        key = self._ring.find(_presented(headers.get("authorization", "")))
        if key is None:
            raise Unauthorized
        try:
            wait = await run_in_threadpool(self._take_request, key)
        except QueueUnavailable:  # what needs Redis says so itself; the rest works without
            wait = None
        if wait is not None:
            raise RateLimited(wait)
        return key


def is_loopback(host: str) -> bool:
    """Whether an address, or its name, is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _head_bytes(scope: Scope) -> int:
    address = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return address + sum(len(name) + len(value) for name, value in scope["headers"])


def _is_cross_site(headers: Headers) -> bool:
    """Whether a browser was made to send this by another site's page.

    Browsers say so by ``Sec-Fetch-Site``, but only to HTTPS and loopback; by ``Origin`` to all.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in _FOREIGN
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _presented(authorization: str) -> str:
    """The key in an ``Authorization`` header (RFC 6750, RFC 7617), or nothing."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    match scheme.lower():
        case "bearer":
            return value
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:  # no Base64, no ASCII, no UTF-8
                return ""
    return ""

"""What every answer tells browsers, whoever has made it: errors and downloads as well as pages."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",  # a mask archive is no script, whatever its bytes look like
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # what a page of another site embeds does not get there
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page itself has a stricter one
}


class SecurityHeaders:
    """ASGI middleware, outside of the application, whose outermost layer makes some answers by itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)

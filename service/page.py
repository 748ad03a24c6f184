"""The page at ``/``, for people. It is made of static files and talks to the API like any other client."""

from pathlib import Path

from fastapi import APIRouter, Response

_DIRECTORY = Path(__file__).with_name("web")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # an upgrade must not leave an old script with a new page
}

# A route per file and no mount: one at / would answer for every path that nothing else knows.
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
def page() -> Response:
    """The page itself. Its addresses are relative, so that it works below any root path."""
    return _file("index.html", "text/html")


@router.api_route("/page.css", methods=["GET", "HEAD"])
def styles() -> Response:
    """How it looks."""
    return _file("page.css", "text/css")


@router.api_route("/page.js", methods=["GET", "HEAD"])
def script() -> Response:
    """What it does."""
    return _file("page.js", "text/javascript")


@router.api_route("/words.js", methods=["GET", "HEAD"])
def words() -> Response:
    """What it says."""
    return _file("words.js", "text/javascript")


def _file(name: str, media_type: str) -> Response:
    # Whole: a FileResponse takes ranges, and refuses bad ones in plain text.
    return Response((_DIRECTORY / name).read_bytes(), media_type=media_type, headers=_HEADERS)

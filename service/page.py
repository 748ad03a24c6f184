"""The page at ``/``, for people. It is made of static files and talks to the API like any other client."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

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
def page() -> FileResponse:
    """The page itself. Its addresses are relative, so that it works below any root path."""
    return FileResponse(_DIRECTORY / "index.html", media_type="text/html", headers=_HEADERS)


@router.api_route("/page.css", methods=["GET", "HEAD"])
def styles() -> FileResponse:
    """How it looks."""
    return FileResponse(_DIRECTORY / "page.css", media_type="text/css", headers=_HEADERS)


@router.api_route("/page.js", methods=["GET", "HEAD"])
def script() -> FileResponse:
    """What it does."""
    return FileResponse(_DIRECTORY / "page.js", media_type="text/javascript", headers=_HEADERS)


@router.api_route("/words.js", methods=["GET", "HEAD"])
def words() -> FileResponse:
    """What it says."""
    return FileResponse(_DIRECTORY / "words.js", media_type="text/javascript", headers=_HEADERS)

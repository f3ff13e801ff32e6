"""The page at `/`: its files, read once and answered from memory, and what it must know before it has a key."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from aiohttp import hdrs, web
from msgspec import Struct

import vlmrt
from vlmrt.runtime.config import Config

DIRECTORY = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {  # of all that is served, by the end of its name
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes HTML, whatever the scripts do
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked about: a new version of the server has a new page
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageConfig(Struct, frozen=True):
    """What bounds the requests of the page."""

    version: str
    needs_key: bool
    max_body_mib: int
    max_video_mib: int
    limit_images: int  # per request, so of the whole conversation
    limit_videos: int
    request_timeout_s: float
    fetches_urls: bool  # whether media may come by another address than a data URL

    @classmethod
    def of(cls, config: Config) -> PageConfig:
        server, video = config.server, config.video
        return cls(
            version=vlmrt.__version__,
            needs_key=bool(server.api_keys),
            max_body_mib=server.max_body_mib,
            max_video_mib=video.max_mib,
            limit_images=server.limit_images,
            limit_videos=video.limit_videos,
            request_timeout_s=server.request_timeout_s,
            fetches_urls=bool(server.allowed_media_domains) or server.allowed_media_root is not None,
        )


class PageFile(NamedTuple):
    body: bytes
    media_type: str
    etag: str


class PageFiles:
    """The files below actors/edge/page, by name."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        """Raises: OSError where the page is not there; KeyError for a file of a kind that is not served."""
        self._files = {path.name: _read(path) for path in sorted(directory.iterdir())}
        self._index = self._files.pop(INDEX)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what the page itself loads."""
        return tuple(self._files)

    def index(self, request: web.Request) -> web.Response:
        response = _answer(self._index, request)
        response.headers[hdrs.VARY] = hdrs.ACCEPT
        return response

    async def file(self, request: web.Request) -> web.Response:
        found = self._files.get(request.match_info["file"])
        if found is None:
            raise web.HTTPNotFound
        return _answer(found, request)


def accepts_html(request: web.Request) -> bool:
    """Whether the client names HTML among what it takes: browsers do, curl and API clients do not."""
    for item in request.headers.get(hdrs.ACCEPT, "").lower().split(","):
        media_type, *parameters = (piece.strip() for piece in item.split(";"))
        if media_type == "text/html":
            return not any(_is_zero(parameter) for parameter in parameters)
    return False


def _is_zero(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name.strip() == "q" and value.strip().rstrip("0") in ("", "0.")


def _read(path: Path) -> PageFile:
    body = path.read_bytes()
    return PageFile(body, MEDIA_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:32])


def _answer(file: PageFile, request: web.Request) -> web.Response:
    """The file, or 304 where the client has it already."""
    known = {tag.value for tag in request.if_none_match or ()}
    if file.etag in known or "*" in known:
        response = web.Response(status=304, headers=HEADERS)
    else:
        response = web.Response(body=file.body, headers=HEADERS, content_type=file.media_type, charset="utf-8")
    response.etag = file.etag
    return response

"""The bytes of a picture or video: out of a data URL, from an allowed host, or a file below the allowed folder."""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import aiohttp
import pybase64
from aiohttp.abc import AbstractResolver, ResolveResult
from msgspec import Struct
from yarl import URL

from vlmrt.actors.edge.media_parts import MAX_LISTED_FRAMES, ImageSource, MediaSource, VideoSource
from vlmrt.actors.edge.media_policy import MediaPolicy, RefusedUrl
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.runtime.config import ServerOptions, VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.frame_list import pack_frames

MAX_REDIRECTS = 3
MAX_URL_CHARS = 8192
READ_BYTES = 64 << 10
LARGE_CHARS = 64 << 10  # data URLs above this are decoded off the event loop
MIB = 1 << 20

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # host, port -> addresses

_DATA_URL = re.compile(r"data:([^,]{0,512}),", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class TooManyBytes(RefusedUrl):
    """There are more than the limit allows."""


class MediaKind(Struct, frozen=True):
    """What pictures and videos differ in."""

    name: str
    media_type: str  # the first half of it
    max_bytes: int
    timeout_s: float
    code: str  # of an error
    too_large_status: int


class MediaFetcher:
    """Gets encoded media within the policy of the configuration.  No error repeats what was fetched."""

    def __init__(
        self,
        options: ServerOptions,
        executor: Executor,
        resolve: Resolve | None = None,
        *,
        video: VideoOptions | None = None,
    ) -> None:
        video = video or VideoOptions()
        self._policy = MediaPolicy(options.allowed_media_domains)
        self._root = None if options.allowed_media_root is None else os.path.realpath(options.allowed_media_root)
        self._image = MediaKind(
            "picture", "image", options.max_fetch_mib * MIB, options.media_fetch_timeout_s, "invalid_image_url", 400
        )
        self._video = MediaKind("video", "video", video.max_mib * MIB, video.fetch_timeout_s, "invalid_video_url", 413)
        self._executor = executor
        self._resolve = resolve or _system_resolve

    async def fetch(self, source: MediaSource, lease: MediaLease) -> bytes:
        """The encoded bytes, counted against the lease before they are held; frames as one piece of bytes.

        Raises: RequestError 400, 413 for a video of too many bytes, or 413 and 429 from the lease.
        """
        if isinstance(source, ImageSource):
            return await self._fetch(source.url, source.param, lease, self._image)
        if source.frame_urls:
            return await self._fetch_frames(source, lease)
        return await self._fetch(source.url, source.param, lease, self._video)

    async def _fetch_frames(self, source: VideoSource, lease: MediaLease) -> bytes:
        """One after the other."""
        frames = [
            await self._fetch(url, f"{source.param}[{index}]", lease, self._image)
            for index, url in enumerate(source.frame_urls)
        ]
        num_bytes = sum(map(len, frames))
        if num_bytes > self._video.max_bytes:
            raise _refused(source.param, TooManyBytes(f"the frames have {num_bytes} bytes"), self._video)
        return await asyncio.get_running_loop().run_in_executor(self._executor, pack_frames, frames)

    async def _fetch(self, url: str, param: str, lease: MediaLease, kind: MediaKind) -> bytes:
        scheme = url[:8].partition(":")[0].lower()
        try:
            if scheme == "data":
                return await self._from_data_url(url, lease, kind)
            if len(url) > MAX_URL_CHARS:
                raise RefusedUrl(f"the URL has {len(url)} characters, more than {MAX_URL_CHARS}")
            if scheme in ("http", "https"):
                return await self._from_web(url, lease, kind)
            if scheme == "file":
                return await self._from_file(url, lease, kind)
            raise RefusedUrl(f"a {kind.name}'s URL begins with data:, http://, https:// or file://")
        except RefusedUrl as error:
            raise _refused(param, error, kind) from None

    async def _from_data_url(self, url: str, lease: MediaLease, kind: MediaKind) -> bytes:
        num_bytes = len(url) * 3 // 4
        if kind is self._video and num_bytes > kind.max_bytes:
            raise TooManyBytes(f"the data URL holds more than {kind.max_bytes} bytes")
        lease.add(num_bytes)
        if len(url) < LARGE_CHARS:
            return decode_data_url(url, kind.media_type)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, decode_data_url, url, kind.media_type)

    async def _from_file(self, url: str, lease: MediaLease, kind: MediaKind) -> bytes:
        if self._root is None:
            raise RefusedUrl("files are not read unless the server was started with --allowed-media-root")
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._executor, read_file_url, url, self._root, kind.max_bytes)
        lease.add(len(encoded))
        return encoded

    async def _from_web(self, url: str, lease: MediaLease, kind: MediaKind) -> bytes:
        if not self._policy.fetches:
            raise RefusedUrl("URLs are not fetched unless the server was started with --allowed-media-domains")
        try:
            async with asyncio.timeout(kind.timeout_s):
                return await self._follow(url, lease, kind.max_bytes)
        except TimeoutError:
            raise RefusedUrl(f"fetching took longer than {kind.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, RefusedUrl):
                raise
            raise RefusedUrl("fetching failed: the connection broke or the answer was not HTTP") from None

    async def _follow(self, text: str, lease: MediaLease, max_bytes: int) -> bytes:
        url = self._policy.check_url(text)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(url, lease, max_bytes)
            if isinstance(answer, bytes):
                return answer
            target = self._policy.check_url(str(url.join(answer)))
            if url.scheme == "https" and target.scheme != "https":
                raise RefusedUrl("a redirect leads from https to http")
            url = target
        raise RefusedUrl(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: URL, lease: MediaLease, max_bytes: int) -> bytes | URL:
        """The body, or where the answer redirects to.  Each hop connects anew, to the addresses checked for it."""
        addresses = await self._checked_addresses(url)
        connector = aiohttp.TCPConnector(resolver=_PinnedResolver(addresses), use_dns_cache=False, force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector, trust_env=False, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.get(url, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status in (301, 302, 303, 307, 308):
                return _location(response)
            if response.status != 200:
                raise RefusedUrl(f"fetching failed: the host answered with status {response.status}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise RefusedUrl("fetching failed: the answer is compressed")
            return await _read(response, lease, max_bytes)

    async def _checked_addresses(self, url: URL) -> list[str]:
        host, port = url.host or "", url.port or 0
        try:
            addresses = [str(socket.inet_ntop(family, packed)) for family, packed in _literal_forms(host)]
            addresses = addresses or list(await self._resolve(host.rstrip("."), port))
        except (OSError, UnicodeError):
            raise RefusedUrl("the URL's host cannot be resolved") from None
        if not addresses:
            raise RefusedUrl("the URL's host cannot be resolved")
        for address in addresses:
            self._policy.check_address(url, address)
        return addresses


class _PinnedResolver(AbstractResolver):
    """Answers with the addresses that were checked, so that nothing is resolved a second time."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


async def _read(response: aiohttp.ClientResponse, lease: MediaLease, max_bytes: int) -> bytes:
    too_large = f"the file has more than {max_bytes} bytes"
    if (response.content_length or 0) > max_bytes:
        raise TooManyBytes(too_large)
    body = bytearray()
    async for chunk in response.content.iter_chunked(READ_BYTES):
        if len(body) + len(chunk) > max_bytes:
            raise TooManyBytes(too_large)
        lease.add(len(chunk))
        body += chunk
    return bytes(body)


def _location(response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location", "")
    if not location or len(location) > MAX_URL_CHARS or "\\" in location or any(char <= " " for char in location):
        raise RefusedUrl("a redirect leads nowhere or holds characters that no URL has")
    try:
        return URL(location)
    except ValueError:
        raise RefusedUrl("a redirect leads to a URL that cannot be parsed") from None


def _literal_forms(host: str) -> list[tuple[socket.AddressFamily, bytes]]:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return [(family, socket.inet_pton(family, host))]
        except OSError:
            continue
    return []


async def _system_resolve(host: str, port: int) -> list[str]:
    infos: list[Any] = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [info[4][0] for info in infos]


def decode_data_url(url: str, media_type: str = "image") -> bytes:
    """Accepts what clients send: no padding, line breaks, the URL-safe alphabet, percent-encoding.

    As a video, video/jpeg is its frames, joined by commas; they become one piece of bytes.
    Args: media_type: the first half of it.  Raises: RefusedUrl for anything else.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise RefusedUrl("the data URL has no comma after its media type")
    found, *parameters = (word.strip().lower() for word in head[1].split(";"))
    if "base64" not in parameters:
        example = {"image": "image/png", "video": "video/mp4"}[media_type]
        raise RefusedUrl(f"the data URL is not base64: it must begin like data:{example};base64,")
    if found and found != "application/octet-stream" and not found.startswith(f"{media_type}/"):
        raise RefusedUrl(f"the data URL's media type is not {media_type}/*")
    text = url[head.end() :]
    if found == "video/jpeg" and text.count(",") >= MAX_LISTED_FRAMES:  # each piece takes far more than its characters
        raise RefusedUrl(f"the data URL holds more than {MAX_LISTED_FRAMES} frames")
    pieces = text.split(",") if found == "video/jpeg" else [text]
    try:
        decoded = [_decode_base64(piece) for piece in pieces]
    except ValueError:
        raise RefusedUrl("the data URL's base64 is broken") from None
    if not all(decoded):
        raise RefusedUrl("the data URL is empty" if len(pieces) == 1 else "the data URL holds an empty frame")
    return pack_frames(decoded) if found == "video/jpeg" else decoded[0]


def _decode_base64(text: str) -> bytes:
    """Raises: ValueError."""
    plain = text.encode("ascii")
    try:
        return pybase64.b64decode(plain, validate=True)  # 40 times as fast as the standard library's
    except binascii.Error:
        if b"%" in plain:
            plain = unquote_to_bytes(plain)
        plain = plain.translate(_URL_SAFE, b" \t\r\n\f\v=")
        return pybase64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def read_file_url(url: str, root: str, max_bytes: int) -> bytes:
    """The bytes of a regular file that lies below root once all links are followed.

    Raises: RefusedUrl, always in the same words, so that nothing about other files can be learnt.
    """
    refused = RefusedUrl("the file is not a regular file below the allowed media folder")
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise refused
    try:
        real = os.path.realpath(path, strict=True)
        if not Path(real).is_relative_to(root):
            raise refused
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise refused from None
    try:
        opened = os.path.realpath(f"/proc/self/fd/{descriptor}")  # a folder may have been swapped for a link meanwhile
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not Path(opened).is_relative_to(root):
            raise refused
        with open(descriptor, "rb", closefd=False) as file:
            encoded = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(encoded) > max_bytes:
        raise TooManyBytes(f"the file has more than {max_bytes} bytes")
    return encoded


def _refused(param: str, error: RefusedUrl, kind: MediaKind) -> RequestError:
    status = kind.too_large_status if isinstance(error, TooManyBytes) else 400
    return RequestError(f"{param}: {error}", status=status, param=param, code=kind.code)

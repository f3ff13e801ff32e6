"""What the server fetches and what it never does: every refusal happens before a connection is made."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vlmrt.actors.edge import fetch as edge_fetch
from vlmrt.actors.edge.fetch import MediaFetcher, decode_data_url
from vlmrt.actors.edge.media_parts import MAX_LISTED_FRAMES, ImageSource
from vlmrt.actors.edge.media_policy import MediaPolicy, RefusedUrl, is_public
from vlmrt.actors.edge.open_requests import MediaBudget, MediaLease
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import RequestError, StartupError
from vlmrt.runtime.frame_list import pack_frames

DATA = bytes(range(256)) * 40


# ---------------------------------------------------------------- data URLs

TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        "data:image/png;base64," + "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\r\n",
        f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
    ids=range(9),
)
def test_data_urls_are_read_as_clients_write_them(url: str) -> None:
    assert decode_data_url(url) == DATA


@pytest.mark.parametrize("kind", ["video/mp4", "VIDEO/WebM", "application/octet-stream", ""])
def test_data_urls_of_videos_are_read_as_such(kind: str) -> None:
    assert decode_data_url(f"data:{kind};base64,{TEXT}", "video") == DATA
    for wrong in ("image/png", "text/plain", "audio/mp4"):
        with pytest.raises(RefusedUrl, match=r"video/\*"):
            decode_data_url(f"data:{wrong};base64,{TEXT}", "video")


def test_frames_in_a_data_url_become_one_piece_of_bytes() -> None:
    frames = [DATA, DATA[:100], b"x"]
    text = ",".join(base64.b64encode(frame).decode() for frame in frames)
    assert decode_data_url(f"data:video/jpeg;base64,{text}", "video") == pack_frames(frames)
    for broken in (f"{text},", f",{text}", f"{text},a!b", ""):
        with pytest.raises(RefusedUrl):
            decode_data_url(f"data:video/jpeg;base64,{broken}", "video")
    with pytest.raises(RefusedUrl):
        decode_data_url(f"data:video/mp4;base64,{text}", "video")


def test_a_data_url_holds_no_more_frames_than_a_list_may() -> None:
    frames = ["eA=="] * MAX_LISTED_FRAMES
    assert decode_data_url(f"data:video/jpeg;base64,{','.join(frames)}", "video") == pack_frames([b"x"] * len(frames))
    with pytest.raises(RefusedUrl, match=f"more than {MAX_LISTED_FRAMES} frames"):
        decode_data_url(f"data:video/jpeg;base64,{','.join([*frames, 'eA=='])}", "video")


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png,abcd",
        "data:image/png;base64,",
        "data:image/png;base64,a",
        "data:image/png;base64,ab$d",
        "data:image/png;base64,abéd",
        "data:text/plain;base64,abcd",
        "data:video/mp4;base64,abcd",
        "data:" + "x" * 1000 + ";base64,abcd",
    ],
)
def test_other_data_urls_are_refused(url: str) -> None:
    with pytest.raises(RefusedUrl) as refused:
        decode_data_url(url)
    assert "abcd" not in str(refused.value)


# ---------------------------------------------------------------- the policy by itself

PUBLIC = ["93.184.216.34", "2606:2800:220:1::1"]
PRIVATE = [
    "127.0.0.1",
    "127.9.9.9",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "::1",
    "::",
    "fc00::1",
    "fd12::1",
    "fe80::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
]


def test_private_addresses_are_known() -> None:
    import ipaddress

    assert all(is_public(ipaddress.ip_address(address)) for address in PUBLIC)
    assert [address for address in PRIVATE if is_public(ipaddress.ip_address(address))] == []


@pytest.mark.parametrize(
    "entry", ["", "http://host", "host:0", "host:99999", "a b", "10.0.0.0/33", "1.2.3", "x/y", "*.com"]
)
def test_a_bad_entry_ends_the_start(entry: str) -> None:
    with pytest.raises(StartupError, match="allowed-media-domains"):
        MediaPolicy([entry])


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("example.com", "https://example.com/a.png", True),
        ("example.com", "https://EXAMPLE.com./a.png", True),
        ("example.com", "http://example.com:8080/a.png", True),
        ("example.com", "https://sub.example.com/a.png", False),
        ("example.com", "https://example.com.evil.org/a.png", False),
        ("example.com", "https://evil.org/example.com", False),
        ("example.com", "https://evil.org?example.com", False),
        ("example.com", "https://evil.org#@example.com", False),
        ("example.com:8443", "https://example.com:8443/a.png", True),
        ("example.com:8443", "https://example.com/a.png", False),
        ("*", "https://anything.example/a.png", True),
        ("*:443", "http://anything.example/a.png", False),
        ("93.184.216.34", "http://93.184.216.34/", True),
        ("93.184.216.0/24", "http://93.184.216.99/", True),
        ("93.184.216.0/24", "http://93.184.217.1/", False),
        ("127.0.0.1:8001", "http://127.0.0.1:8001/", True),
        ("127.0.0.1:8001", "http://127.0.0.1:8002/", False),
        ("127.0.0.1", "http://localhost/", False),
        ("[::1]:8001", "http://[::1]:8001/", True),
        ("::1", "http://[::1]:5/", True),
    ],
)
def test_urls_are_matched_by_host_network_and_port(entry: str, url: str, allowed: bool) -> None:
    policy = MediaPolicy([entry])
    if allowed:
        policy.check_url(url)
    else:
        with pytest.raises(RefusedUrl):
            policy.check_url(url)


CONFUSING = [
    "http://good.example\\@evil.example/",
    "http://good.example\\.evil.example/",
    "http:\\\\good.example/",
    "http://user@good.example/",
    "http://user:pass@good.example/",
    "http://good.example@evil.example/",
    "http://@good.example/",
    "http://good.example%2f@evil.example/",
    "http://good%2eexample/",
    "http://good.example /",
    "http://good.example\t/",
    "http://good.example\n/",
    "http://good.example\r\nHost: evil/",
    "http://good.example\0/",
    " http://good.example/",
    "http://good。example/",
    "http://gооd.example/",  # Cyrillic
    "http:///path",
    "http://",
    "http:good.example",
    "http://:80/",
    "http://good.example:99999/",
    "http://good.example:port/",
    "http://[::1/",
    "http://[good.example]/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://0x7f.0.0.1/",
    "http://1.2.3.4.5/",
    "http://good..example/",
    "http://-good.example/",
    "http://" + "a" * 64 + ".example/",
    "gopher://good.example/",
    "HTTP+unix://good.example/",
]


@pytest.mark.parametrize("url", CONFUSING)
def test_confusing_urls_are_refused_even_where_everything_is_allowed(url: str) -> None:
    with pytest.raises(RefusedUrl):
        MediaPolicy(["*", "0.0.0.0/0", "::/0"]).check_url(url)


# ---------------------------------------------------------------- with an injected resolver and a spy on connect


class Fetching:
    """A fetcher whose resolver and connections the test sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, executor: ThreadPoolExecutor) -> None:
        self.names: dict[str, Sequence[str]] = {}
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self._executor = executor
        connect = aiohttp.TCPConnector._wrap_create_connection

        async def spy(connector: Any, *args: Any, addr_infos: Any, **options: Any) -> Any:
            self.dialled += [(info[4][0], info[4][1]) for info in addr_infos]
            assert all(host.startswith("127.") for host, _ in self.dialled), self.dialled
            return await connect(connector, *args, addr_infos=addr_infos, **options)

        monkeypatch.setattr(aiohttp.TCPConnector, "_wrap_create_connection", spy)

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror("no such name")
        return self.names[host]

    async def get(self, url: str, *allowed: str, budget: int = 1 << 30, **options: Any) -> bytes:
        server = ServerOptions(allowed_media_domains=allowed, **options)
        fetcher = MediaFetcher(server, self._executor, self._resolve)
        return await fetcher.fetch(ImageSource(url, "url"), MediaLease(MediaBudget(budget)))

    async def refused(self, url: str, *allowed: str, **options: Any) -> RequestError:
        with pytest.raises(RequestError) as refused:
            await self.get(url, *allowed, **options)
        return refused.value


@pytest.fixture
async def fetching(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fetching]:
    with ThreadPoolExecutor(1) as executor:
        yield Fetching(monkeypatch, executor)


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("allowed", ["*", "internal.example"])
async def test_a_name_never_leads_to_a_private_address(address: str, allowed: str, fetching: Fetching) -> None:
    fetching.names["internal.example"] = [address]
    assert (await fetching.refused("http://internal.example/a.png", allowed, address)).status == 400
    fetching.names["internal.example"] = ["93.184.216.34", address]
    assert (await fetching.refused("http://internal.example/a.png", allowed)).status == 400
    assert fetching.dialled == []


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_private_address_is_not_reached_through_the_star(address: str, fetching: Fetching) -> None:
    host = f"[{address}]" if ":" in address else address
    assert (await fetching.refused(f"http://{host}/", "*", "example.com", "93.184.216.34")).status == 400
    assert fetching.dialled == []
    assert fetching.resolved == []


async def test_an_unknown_name_is_refused(fetching: Fetching) -> None:
    assert "resolved" in (await fetching.refused("http://nowhere.example/", "*")).message
    fetching.names["empty.example"] = []
    assert "resolved" in (await fetching.refused("http://empty.example/", "*")).message


async def test_fetching_is_off_without_a_list(fetching: Fetching) -> None:
    assert "--allowed-media-domains" in (await fetching.refused("http://127.0.0.1:1/")).message
    assert fetching.dialled == []


@asynccontextmanager
async def web_server(handler: Any, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server for tests; the port it listens on."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    assert site._server is not None
    try:
        yield site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    finally:
        await runner.cleanup()


async def _picture(request: web.Request) -> web.Response:
    return web.Response(body=DATA, content_type="image/png")


async def test_a_listed_loopback_port_is_fetched(fetching: Fetching) -> None:
    async with web_server(_picture) as port:
        assert await fetching.get(f"http://127.0.0.1:{port}/a.png", f"127.0.0.1:{port}") == DATA
        assert await fetching.get(f"http://127.0.0.1:{port}/a.png", "127.0.0.0/8") == DATA
        assert fetching.dialled == [("127.0.0.1", port)] * 2
        assert (await fetching.refused(f"http://127.0.0.1:{port}/a.png", f"127.0.0.1:{port + 1}")).status == 400
        fetching.names["localhost"] = ["127.0.0.1"]
        assert (await fetching.refused(f"http://localhost:{port}/", "localhost", "127.0.0.1")).status == 400
        assert len(fetching.dialled) == 2


async def test_the_address_that_was_checked_is_the_one_dialled(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that changes its answer is asked once."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> Sequence[str]:
        fetching.resolved.append(host)
        return next(answers)

    monkeypatch.setattr(fetching, "_resolve", rebinding)
    dialled: list[str] = []

    async def no_connection(connector: Any, *args: Any, addr_infos: Any, **options: Any) -> Any:
        dialled.extend(info[4][0] for info in addr_infos)
        raise OSError("not dialled in tests")

    monkeypatch.setattr(aiohttp.TCPConnector, "_wrap_create_connection", no_connection)
    await fetching.refused("http://rebinding.example/", "*")
    assert set(dialled) == {"93.184.216.34"}
    assert fetching.resolved == ["rebinding.example"]


async def test_no_proxy_of_the_environment_is_used(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.9:9")
    async with web_server(_picture) as port:
        await fetching.get(f"http://127.0.0.1:{port}/", "127.0.0.1")
        assert fetching.dialled == [("127.0.0.1", port)]


def _redirecting(status: int, target: str) -> Any:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": target})

    return handler


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_to_allowed_places_only(status: int, fetching: Fetching) -> None:
    async with (
        web_server(_picture) as good,
        web_server(_redirecting(status, f"http://127.0.0.1:{good}/a.png")) as port,
    ):
        first, second = f"127.0.0.1:{port}", f"127.0.0.1:{good}"
        assert await fetching.get(f"http://{first}/", first, second) == DATA
        dialled = len(fetching.dialled)
        assert (await fetching.refused(f"http://{first}/", first)).status == 400
        assert len(fetching.dialled) == dialled + 1


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2/",
        "http://169.254.169.254/latest",
        "//169.254.169.254/",
        "http://internal.example/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1/",
        "http://a\\@127.0.0.1/",
        "http://user@127.0.0.1/",
        "http://2130706433/",
        "",
    ],
)
async def test_a_redirect_elsewhere_is_not_followed(target: str, fetching: Fetching) -> None:
    fetching.names["internal.example"] = ["10.0.0.1"]
    async with web_server(_redirecting(302, target)) as port:
        place = f"127.0.0.1:{port}"
        assert (await fetching.refused(f"http://{place}/", place, "*")).status == 400
        assert fetching.dialled == [("127.0.0.1", port)]


@pytest.mark.parametrize("status", [300, 304, 305, 204, 404, 500])
async def test_other_statuses_are_errors(status: int, fetching: Fetching) -> None:
    async with web_server(_redirecting(status, "http://127.0.0.2/")) as port:
        error = await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.0/8")
        assert str(status) in error.message
        assert len(fetching.dialled) == 1


async def test_at_most_three_redirects(fetching: Fetching) -> None:
    async def counting(request: web.Request) -> web.Response:
        left = int(request.match_info["path"])
        if not left:
            return web.Response(body=DATA)
        return web.Response(status=302, headers={"Location": f"/{left - 1}"})

    async with web_server(counting) as port:
        assert await fetching.get(f"http://127.0.0.1:{port}/3", "127.0.0.1") == DATA
        assert "redirects" in (await fetching.refused(f"http://127.0.0.1:{port}/4", "127.0.0.1")).message


async def test_a_body_above_the_limit_stops_there(fetching: Fetching) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        if request.path == "/lying":
            response.content_length = 10
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(64 << 10))
                sent += 64 << 10
        except ConnectionError:
            return response

    async with web_server(endless) as port:
        error = await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1", max_fetch_mib=1)
        assert "1048576" in error.message
        assert sent < 16 << 20

    async def honest(request: web.Request) -> web.Response:
        return web.Response(body=bytes((1 << 20) + 1))

    async with web_server(honest) as port:
        assert (await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1", max_fetch_mib=1)).status == 400
        error = await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1", budget=100_000)
        assert error.status == 413


async def test_compressed_bodies_are_refused(fetching: Fetching) -> None:
    async def compressed(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=b"x" * 100, headers={"Content-Encoding": "gzip"})

    async with web_server(compressed) as port:
        assert "compressed" in (await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1")).message


async def test_a_slow_host_is_given_up(fetching: Fetching) -> None:
    release = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    async with web_server(slow) as port:
        error = await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1", media_fetch_timeout_s=0.1)
        release.set()
        assert "longer than 0.1 s" in error.message


async def test_a_closed_port_and_a_host_that_speaks_no_http_are_errors(fetching: Fetching) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert (await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1")).status == 400

    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SECRET not http\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(rude, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        error = await fetching.refused(f"http://127.0.0.1:{port}/", "127.0.0.1")
        assert "SECRET" not in error.message


# ---------------------------------------------------------------- files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(DATA)
    (root / "sub" / "with space.png").write_bytes(DATA)
    (root / "link.png").symlink_to(root / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outdir").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.png").write_bytes(DATA)
    return root


@pytest.mark.parametrize("name", ["a.png", "sub/with%20space.png", "sub/../a.png", "link.png"])
async def test_files_below_the_root_are_read(name: str, root: Path, fetching: Fetching) -> None:
    assert await fetching.get(f"file://{root}/{name}", allowed_media_root=str(root)) == DATA
    assert await fetching.get(f"file://localhost{root}/{name}", allowed_media_root=str(root)) == DATA


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "%2e%2e/secret.png",
        "sub/../../secret.png",
        "out.png",
        "outdir/secret.png",
        "../media2/a.png",
        "fifo",
        "",
        "sub",
        "missing.png",
        "a.png%00.jpg",
        "a.png?x",
        "a.png#x",
    ],
)
async def test_other_files_are_refused_in_the_same_words(name: str, root: Path, fetching: Fetching) -> None:
    error = await fetching.refused(f"file://{root}/{name}", allowed_media_root=str(root))
    assert error.message == "url: the file is not a regular file below the allowed media folder"


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/dev/zero", "//host/share", ""])
async def test_nothing_else_of_the_machine_is_read(path: str, root: Path, fetching: Fetching) -> None:
    assert (await fetching.refused(f"file://{path}", allowed_media_root=str(root))).status == 400
    assert (await fetching.refused(f"file://evil.example{path}", allowed_media_root=str(root))).status == 400


async def test_a_large_file_is_refused(root: Path, fetching: Fetching) -> None:
    (root / "large.png").write_bytes(bytes((1 << 20) + 1))
    error = await fetching.refused(f"file://{root}/large.png", allowed_media_root=str(root), max_fetch_mib=1)
    assert "1048576" in error.message


def test_the_limits_are_those_documented() -> None:
    assert edge_fetch.MAX_REDIRECTS == 3

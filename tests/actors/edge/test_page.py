"""The page: who gets it, its headers, that its files ask nothing of anybody else, and that its colours can be read."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge
from vlmrt.actors.edge.page_files import DIRECTORY, INDEX, MEDIA_TYPES, PageFiles
from vlmrt.runtime.config import ApiKey, ServerOptions, VideoOptions
from vlmrt.tools.cli import build_parser
from vlmrt.tools.launch import server_options

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
ROOT = Path(__file__).parents[3]
FILES = sorted(DIRECTORY.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
INTO_CODE = re.compile(  # whatever makes HTML or code of text
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|createContextualFragment|DOMParser"
    r"|setHTML|srcdoc|javascript:|setTimeout\(\s*[\"'`]|trustedTypes"
)
ELSEWHERE = re.compile(  # whatever else could ask another host, or name one
    r"(?:https?:)?//[\w.-]+\.[a-z]{2,}|url\(|@import|WebSocket|EventSource|sendBeacon|XMLHttpRequest"
)
SVG = "http://www.w3.org"  # the name of a kind of element


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        (BROWSER["Accept"], True),
        ("text/html", True),
        ("application/json, TEXT/HTML ; q=0.2", True),
        ("*/*", False),
        ("application/json", False),
        ("text/html;q=0", False),
        ("text/html;q=0.000, */*", False),
        ("text/*", False),
        ("", False),
    ],
)
async def test_browsers_get_the_page_and_others_a_line(accept: str, is_page: bool, edge: RunningEdge) -> None:
    async with http() as session, session.get(edge.url + "/", headers={"Accept": accept}) as response:
        assert response.status == 200
        text = await response.text()
        assert response.content_type == ("text/html" if is_page else "text/plain")
        assert text.startswith("<!doctype html>") == is_page
        if not is_page:
            assert text.count("\n") == 1
            assert "/v1/chat/completions" in text


async def test_every_file_has_a_strict_policy_and_its_type(edge: RunningEdge) -> None:
    paths = ["/", *(f"/page/{name}" for name in PageFiles().names)]
    assert len(paths) == len(FILES)
    async with http() as session:
        for path in paths:
            async with session.get(edge.url + path, headers=BROWSER) as response:
                assert response.status == 200
                assert response.content_type == MEDIA_TYPES[Path(path).suffix or ".html"]
                assert response.charset == "utf-8"
                policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
                assert policy["default-src"] == "'none'"
                assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
                assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
                assert policy["media-src"] == "blob: data:"
                assert policy["img-src"] == "'self' blob: data:"
                assert policy["require-trusted-types-for"] == "'script'"
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert response.headers["Referrer-Policy"] == "no-referrer"
                assert response.headers["Cache-Control"] == "no-cache"


async def test_a_file_that_the_browser_has_is_not_sent_again(edge: RunningEdge) -> None:
    async with http() as session:
        async with session.get(edge.url + "/page/main.js") as response:
            etag = response.headers["ETag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            async with session.get(edge.url + "/page/main.js", headers={"If-None-Match": known}) as response:
                assert response.status == 304
                assert await response.read() == b""
                assert response.headers["ETag"] == etag
                assert response.headers["Cache-Control"] == "no-cache"
        async with session.get(edge.url + "/page/main.js", headers={"If-None-Match": '"other"'}) as response:
            assert response.status == 200
        async with session.get(edge.url + "/", headers=BROWSER) as response:
            assert response.headers["ETag"] != etag
            assert response.headers["Vary"] == "Accept"  # the line for curl is another answer at the same address


async def test_an_allowed_origin_is_one_more_reason_to_vary(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(cors_origins=("https://a.example",)))
    async with running_edge(config, tmp_path) as edge, http() as session:
        headers = {**BROWSER, "Origin": "https://a.example"}
        async with session.get(edge.url + "/", headers=headers) as response:
            assert response.headers.getall("Vary") == ["Accept", "Origin"]


@pytest.mark.parametrize("name", ["nothing.js", INDEX, "..%2Fapp.py", "%2e%2e/app.py", "main.js/", ""])
async def test_nothing_but_the_files_is_served(name: str, edge: RunningEdge) -> None:
    async with http() as session, session.get(f"{edge.url}/page/{name}") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "route_not_found"


@pytest.fixture
async def guarded(checkpoint: Path, tmp_path: Path) -> AsyncIterator[RunningEdge]:
    server = ServerOptions(api_keys=(ApiKey.of("k1"),), max_body_mib=3, limit_images=5, request_timeout_s=7.0)
    config = edge_config(checkpoint, server=server, video=VideoOptions(limit_videos=2, max_mib=9))
    async with running_edge(config, tmp_path) as edge:
        yield edge


async def test_the_page_knows_the_bounds_before_it_has_a_key(guarded: RunningEdge) -> None:
    async with http() as session:
        async with session.get(guarded.url + "/page/config") as response:
            told = await response.json()
        assert told.pop("version")
        assert told == {
            "needs_key": True,
            "max_body_mib": 3,
            "max_video_mib": 9,
            "limit_images": 5,
            "limit_videos": 2,
            "request_timeout_s": 7.0,
            "fetches_urls": False,
        }
        async with session.get(guarded.url + "/", headers=BROWSER) as response:
            assert response.status == 200


async def test_stats_need_a_key_and_show_the_service(guarded: RunningEdge) -> None:
    async with http() as session:
        async with session.get(guarded.url + "/stats") as response:
            assert response.status == 401
        async with session.get(guarded.url + "/stats", headers={"x-api-key": "k1"}) as response:
            assert response.status == 200
            assert response.headers["Cache-Control"] == "no-store"
            stats = await response.json()
    assert stats["ready"] is True
    assert [actor["actor"] for actor in stats["actors"]] == ["edge:0", "scheduler:0"]
    assert stats["recent"]["time_to_first_token"] == {
        "count": 0, "mean_s": None, "p50_s": None, "p90_s": None, "p99_s": None,
    }  # fmt: skip


async def test_without_the_page_there_is_the_line_only(checkpoint: Path, tmp_path: Path) -> None:
    async with (
        running_edge(edge_config(checkpoint, server=ServerOptions(page=False)), tmp_path) as edge,
        http() as session,
    ):
        async with session.get(edge.url + "/", headers=BROWSER) as response:
            assert response.content_type == "text/plain"
        for path in ("/page/main.js", "/page/config"):
            async with session.get(edge.url + path) as response:
                assert response.status == 404
        async with session.get(edge.url + "/stats") as response:
            assert response.status == 200


def test_an_option_of_launch_turns_the_page_off() -> None:
    parse = build_parser().parse_args
    assert server_options(parse(["launch"])).page
    assert not server_options(parse(["launch", "--no-page"])).page


def test_the_package_has_every_file_of_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["vlmrt.actors.edge"]
    assert len(FILES) > 10
    for path in FILES:
        assert any(fnmatch.fnmatch(f"page/{path.name}", pattern) for pattern in patterns), path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_html_or_code_of_text(path: Path) -> None:
    assert INTO_CODE.findall(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    assert set(ELSEWHERE.findall(path.read_text())) <= {SVG}


def test_the_patterns_of_these_tests_find_what_they_are_for() -> None:
    assert INTO_CODE.findall("x.innerHTML = y; eval(z); setTimeout('run()', 1)") != []
    assert ELSEWHERE.findall('<img src="//cdn.example.com/a.png">') != []
    assert ELSEWHERE.findall("fetch('https://example.org')") != []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_files_of_the_page_by_their_names(path: Path) -> None:
    for name in re.findall(r'from "([^"]+)"|import\("([^"]+)"\)', path.read_text()):
        assert (DIRECTORY / "".join(name)).is_file(), name
        assert "".join(name).startswith("./")


class _Parts(HTMLParser):
    """Of index.html: ids, what refers to them, and what would be inline."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.referred: set[str] = set()
        self.inline: list[str] = []
        self.loaded: list[str] = []
        self.unlabelled: list[str] = []
        self._labelled: set[str] = set()
        self._fields: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.inline += [f"{tag} {name}" for name in values if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in values):
            self.inline.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.loaded += [values[name] for name in ("src", "href") if name in values and not values[name].startswith("#")]
        for name in ("for", "aria-controls", "aria-describedby"):
            self.referred |= set(values.get(name, "").split())
        self.referred |= {values["href"][1:]} if values.get("href", "").startswith(("#icon", "#message")) else set()
        self._labelled |= {values["for"]} if tag == "label" else set()
        if tag in ("input", "select", "textarea") and "aria-label" not in values:
            self._fields.append(values["id"])

    def fields_without_label(self) -> set[str]:
        return set(self._fields) - self._labelled


def test_the_markup_has_nothing_inline_and_every_reference_leads_somewhere() -> None:
    parts = _Parts()
    parts.feed((DIRECTORY / INDEX).read_text())
    assert parts.inline == []
    assert len(parts.ids) == len(set(parts.ids))
    assert parts.referred <= set(parts.ids)
    assert parts.fields_without_label() == set()
    assert all((DIRECTORY.parent / name).is_file() for name in parts.loaded), parts.loaded
    assert len(parts.loaded) >= 6
    asked = {name for path in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"\)', path.read_text())}
    assert asked <= set(parts.ids)


PAIRS = [  # text upon ground
    *((text, ground) for text in ("ink", "soft") for ground in ("paper", "surface", "sunken")),
    ("ink", "tint"),
    ("on-accent", "accent"),
    ("on-accent", "accent-strong"),
    ("danger", "danger-tint"),
    ("soft", "danger-tint"),
    ("ink", "danger-tint"),
]
SHAPES = [("edge", "surface"), ("edge", "paper"), ("accent", "surface"), ("focus", "paper"), ("focus", "surface"),
          ("good", "surface"), ("busy", "surface"), ("danger", "surface")]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_shapes_stand_out_from_their_ground(theme: str) -> None:
    text = (DIRECTORY / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in text.split("@media", 2)[:2])
    assert light.keys() == dark.keys()
    colours = light if theme == "light" else dark
    for ink, ground in PAIRS:
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for shape, ground in SHAPES:
        assert contrast(colours[shape], colours[ground]) >= 3, (shape, ground)


def contrast(colour: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it: 1 to 21."""
    bright, dim = sorted((_luminance(colour), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

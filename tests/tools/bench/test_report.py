"""A result as a page and as text."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from tests.tools.bench.test_summary import FAILED, FIRST, SECOND
from vlmrt.tools.bench import charts
from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.charts import Chart, Series
from vlmrt.tools.bench.datasets import DATASETS
from vlmrt.tools.bench.replies import Replies
from vlmrt.tools.bench.report import MAX_DOTS, run_page, sweep_page, thinned
from vlmrt.tools.bench.run import said_of
from vlmrt.tools.bench.settings import Settings
from vlmrt.tools.bench.summary import Result, summary
from vlmrt.tools.bench.tables import result_lines

SVG = "svg"
ODD = '<script>alert("&")</script>'


def result_of(replies: Replies, model: str = "model", **more: object) -> Result:
    objectives = {"ttft": 200.0}
    target = Target("http://127.0.0.1:8000", model=model)
    settings = Settings(target, "images", DATASETS["images"].usual, objectives_ms=objectives)
    said = said_of(settings, settings.load(None))
    figures = summary(replies, objectives, (90.0, 99.0))
    return {**said, **figures, "warm_up_errors": 0, "first_warm_up_error": None, **more}


def parsed(page: str) -> ElementTree.Element:
    """Fails where it is not well-formed."""
    return ElementTree.fromstring(page)


def texts(page: str) -> str:
    return "\n".join(text.strip() for text in parsed(page).itertext() if text.strip())


def assert_needs_nothing_else(page: str) -> None:
    names = {name for element in parsed(page).iter() for name in element.attrib}
    assert not names & {"src", "href", "srcset", "data", "action", "poster", "onload", "onclick", "style"}
    assert not {element.tag for element in parsed(page).iter()} & {"script", "link", "iframe", "img", "object", "base"}
    assert not re.search(r"url\(|@import|@font-face", page)
    assert "default-src 'none'" in page


def test_the_page_of_a_run_is_well_formed_and_asks_nobody_for_anything() -> None:
    replies = Replies([FIRST, SECOND], [])
    page = run_page(result_of(replies, model=ODD), replies, [ODD])
    assert_needs_nothing_else(page)
    said = texts(page)
    assert ODD in said  # as text
    for text in ("images: 100 requests", "requests/s", "time to first token (TTFT)", "ITL is of tokens"):
        assert text in said
    assert len(list(parsed(page).iter(SVG))) == 7
    assert "FAILED" not in said


def test_control_characters_of_a_server_are_on_no_page() -> None:
    replies = Replies([FIRST], [])
    page = run_page(result_of(replies, model="\x1b[31m\x00name"), replies, [])
    assert_needs_nothing_else(page)
    assert "\ufffd[31m\ufffdname" in texts(page)


def test_failures_stand_on_the_page_and_in_the_text() -> None:
    replies = Replies([FIRST, FAILED], [])
    result = result_of(replies, warm_up_errors=2, first_warm_up_error="500: no")
    for said in (texts(run_page(result, replies, [])), "\n".join(result_lines(result, ("ttft",), ["short"]))):
        assert "FAILED: 1 requests" in said
        assert "1 x HTTP 429: 429: no room" in said
        assert "FAILED in the warm-up: 2 requests: 500: no" in said


def test_a_run_without_an_answer_has_a_page_all_the_same() -> None:
    replies = Replies([FAILED], [])
    page = run_page(result_of(replies), replies, [])
    assert_needs_nothing_else(page)
    assert "nothing to show" in page
    assert "\n".join(result_lines(result_of(replies), ("ttft", "itl"), []))


def test_a_sweep_is_plotted_over_what_differs() -> None:
    results = [result_of(Replies([FIRST, SECOND], []), max_concurrency=count) for count in (1, 2, 4)]
    page = sweep_page(results, [])
    assert_needs_nothing_else(page)
    assert "requests at once" in texts(page)
    knots = [element for element in parsed(page).iter("circle") if "knot" in element.attrib["class"]]
    assert len(knots) == 3 * 10  # 3 points of 10 lines
    rates = [result_of(Replies([FIRST], []), request_rate=rate) for rate in (1.0, 2.0)]
    assert "requests/s sent" in texts(sweep_page(rates, []))


def test_the_table_shows_the_metrics_asked_for_and_their_percentiles() -> None:
    lines = result_lines(result_of(Replies([FIRST, SECOND], [])), ("ttft", "client_queue_time"), ["the server is odd"])
    shown = "\n".join(lines)
    assert "time to first token (TTFT)" in shown
    assert "time in the client's queue" in shown
    assert "(ITL)" not in shown
    assert "good requests/s (ttft 200 ms)" in shown
    assert "note: the server is odd" in shown
    (head,) = [line for line in lines if line.startswith("ms ")]
    assert head.split() == ["ms", "mean", "median", "std", "p90", "p99"]


@pytest.mark.parametrize("values", [(0.0, 1.0), (3.0, 3.0), (0.2, 0.21), (0.0, 1e6), (-4.0, 7.0)])
def test_an_axis_covers_its_values_with_round_ticks(values: tuple[float, float]) -> None:
    axis = charts.linear(min(values), max(max(values), min(values) + 0.1), 0.0, 100.0)
    assert axis.ticks[0] <= min(values)
    assert axis.ticks[-1] >= max(values)
    assert 2 <= len(axis.ticks) <= 8
    assert all(0 <= axis.place(value) <= 100 for value in values)


def test_an_axis_is_logarithmic_where_values_differ_much() -> None:
    def ticks(*xs: float) -> list[float]:
        chart = Chart("x", "x", "y", [Series("s", [(x, 1.0) for x in xs])], may_be_log=True)
        return list(charts.axes_of(chart)[0].ticks)

    assert ticks(2.0, 300.0) == [1.0, 10.0, 100.0, 1000.0]
    assert ticks(2.0, 9.0)[0] == 0.0


def test_many_points_are_thinned_evenly() -> None:
    points = [(float(index), 0.0) for index in range(10 * MAX_DOTS + 1)]
    kept = thinned(points)
    assert len(kept) <= MAX_DOTS
    assert {after[0] - before[0] for before, after in itertools.pairwise(kept)} == {11.0}
    assert thinned(points[:5]) == points[:5]
    assert thinned([]) == []


def test_page_and_text_of_the_stall_test_show_the_streams() -> None:
    images = [msgspec.structs.replace(FIRST, sent_s=0.05), SECOND]
    replies = Replies(images, [FIRST, FIRST])
    result = result_of(replies)
    assert result["stall_itl_max_ms"] > 0
    assert "itl_max_ms" in texts(run_page(result, replies, []))
    assert any("itl_max_ms" in line for line in result_lines(result, ("ttft",), []))


def test_the_page_is_written_without_a_byte_order_mark(tmp_path: Path) -> None:
    replies = Replies([FIRST], [])
    file = tmp_path / "page.html"
    file.write_text(run_page(result_of(replies), replies, []))
    assert file.read_bytes().startswith(b"<!DOCTYPE html>")

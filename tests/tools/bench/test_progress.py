"""What a person sees while a load is sent."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vlmrt.tools.bench import progress
from vlmrt.tools.bench.pool import Progress
from vlmrt.tools.bench.progress import LoadProgress

NOW = Progress(num_done=5, num_failed=1, num_tokens=400, num_open=3, elapsed_s=2.0)
SAID = "2.5 requests/s, 200 tokens/s, 3 open, 1 failed"


def test_a_pipe_gets_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with LoadProgress(Console(file=file), "measuring", 20) as bar:
        bar.watch(NOW)
        assert file.getvalue() == ""  # too early
        monkeypatch.setattr(progress, "LINE_S", 0.0)
        bar.watch(NOW)
    assert file.getvalue() == f"measuring: 5 of 20, {SAID}\n"


def test_a_terminal_gets_a_bar() -> None:
    file = io.StringIO()
    with LoadProgress(Console(file=file, force_terminal=True, width=160), "measuring", 20) as bar:
        bar.watch(NOW)
    assert "5/20" in file.getvalue()
    assert SAID in file.getvalue()


def test_nothing_is_shown_to_those_who_do_not_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    file = io.StringIO()
    with LoadProgress(Console(file=file, force_terminal=True), "measuring", 20, shown=False) as bar:
        bar.watch(NOW)
    assert file.getvalue() == ""

"""How far a load has come: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlmrt.tools.bench import pool

LINE_S = 5.0


class LoadProgress:
    """`with LoadProgress(console, "measuring", 100) as progress: pool.play(load, progress.watch)`."""

    def __init__(self, console: Console, name: str, total: int, *, shown: bool = True) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._shown = shown
        self._line_s = time.monotonic()
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[now]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(name, total=total, now="")

    def watch(self, now: pool.Progress) -> None:
        text = said(now)
        if self._bar is not None:
            self._bar.update(self._task, completed=now.num_done, now=text)
        elif self._shown and time.monotonic() - self._line_s >= LINE_S:
            self._line_s = time.monotonic()
            self._console.print(f"{self._name}: {now.num_done} of {self._total}, {text}")

    def __enter__(self) -> LoadProgress:
        self._line_s = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def said(now: pool.Progress) -> str:
    elapsed_s = max(now.elapsed_s, 1e-6)
    rates = f"{now.num_done / elapsed_s:.1f} requests/s, {now.num_tokens / elapsed_s:.0f} tokens/s"
    return f"{rates}, {now.num_open} open, {now.num_failed} failed"

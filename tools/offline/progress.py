"""What a person sees on stderr while an engine starts and answers: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlmrt.tools.terminal import console_for


def stderr_console() -> Console:
    return console_for(sys.stderr)


class BatchProgress:
    """Requests done, requests/s and tokens/s.  Called from one thread at a time."""

    def __init__(self, total: int | None, *, shown: bool) -> None:
        """`total` None: as many as will come."""
        self.num_done = 0
        self.num_tokens = 0
        self._began_s = time.monotonic()
        self._bar: Progress | None = None
        console = stderr_console()
        if shown and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rates]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("requests", total=total, rates="")

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def done(self, num_tokens: int) -> None:
        """One request has ended, after so many tokens of output."""
        self.num_done += 1
        self.num_tokens += num_tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_done, rates=self.rates())

    def rates(self) -> str:
        elapsed_s = max(self.elapsed_s, 1e-6)
        return f"{self.num_done / elapsed_s:.1f} requests/s, {self.num_tokens / elapsed_s:.0f} tokens/s"

    def __enter__(self) -> BatchProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

"""Progress of what actors load, as bars that go away."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_BYTE_STAGES = ("loading weights", "pinning host memory")  # that count bytes
_MIB = 1 << 20


class LoadingBars:
    """One bar for each actor and stage, on a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._bars: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
            self._bars = Progress(*columns, console=console, transient=True)
            self._bars.start()

    @property
    def shown(self) -> bool:
        return self._bars is not None

    def show(self, actor: str, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            return
        key, amount = (actor, stage), amount_text(stage, done, total)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(f"{actor} {stage}", total=total, amount=amount)
        self._bars.update(self._tasks[key], completed=done, total=total, amount=amount)

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def amount_text(stage: str, done: int, total: int) -> str:
    if stage in _BYTE_STAGES:
        return f"{done / _MIB:.1f}/{total / _MIB:.1f} MiB"
    return f"{done}/{total}"

"""The live view: a head, figures and latencies, actors, open requests, and keys that act on them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.coordinate import Coordinate
from textual.events import Resize
from textual.widgets import DataTable, Footer, Sparkline, Static

from vlmrt.runtime.admin_keys import ClientKeys
from vlmrt.runtime.admin_messages import OpenRequestRow
from vlmrt.runtime.service_stats import ActorStats
from vlmrt.tools.admin.client import AdminError, check_keys
from vlmrt.tools.admin.discovery import find_address
from vlmrt.tools.admin.figures import count_text, plural
from vlmrt.tools.admin.top import panels
from vlmrt.tools.admin.top.confirm import Confirm
from vlmrt.tools.admin.top.feed import Feed, Look
from vlmrt.tools.admin.top.style import CSS

LOOK_PERIOD_S = 1.0
WIDE_COLUMNS = 140  # from here on there is room for curves and for more of each request
HISTORY = 120  # looks in a curve

Table = DataTable[Text]


def run_top(address: str | None, pid: int | None, keys: ClientKeys | None) -> int:
    """Until the user leaves.  Raises AdminError where there is no such service, no key for it, or no terminal."""
    check_keys(find_address(address, pid), keys)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # where Textual reads and writes
        raise AdminError("top needs a terminal; `vlmrt admin stats --watch` does not")
    app = TopApp(Feed(lambda: find_address(address, pid), keys))
    app.run()
    return app.return_code or 0


class Curve:
    """The last values of a figure, and a title that says the newest."""

    def __init__(self, name: str, values: deque[float]) -> None:
        self._name = name
        self._values = values
        self.title = Static(name)
        self.line = Sparkline([])

    def add(self, value: float) -> None:
        self._values.append(value)
        self.line.data = list(self._values)
        most = count_text(max(self._values))
        self.title.update(Text.assemble((self._name, "bold"), f"  {count_text(value)}, at most {most}"))


def fill(table: Table, rows: Sequence[Sequence[Text]]) -> None:
    """Give the table these rows.  Those that it has already are changed in place, so that nothing jumps."""
    while table.row_count > len(rows):
        table.remove_row(list(table.rows)[-1])
    for index, cells in enumerate(rows):
        if index >= table.row_count:
            table.add_row(*cells)
            continue
        for column, cell in enumerate(cells):
            if table.get_cell_at(Coordinate(index, column)) != cell:
                table.update_cell_at(Coordinate(index, column), cell, update_width=True)


class TopApp(App[None]):
    """Args: `feed` is where it looks; `period_s` how often."""

    TITLE = "vlmrt admin top"
    CSS = CSS
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "cancel", "Cancel request"),
        Binding("d", "drain", "Drain or undrain"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, feed: Feed, period_s: float = LOOK_PERIOD_S) -> None:
        super().__init__()
        self._feed = feed
        self._period_s = period_s
        self.last_look = Look()
        self.num_looks = 0
        self._wanted = asyncio.Event()  # another look, without waiting for its time
        self._requests: list[OpenRequestRow] = []
        nothing = [0.0] * HISTORY  # so that the newest is at the right, and curves begin at 0
        self._head, self._figures, self._latencies = Static(id="head"), Static(id="figures"), Static(id="latencies")
        self._curves = {name: Curve(name, deque(nothing, HISTORY)) for name in ("output tokens/s", "requests running")}
        self._actor_table: Table = DataTable(id="actors", cursor_type="none", zebra_stripes=True)
        self._request_table: Table = DataTable(id="requests", cursor_type="row", zebra_stripes=True)

    def compose(self) -> ComposeResult:
        yield self._head
        with Horizontal(id="above"):
            with Vertical(id="numbers"):
                yield self._figures
                yield self._latencies
            with Vertical(id="curves"):
                for curve in self._curves.values():
                    yield curve.title
                    yield curve.line
        yield self._actor_table
        yield self._request_table
        yield Footer()

    def on_mount(self) -> None:
        self._request_table.focus()
        self._watch()

    @on(Resize)
    def _fit(self, event: Resize) -> None:
        """More columns where there is room for them."""
        self.set_class(event.size.width >= WIDE_COLUMNS, "wide")
        self._requests = []
        for table in (self._actor_table, self._request_table):
            table.clear(columns=True)
        self._show(self.last_look)

    @work(exclusive=True)
    async def _watch(self) -> None:
        try:
            while True:
                self._wanted.clear()
                self._show(await self._feed.look())
                self.num_looks += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wanted.wait(), self._period_s)
        finally:
            self._feed.close()

    def look_soon(self) -> None:
        """Not only when its time comes."""
        self._wanted.set()

    # ------------------------------------------------------------ what is shown

    def _show(self, look: Look) -> None:
        self.last_look = look
        self.set_class(bool(look.problem), "gone")
        self._head.update(panels.head(look, self.size.width - 2))
        if look.stats is None:
            return
        self._figures.update(panels.figures(look.stats))
        self._latencies.update(panels.latencies(look.stats))
        self._show_curves(look)
        self._show_actors(look.stats.stats.actors)
        if look.requests is not None:
            self._show_requests(list(look.requests.rows), look.requests.num_open)

    def _show_curves(self, look: Look) -> None:
        assert look.stats is not None
        stats = look.stats.stats
        now = {
            "output tokens/s": stats.rates.generation_tokens_per_s,
            "requests running": float(stats.requests.running),
        }
        for name, value in now.items():
            self._curves[name].add(0.0 if look.problem else value)

    def _show_actors(self, rows: Sequence[ActorStats]) -> None:
        table = self._actor_table
        wide = self.has_class("wide")
        if not table.columns:
            columns = panels.WIDE_ACTOR_COLUMNS if wide else panels.ACTOR_COLUMNS
            table.add_columns(*panels.header_cells(columns, panels.ACTOR_LEFT))
        fill(table, [panels.actor_row(row, wide=wide) for row in rows])

    def _show_requests(self, rows: list[OpenRequestRow], num_open: int) -> None:
        """The cursor stays on its request, wherever that has moved."""
        table = self._request_table
        wide = self.has_class("wide")
        if not table.columns:
            columns = panels.WIDE_REQUEST_COLUMNS if wide else panels.REQUEST_COLUMNS
            table.add_columns(*panels.header_cells(columns, panels.REQUEST_LEFT))
        before, chosen = table.cursor_row, self._chosen()
        self._requests = rows
        fill(table, [panels.request_row(row, wide=wide) for row in rows])
        if chosen is not None and rows:
            same = [index for index, row in enumerate(rows) if _identity(row) == _identity(chosen)]
            table.move_cursor(row=same[0] if same else min(before, len(rows) - 1), animate=False)
        table.border_title = plural(num_open, "open request")

    def _chosen(self) -> OpenRequestRow | None:
        """The request that the cursor is on."""
        row = self._request_table.cursor_row
        return self._requests[row] if 0 <= row < len(self._requests) else None

    # ------------------------------------------------------------ keys

    def action_cancel(self) -> None:
        chosen = self._chosen()
        if chosen is None:
            self.notify("no request is open", timeout=3)
            return
        id = chosen.answer_id or chosen.label
        self._ask(f"Cancel the request {chosen.label}? Its client gets an error.", lambda: self._cancel(id))

    def action_drain(self) -> None:
        stats = self.last_look.stats
        if stats is None:
            return
        draining = not stats.stats.draining
        question = "Refuse new requests, and let the open ones end?" if draining else "Take new requests again?"
        self._ask(question, lambda: self._drain(draining))

    def _ask(self, question: str, act: Callable[[], object]) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                act()

        self.push_screen(Confirm(question), answered)

    @work
    async def _cancel(self, id: str) -> None:
        try:
            num_answers = await self._feed.cancel(id)
        except AdminError as error:
            self.notify(str(error), severity="error")
        else:
            self.notify(f"cancelled {plural(num_answers, 'request')}")
            self.look_soon()

    @work
    async def _drain(self, draining: bool) -> None:
        try:
            reply = await self._feed.drain(draining)
        except AdminError as error:
            self.notify(str(error), severity="error")
        else:
            self.notify("new requests are refused" if reply.draining else "new requests are taken")
            self.look_soon()


def _identity(row: OpenRequestRow) -> tuple[str, str, str]:
    return row.edge, row.label, row.answer_id

"""The live view: a head, figures and latencies, actors, open requests, and keys that act on them."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.widgets import DataTable, Footer, Sparkline, Static

from vlmrt.runtime.admin_keys import ClientKeys
from vlmrt.runtime.admin_messages import OpenRequestRow
from vlmrt.runtime.service_stats import ActorStats
from vlmrt.tools.admin.client import AdminError
from vlmrt.tools.admin.discovery import find_address
from vlmrt.tools.admin.figures import count_text, plural
from vlmrt.tools.admin.top import panels
from vlmrt.tools.admin.top.confirm import Confirm
from vlmrt.tools.admin.top.feed import Feed, Look
from vlmrt.tools.admin.top.style import CSS

LOOK_PERIOD_S = 1.0
WIDE_COLUMNS = 140  # from here on there is room for curves and for more of each request
HISTORY = 120  # looks in a curve


def run_top(address: str | None, pid: int | None, keys: ClientKeys | None) -> int:
    """Until the user leaves.  Raises AdminError where there is no such service, or no terminal."""
    find_address(address, pid)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # where Textual reads and writes
        raise AdminError("top needs a terminal; `vlmrt admin stats --watch` does not")
    app = TopApp(Feed(lambda: find_address(address, pid), keys))
    app.run()
    return app.return_code or 0


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
        self._requests: list[OpenRequestRow] = []
        nothing = [0.0] * HISTORY  # so that the newest is at the right, and curves begin at 0
        self._curves = {name: deque(nothing, HISTORY) for name in ("tokens", "running")}

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        with Horizontal(id="above"):
            with Vertical(id="numbers"):
                yield Static(id="figures")
                yield Static(id="latencies")
            with Vertical(id="curves"):
                yield Static("output tokens/s", id="tokens-title")
                yield Sparkline([], id="tokens")
                yield Static("requests running", id="running-title")
                yield Sparkline([], id="running")
        yield DataTable(id="actors", cursor_type="none", zebra_stripes=True)
        yield DataTable(id="requests", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        self.theme = "textual-dark"
        self.query_one("#requests", DataTable).focus()
        self._watch()

    @on(Resize)
    def _fit(self) -> None:
        """More columns where there is room for them."""
        self.set_class(self.size.width >= WIDE_COLUMNS, "wide")
        self._requests = []
        for name in ("#actors", "#requests"):
            self.query_one(name, DataTable).clear(columns=True)
        self._show(self.last_look)

    @work(exclusive=True)
    async def _watch(self) -> None:
        try:
            while True:
                self._show(await self._feed.look())
                self.num_looks += 1
                await asyncio.sleep(self._period_s)
        finally:
            self._feed.close()

    # ------------------------------------------------------------ what is shown

    def _show(self, look: Look) -> None:
        self.last_look = look
        self.set_class(bool(look.problem), "gone")
        self.query_one("#head", Static).update(panels.head(look, self.size.width - 2))
        if look.stats is None:
            return
        self.query_one("#figures", Static).update(panels.figures(look.stats))
        self.query_one("#latencies", Static).update(panels.latencies(look.stats))
        self._show_curves(look)
        self._show_actors(look.stats.stats.actors)
        if look.requests is not None:
            self._show_requests(list(look.requests.rows), look.requests.num_open)

    def _show_curves(self, look: Look) -> None:
        assert look.stats is not None
        stats = look.stats.stats
        now = {"tokens": stats.rates.generation_tokens_per_s, "running": float(stats.requests.running)}
        titles = {"tokens": "output tokens/s", "running": "requests running"}
        for name, value in now.items():
            curve = self._curves[name]
            curve.append(0.0 if look.problem else value)
            self.query_one(f"#{name}", Sparkline).data = list(curve)
            title = Text.assemble((titles[name], "bold"), f"  {count_text(value)}, at most {count_text(max(curve))}")
            self.query_one(f"#{name}-title", Static).update(title)

    def _show_actors(self, rows: Sequence[ActorStats]) -> None:
        table = self.query_one("#actors", DataTable)
        wide = self.has_class("wide")
        if not table.columns:
            columns = panels.WIDE_ACTOR_COLUMNS if wide else panels.ACTOR_COLUMNS
            table.add_columns(*panels.header_cells(columns, panels.ACTOR_LEFT))
        table.clear()
        for row in rows:
            table.add_row(*panels.actor_row(row, wide=wide))

    def _show_requests(self, rows: list[OpenRequestRow], num_open: int) -> None:
        """The cursor stays on its request, wherever that has moved."""
        table = self.query_one("#requests", DataTable)
        wide = self.has_class("wide")
        if not table.columns:
            columns = panels.WIDE_REQUEST_COLUMNS if wide else panels.REQUEST_COLUMNS
            table.add_columns(*panels.header_cells(columns, panels.REQUEST_LEFT))
        chosen = self._chosen()
        self._requests = rows
        table.clear()
        for row in rows:
            table.add_row(*panels.request_row(row, wide=wide))
        if chosen is not None:
            same = [index for index, row in enumerate(rows) if _identity(row) == _identity(chosen)]
            table.move_cursor(row=same[0] if same else min(table.cursor_row, len(rows) - 1), animate=False)
        table.border_title = plural(num_open, "open request")

    def _chosen(self) -> OpenRequestRow | None:
        """The request that the cursor is on."""
        row = self.query_one("#requests", DataTable).cursor_row
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

    @work
    async def _drain(self, draining: bool) -> None:
        try:
            reply = await self._feed.drain(draining)
        except AdminError as error:
            self.notify(str(error), severity="error")
        else:
            self.notify("new requests are refused" if reply.draining else "new requests are taken")


def _identity(row: OpenRequestRow) -> tuple[str, str, str]:
    return row.edge, row.label, row.answer_id

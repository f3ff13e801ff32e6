"""The parts of the live view that are text: figures, latencies, cells of the two tables.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from vlmrt.runtime.admin_messages import OpenRequestRow, StatsReply
from vlmrt.runtime.service_stats import ActorStats, CacheStats, ServiceStats
from vlmrt.tools.admin.figures import (
    aligned,
    bytes_text,
    count_text,
    seconds_text,
    share_text,
    shortened,
)
from vlmrt.tools.admin.text_views import latency_cells, state_text
from vlmrt.tools.admin.top.feed import Look

BAR_WIDTH = 12
STATE_COLOURS = {"ready": "green", "starting": "yellow", "restarting": "yellow", "failed": "red"}
REQUEST_COLOURS = {"decode": "green", "prefill": "cyan", "media": "yellow", "waiting": "yellow", "preparing": "yellow"}
LATE_HEARTBEAT_S = 3.0


def head(look: Look, width: int) -> Text:
    """One line: which service, and how it is."""
    reply = look.stats
    if reply is None:
        return Text(look.problem or "connecting ...", style="bold yellow")
    state, style = (look.problem, "bold white on red") if look.problem else _state(reply.stats)
    end = Text.assemble((f" {state} ", style), f"  up {seconds_text(reply.stats.uptime_s)}")
    room = max(10, width - end.cell_len - 2)
    name = f"{reply.model}  {reply.url}"
    begin = Text(shortened(name, room), style="bold")
    begin.append(" " * max(1, width - begin.cell_len - end.cell_len))
    return begin + end


def _state(stats: ServiceStats) -> tuple[str, str]:
    if stats.draining:
        return "draining", "bold black on yellow"
    return ("ready", "bold black on green") if stats.ready else (state_text(stats), "bold white on red")


def figures(reply: StatsReply) -> Text:
    """Requests, rates and caches, five lines below 80 columns."""
    stats = reply.stats
    requests, rates = stats.requests, stats.rates
    rows = [
        (
            "requests",
            f"{requests.running} running, {requests.waiting} waiting; {count_text(requests.succeeded)} done, "
            f"{count_text(requests.failed)} failed, {count_text(requests.aborted)} aborted",
        ),
        (
            "rates",
            f"{count_text(rates.generation_tokens_per_s)} tokens/s, {count_text(rates.prompt_tokens_per_s)} of prompt, "
            f"{count_text(rates.images_per_s)} images/s, {count_text(rates.requests_per_s)} requests/s",
        ),
        ("KV cache", _cache(stats.prefix_cache, "tokens")),
        ("images", _cache(stats.embedding_cache, "images")),
    ]
    return _named(rows)


def _named(rows: Sequence[tuple[str, str]]) -> Text:
    text = Text()
    for index, (name, value) in enumerate(rows):
        text.append(f"{name:<10}", style="bold")
        text.append(value + ("\n" if index < len(rows) - 1 else ""))
    return text


def _cache(cache: CacheStats, unit: str) -> str:
    found = f", {share_text(cache.hit_rate)} of {count_text(cache.queries)} {unit} found" if cache.queries else ""
    host = f" + {bytes_text(cache.host_bytes)} host" if cache.host_bytes else ""
    return f"{bar(cache.usage)} {share_text(cache.usage):>5} in use, {bytes_text(cache.num_bytes)} kept{host}{found}"


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """█ for what is used, ░ for the rest; something used is never shown as nothing."""
    full = min(width, max(int(share > 0), round(share * width)))
    return "█" * full + "░" * (width - full)


def latencies(reply: StatsReply) -> Text:
    """Percentiles of the last minute; of what has none there, since the start."""
    stats = reply.stats
    recent, total = latency_cells(stats.recent), latency_cells(stats.total)
    rows = [("latency", "p50", "p90", "p99", "mean", "of")]
    for (what, now), (_, ever) in zip(recent, total, strict=True):
        cells, since = (ever, "all") if now[0] == "0" else (now, f"{stats.recent.period_s:.0f} s")
        count, mean, p50, p90, p99 = cells
        rows.append((what, p50, p90, p99, mean, f"{count} in {since}" if count != "0" else "-"))
    lines = aligned(rows, left=(0, 5), gap=3)
    text = Text(lines[0] + "\n", style="bold")
    text.append("\n".join(lines[1:]), style="not bold")
    return text


# ---------------------------------------------------------------- tables

ACTOR_COLUMNS = ("actor", "state", "pid", "device", "memory", "GPU mem", "beat", "restarts")
WIDE_ACTOR_COLUMNS = (*ACTOR_COLUMNS, "loop lag", "mailbox", "epoch")
ACTOR_LEFT = (0, 1, 3)
REQUEST_COLUMNS = ("request", "state", "age", "prompt", "cached", "output", "images", "rows")
WIDE_REQUEST_COLUMNS = (*REQUEST_COLUMNS, "computed", "choices", "edge", "answer", "path")
REQUEST_LEFT = (0, 1, 10, 11, 12)
_NARROW_LABEL = 22
_WIDE_LABEL = 36


def actor_row(actor: ActorStats, *, wide: bool) -> list[Text]:
    late = "red" if actor.heartbeat_age_s > LATE_HEARTBEAT_S else ""
    cells = [
        (actor.actor, "bold"),
        (actor.state, STATE_COLOURS.get(actor.state, "")),
        (str(actor.pid or "-"), ""),
        (actor.device, ""),
        (bytes_text(actor.resident_bytes), ""),
        (bytes_text(actor.device_bytes) if actor.device_bytes else "-", ""),
        (seconds_text(actor.heartbeat_age_s), late),
        (str(actor.restarts), "yellow" if actor.restarts else ""),
    ]
    if wide:
        cells += [
            (seconds_text(actor.loop_lag_ms / 1000), ""),
            (str(actor.mailbox_depth), ""),
            (str(actor.epoch), ""),
        ]
    return _cells(cells, ACTOR_LEFT)


def request_row(row: OpenRequestRow, *, wide: bool) -> list[Text]:
    output = f"{row.num_output_tokens}/{row.max_tokens}" if row.max_tokens else "-"
    cells = [
        (shortened(row.label, _WIDE_LABEL if wide else _NARROW_LABEL), "bold"),
        (row.state, REQUEST_COLOURS.get(row.state, "")),
        (seconds_text(row.age_s), ""),
        (count_text(row.num_prompt_tokens), ""),
        (count_text(row.num_cached_tokens), ""),
        (output, ""),
        (str(row.num_images), ""),
        (count_text(row.num_rows), ""),
    ]
    if wide:
        cells += [
            (count_text(row.num_computed_tokens), ""),
            (str(row.num_choices), ""),
            (row.edge, ""),
            (shortened(row.answer_id, 45), ""),
            (row.path, ""),
        ]
    return _cells(cells, REQUEST_LEFT)


def _cells(cells: Sequence[tuple[str, str]], left: Sequence[int]) -> list[Text]:
    return [
        Text(text, style=style, justify="left" if index in left else "right")
        for index, (text, style) in enumerate(cells)
    ]


def header_cells(columns: Sequence[str], left: Sequence[int]) -> list[Text]:
    return [Text(column, justify="left" if index in left else "right") for index, column in enumerate(columns)]

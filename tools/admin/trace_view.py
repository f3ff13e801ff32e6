"""One request's timeline as lines: what happened where, when and for how long, and a bar for each.  Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vlmrt.runtime.admin_messages import TraceReply
from vlmrt.runtime.timeline import Span, Timeline
from vlmrt.tools.admin.figures import aligned, plural, seconds_text, shortened

MIN_BAR = 20
MAX_BAR = 80
MAX_WHAT = 24


def trace_lines(reply: TraceReply, width: int, *, bar: str = "█") -> list[str]:
    """Args: `width` of the terminal; `bar` is the character that bars are made of."""
    timeline = reply.timeline
    end_s = timeline.end_s if timeline.end_s is not None else reply.now_s
    total_s = max(1e-6, end_s - timeline.arrived_s)
    lines = [*_head(timeline, reply.edge, total_s), ""]
    if not timeline.spans:
        return [*lines, "nothing of it is known yet"]
    head = ("what", "where", "from", "took", "")
    table = aligned([head, *(_cells(span, timeline.arrived_s) for span in timeline.spans)], left=(0, 1, 4))
    fixed = max(map(len, table)) + 2
    room = min(MAX_BAR, max(MIN_BAR, width - fixed))
    bars = ["", *(_bar(span, timeline.arrived_s, total_s, room, bar) for span in timeline.spans)]
    lines += [f"{line.ljust(fixed)}{bar}".rstrip() for line, bar in zip(table, bars, strict=True)]
    if timeline.num_lost_spans:
        lines.append(f"... and {timeline.num_lost_spans} more that were not kept")
    return lines


def named_timeline(reply: TraceReply) -> dict[str, Any]:
    """The timeline for JSON; times of spans are in seconds since the request arrived."""
    timeline = reply.timeline
    whole: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(timeline, spans=()))
    whole["edge"] = reply.edge
    whole["spans"] = [
        {
            "name": span.name,
            "actor": span.actor,
            "what": span.what,
            "begin_s": span.begin_s - timeline.arrived_s,
            "end_s": span.end_s - timeline.arrived_s,
        }
        for span in timeline.spans
    ]
    return whole


def _head(timeline: Timeline, edge: str, total_s: float) -> list[str]:
    outcome = timeline.outcome if timeline.end_s is not None else "still open"
    facts = [
        ("request", timeline.label),
        ("answer", timeline.answer_id or "none yet"),
        ("path", f"{timeline.path} at {edge}"),
        ("outcome", f"{outcome} after {seconds_text(total_s)}"),
        (
            "tokens",
            f"{timeline.num_prompt_tokens:,} of prompt ({timeline.num_cached_tokens:,} cached), "
            f"{timeline.num_output_tokens:,} of output; {plural(timeline.num_media, 'image')}",
        ),
    ]
    if timeline.first_token_s is not None:
        first = f"after {seconds_text(timeline.first_token_s - timeline.arrived_s)}"
        gap = f"; longest gap {seconds_text(timeline.max_gap_s)}" if timeline.max_gap_s else ""
        facts.append(("first token", first + gap))
    return aligned(facts, left=(0, 1))


def _cells(span: Span, arrived_s: float) -> tuple[str, ...]:
    begin = span.begin_s - arrived_s
    return (
        span.name,
        span.actor,
        seconds_text(begin) if begin >= 0 else f"-{seconds_text(-begin)}",
        seconds_text(span.duration_s),
        shortened(span.what, MAX_WHAT),
    )


def _bar(span: Span, arrived_s: float, total_s: float, room: int, bar: str) -> str:
    """As long as its part of the whole, at least one character, within the room."""
    begin = min(room - 1, max(0, int((span.begin_s - arrived_s) / total_s * room)))
    length = max(1, round(span.duration_s / total_s * room))
    return " " * begin + bar * min(length, room - begin)

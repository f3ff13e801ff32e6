"""Figures as people read them: short, with their unit, "-" for what is not known."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "-"


def seconds_text(seconds: float | None) -> str:
    """0.4 ms, 87 ms, 3.21 s, 14.2 s, 7 min 5 s, 3 h 12 min, 2 d 4 h."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.0095:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    return _long_text(round(seconds))


def _long_text(seconds: int) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s"


def bytes_text(num_bytes: float) -> str:
    """0, 812 B, 1.5 MiB, 120 MiB, 7.9 GiB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B" if num_bytes else "0"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit, num_bytes = next(units), num_bytes / 1024
    while num_bytes >= 1000 and (larger := next(units, "")):
        unit, num_bytes = larger, num_bytes / 1024
    return f"{num_bytes:.1f} {unit}" if num_bytes < 9.95 else f"{num_bytes:.0f} {unit}"


def count_text(count: float) -> str:
    """0, 0.4, 12, 9,999, 12.3k, 4.5M."""
    if count < 10 and count != int(count):
        return f"{count:.1f}"
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.1f}k" if count < 999_950 else f"{count / 1e6:.1f}M"


def share_text(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.0f} %"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def shortened(text: str, width: int) -> str:
    """At most so many characters; of what is longer, the end is left out."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), gap: int = 2) -> list[str]:
    """Lines of equal columns; those in `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(index: int, text: str) -> str:
        return text.ljust(widths[index]) if index in left else text.rjust(widths[index])

    return [(" " * gap).join(cell(index, text) for index, text in enumerate(row)).rstrip() for row in rows]

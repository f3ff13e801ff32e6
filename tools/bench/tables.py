"""A result as text: what a person reads on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Sequence

from vlmrt.tools.bench.summary import HEADINGS, Result

LABEL_WIDTH = 42
COLUMN_WIDTH = 10
USUAL_METRICS = ("ttft", "tpot", "itl", "e2el")

MORE = {  # names that begin so
    "stall_": "text streams, from the first picture's arrival to the last one's first token",
    "dialogue_": "first turns of dialogues, and the turns after them",
}

Row = tuple[str, str]  # (name, value)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def title(result: Result) -> str:
    rate = result["request_rate"]
    how = [] if rate == "inf" else [f"{rate:g} requests/s"]
    if result["max_concurrency"] is not None:
        how.append(f"{result['max_concurrency']} at once")
    return f"{result['dataset']}: {result['num_prompts']} requests, {' and '.join(how) or 'all at once'}"


def percents(result: Result) -> list[str]:
    """The names of its percentiles, such as p99."""
    return [name.removesuffix("_ttft_ms") for name in result if name.startswith("p") and name.endswith("_ttft_ms")]


def rate_rows(result: Result) -> list[Row]:
    rows = [
        ("answered", f"{result['completed']:,} in {result['duration']:.2f} s"),
        ("failed", f"{result['failed']:,}"),
        ("requests/s", number(result["request_throughput"])),
    ]
    if result["request_goodput"] is not None:
        rows.append((f"good requests/s ({objectives(result)})", number(result["request_goodput"])))
    rows.append(("output tokens/s", number(result["output_throughput"])))
    rows.append(("peak output tokens/s", number(result["max_output_tokens_per_s"])))
    rows.append(("input and output tokens/s", number(result["total_token_throughput"])))
    rows.append(("input tokens", f"{result['total_input_tokens']:,}"))
    rows.append(("output tokens", f"{result['total_output_tokens']:,}"))
    rows += [
        (f"{kind}s/s", number(result[f"{kind}_throughput"])) for kind in ("image", "video") if result[f"total_{kind}s"]
    ]
    rows.append(("most requests at once", f"{result['max_concurrent_requests']:,}"))
    rows.append(("busiest client process, of a core", f"{result['client_cpu']:.0%}"))
    return rows


def lines_of(rows: Sequence[Row]) -> list[str]:
    return [f"{name:{LABEL_WIDTH}} {value}" for name, value in rows]


def latency_lines(result: Result, metrics: Sequence[str]) -> list[str]:
    columns = ["mean", "median", "std", *percents(result)]
    lines = ["ms".ljust(LABEL_WIDTH + 1) + "".join(name.rjust(COLUMN_WIDTH) for name in columns)]
    for metric in metrics:
        values = (number(result[f"{column}_{metric}_ms"]) for column in columns)
        lines.append(HEADINGS[metric].ljust(LABEL_WIDTH + 1) + "".join(value.rjust(COLUMN_WIDTH) for value in values))
    return lines


def more_rows(result: Result) -> list[tuple[str, list[Row]]]:
    """(heading, rows) of what only some loads have."""
    found = []
    for prefix, heading in MORE.items():
        rows = [(name.removeprefix(prefix), number(result[name])) for name in result if name.startswith(prefix)]
        found += [(heading, rows)] if rows else []
    return found


def error_lines(result: Result) -> list[str]:
    """Every failure by its kind; none where nothing failed."""
    lines = []
    if result["errors_by_kind"]:
        count = sum(result["errors_by_kind"].values())
        lines.append(f"FAILED: {count} requests")
        for kind, times in result["errors_by_kind"].items():
            lines.append(f"  {times} x {kind}: {result['first_errors'][kind]}")
    if result["warm_up_errors"]:
        lines.append(f"FAILED in the warm-up: {result['warm_up_errors']} requests: {result['first_warm_up_error']}")
    return lines


def result_lines(result: Result, metrics: Sequence[str], notes: Sequence[str]) -> list[str]:
    """The whole of one run."""
    lines = [title(result), "", *lines_of(rate_rows(result)), "", *latency_lines(result, metrics)]
    for heading, rows in more_rows(result):
        lines += ["", heading, *lines_of(rows)]
    if trace := result.get("trace"):
        lines += ["", "what the server counted", *trace]
    lines += ["", f"ITL is of {result['itl_of']}."]
    lines += [f"note: {note}" for note in notes]
    if errors := error_lines(result):
        lines += ["", *errors]
    return lines


SWEEP_COLUMNS = (
    ("at once", "max_concurrency"),
    ("req/s sent", "request_rate"),
    ("req/s", "request_throughput"),
    ("good req/s", "request_goodput"),
    ("out tok/s", "output_throughput"),
    ("TTFT p50", "median_ttft_ms"),
    ("TTFT p99", "p99_ttft_ms"),
    ("ITL p50", "median_itl_ms"),
    ("ITL p99", "p99_itl_ms"),
    ("E2EL p50", "median_e2el_ms"),
    ("failed", "failed"),
)


def sweep_columns(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Those that say something of these."""
    return [(name, field) for name, field in SWEEP_COLUMNS if any(_says(result.get(field)) for result in results)]


def _says(value: object) -> bool:
    return value is not None and value != "inf"


def sweep_head(columns: Sequence[tuple[str, str]]) -> str:
    return " ".join(name.rjust(COLUMN_WIDTH) for name, _ in columns)


def sweep_line(result: Result, columns: Sequence[tuple[str, str]]) -> str:
    return " ".join(cell(result.get(field)).rjust(COLUMN_WIDTH) for _, field in columns)


def sweep_legend(result: Result) -> str:
    """What the columns are of."""
    good = f" Good: {objectives(result)}." if result["goodput_ms"] else ""
    return f"Latencies in ms.{good} ITL is of {result['itl_of']}."


def objectives(result: Result) -> str:
    return ", ".join(f"{name} {limit:g} ms" for name, limit in result["goodput_ms"].items())


def cell(value: object) -> str:
    match value:
        case None | "inf":
            return "-"
        case int():
            return f"{value:,}"
        case float():
            return number(value)
        case _:
            return str(value)

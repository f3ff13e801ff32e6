"""A result as one HTML page: tables and plots, no script, no request to anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from vlmrt.tools.bench.charts import Chart, Point, Series, legend, svg
from vlmrt.tools.bench.figures import token_gaps
from vlmrt.tools.bench.replies import Replies, Reply
from vlmrt.tools.bench.summary import (
    HEADINGS,
    Result,
    answered,
    e2el_s,
    open_requests,
    tokens_by_second,
    tpot_s,
    ttft_s,
)
from vlmrt.tools.bench.tables import (
    USUAL_METRICS,
    cell,
    error_lines,
    more_rows,
    number,
    percents,
    rate_rows,
    sweep_columns,
    sweep_legend,
    title,
)
from vlmrt.tools.displayed import displayed

MAX_DOTS = 2000
MAX_STEPS = 400

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --line: #d9dee3; --page: #fff; --card: #f6f8fa;
  --c0: #1f6fc4; --c1: #c4530a; --c2: #2e8540; --c3: #7b4fb5; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b43; --page: #14181c;
  --card: #1d2329; --c0: #6fb1f5; --c1: #f39a5b; --c2: #74c686; --c3: #b99af0; --bad: #ff8a80; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.about, .none, figcaption { color: var(--soft); } .bad { color: var(--bad); font-weight: 600; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem 1rem; background: var(--card); border-radius: 8px; }
figcaption { color: var(--ink); font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.legend { margin: 0; font-size: .85rem; color: var(--soft); } .key { margin-right: 1rem; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.k0::before { background: var(--c0); } .k1::before { background: var(--c1); } .k2::before { background: var(--c2); }
.k3::before { background: var(--c3); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; } .knot { fill: var(--c); }
.dots { fill: var(--c); fill-opacity: .6; } .grid { stroke: var(--line); } .notch { stroke: var(--soft); }
.tick { font-size: 11px; fill: var(--soft); } .label { font-size: 12px; fill: var(--soft); }
"""


def page(name: str, body: Iterable[str]) -> str:
    """Well-formed as XML too; its policy forbids whatever is not in it."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/>',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>",
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>",
        *body,
        "</body></html>\n",
    ]
    return displayed("\n".join(lines))  # XML has no control characters


def run_page(result: Result, replies: Replies, notes: Sequence[str]) -> str:
    body = [f"<h1>{escape(title(result))}</h1>", about(result), *failures([result])]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    body += ["<h2>Rates</h2>", table(["", ""], rate_rows(result)), "<h2>Latencies</h2>", latencies(result)]
    body.append(f"<p>ITL is of {escape(result['itl_of'])}.</p>")
    for heading, rows in more_rows(result):
        body += [f"<h2>{escape(heading.capitalize())}</h2>", table(["", ""], rows)]
    body += ["<h2>Plots</h2>", plots(run_charts(replies))]
    return page(title(result), body)


def sweep_page(results: Sequence[Result], notes: Sequence[str]) -> str:
    name = f"Sweep: {results[0]['dataset']}, {results[0]['model_id']}"
    columns = sweep_columns(results)
    rows = [[cell(result.get(field)) for _, field in columns] for result in results]
    body = [f"<h1>{escape(name)}</h1>", about(results[0]), *failures(results)]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    body += ["<h2>Points</h2>", table([heading for heading, _ in columns], rows)]
    body.append(f"<p>{escape(sweep_legend(results[0]))}</p>")
    body += ["<h2>Plots</h2>", plots(sweep_charts(results))]
    return page(name, body)


def about(result: Result) -> str:
    client = result["client"]
    said = f"{result['model_id']} at {result['server']}, {result['date']}; client: vlmrt {client['vlmrt']}, "
    said += f"Python {client['python']}, {client['processes']} processes, {client['cores']} cores, {client['machine']}"
    return f'<p class="about">{escape(said)}</p>'


def failures(results: Iterable[Result]) -> list[str]:
    lines = [line for result in results for line in error_lines(result)]
    return [f'<p class="bad">{escape(chr(10).join(lines))}</p>'] if lines else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(value)}</td>" for value in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def latencies(result: Result) -> str:
    columns = ["mean", "median", "std", *percents(result)]
    rows = [
        [HEADINGS[metric], *(number(result[f"{column}_{metric}_ms"]) for column in columns)]
        for metric in (*USUAL_METRICS, "silence")
    ]
    return table(["ms", *columns], rows)


def plots(charts: Iterable[Chart]) -> str:
    figures = ((f"<figcaption>{escape(chart.title)}</figcaption>", legend(chart), svg(chart)) for chart in charts)
    shown = "".join(f"<figure>{''.join(parts)}</figure>" for parts in figures)
    return f'<div class="plots">{shown}</div>'


def run_charts(replies: Replies) -> list[Chart]:
    good = answered(replies.clients)
    start_s = min((reply.sent_s for reply in replies.clients), default=0.0)
    seconds, share = "seconds since the start", "share of requests"
    firsts = [(reply.sent_s - start_s, 1e3 * ttft_s(reply)) for reply in good]
    lasts = [(reply.sent_s - start_s, 1e3 * e2el_s(reply)) for reply in good]
    both = [Series("to the first token", thinned(firsts)), Series("to the last token", thinned(lasts))]
    opened = Series("open", open_over_time(replies.clients, start_s))
    return [
        Chart("Latency over time", seconds, "ms", both, "dots"),
        Chart("Output tokens/s over time", seconds, "tokens/s", [Series("tokens/s", by_second(good))], "steps"),
        Chart("Open requests over time", seconds, "requests", [opened], "steps"),
        cdf("Time to the first token", share, map(ttft_s, good)),
        cdf("Inter-token latency", "share of gaps", token_gaps(good)),
        cdf("Time per output token", share, (tpot_s(reply) for reply in good if reply.output_tokens > 1)),
        cdf("Time to the last token", share, map(e2el_s, good)),
    ]


def cdf(name: str, share: str, samples_s: Iterable[float]) -> Chart:
    """How many of the samples are at most as long as x."""
    values = np.sort(np.fromiter(samples_s, float)) * 1e3
    parts = np.linspace(0, 1, min(len(values), MAX_STEPS)) if len(values) else np.zeros(0)
    points = [(float(np.quantile(values, part)), float(part)) for part in parts]
    return Chart(name, "ms", share, [Series(share, points)], "steps", may_be_log=True, y_max=1.0)


def by_second(good: Sequence[Reply]) -> list[Point]:
    """A step from the beginning of each second to its end."""
    counts = tokens_by_second(good)
    return [(float(second), tokens) for second, tokens in enumerate([*counts, *counts[-1:]])]


def open_over_time(replies: Sequence[Reply], start_s: float) -> list[Point]:
    return thinned([(time_s - start_s, float(count)) for time_s, count in open_requests(replies)])


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_DOTS of them, evenly chosen."""
    return list(itertools.islice(points, 0, None, -(-len(points) // MAX_DOTS) or 1))


def sweep_charts(results: Sequence[Result]) -> list[Chart]:
    """Over concurrency, or over the rate where that is what differs."""
    by_rate = len({result["max_concurrency"] for result in results}) == 1
    field, x_label = ("request_rate", "requests/s sent") if by_rate else ("max_concurrency", "requests at once")
    some = [result for result in results if isinstance(result[field], int | float)]

    def over(*names: tuple[str, str]) -> list[Series]:
        return [
            Series(name, [(result[field], result[key]) for result in some if result.get(key) is not None])
            for name, key in names
        ]

    def latency(metric: str) -> list[Series]:
        return over(("median", f"median_{metric}_ms"), ("p99", f"p99_{metric}_ms"))

    frontier = [(result["output_throughput"], result["median_itl_ms"]) for result in some if result["median_itl_ms"]]
    return [
        Chart("Output tokens/s", x_label, "tokens/s", over(("tokens/s", "output_throughput"))),
        Chart("Requests/s", x_label, "requests/s", over(("all", "request_throughput"), ("good", "request_goodput"))),
        Chart("Time to the first token", x_label, "ms", latency("ttft")),
        Chart("Inter-token latency", x_label, "ms", latency("itl")),
        Chart("Time to the last token", x_label, "ms", latency("e2el")),
        Chart("Latency over throughput", "output tokens/s", "median ITL, ms", [Series("median ITL", frontier)]),
    ]

"""Figures as a Markdown table: ours, the peer's, the floor, the aim."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.published import AIMS, PEER, PEER_FIGURES, floors
from vlmrt.tools.bench.figures import Figures


def higher_is_better(figure: str) -> bool:
    return figure.endswith("_per_s")


def gain(figure: str, ours: float, theirs: float) -> float:
    """How many times better ours is, whichever way better goes."""
    better, worse = (ours, theirs) if higher_is_better(figure) else (theirs, ours)
    return better / worse


def reached(figure: str, ours: float, aim: float) -> bool:
    return ours >= aim if higher_is_better(figure) else ours <= aim


def medians(runs: Sequence[Figures]) -> Figures:
    """Of repeated runs; a run without figures, where nothing was answered, does not count."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run[name] for run in runs if name in run) for name in names}


def short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(preset: str, results: Mapping[str, Figures], errors: Mapping[str, int]) -> str:
    """Rows of every workload; the peer's column stays empty where no figure of it is known."""
    peer, aims, floor = PEER_FIGURES.get(preset, {}), AIMS.get(preset, {}), floors(preset)
    lines = [
        f"| workload | figure | ours | {PEER} | times better | floor | times the floor | aim | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, figures in results.items():
        for figure, ours in figures.items():
            key = (workload, figure)
            theirs, least, aim = peer.get(key), floor.get(key), aims.get(key)
            cells = [
                workload,
                figure,
                short(ours),
                short(theirs),
                "" if theirs is None else f"{gain(figure, ours, theirs):.2f}",
                short(least),
                "" if least is None else f"{1 / gain(figure, ours, least):.2f}",
                short(aim),
                "" if aim is None else "yes" if reached(figure, ours, aim) else "no",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if errors.get(workload):
            lines.append(f"| {workload} | failed requests | {errors[workload]} | | | | | | |")
    return "\n".join(lines)

"""Two results side by side: ours or those of `vllm bench serve`, single runs or sweeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmrt.tools.bench.summary import Result
from vlmrt.tools.bench.tables import COLUMN_WIDTH, LABEL_WIDTH, cell

HIGHER_IS_BETTER = (
    "completed",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "image_throughput",
    "video_throughput",
)
STATISTICS = ("mean", "median", "p50", "p90", "p95", "p99")
METRICS = ("ttft", "tpot", "itl", "e2el", "silence")
LOWER_IS_BETTER = ("failed", *(f"{statistic}_{metric}_ms" for metric in METRICS for statistic in STATISTICS))
SAME = ("num_prompts", "max_concurrency", "request_rate", "dataset", "model_id", "total_output_tokens")


class Difference(NamedTuple):
    field: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Of 1; inf from nothing to something."""
        if self.before == self.after:
            return 0.0
        return self.after / self.before - 1 if self.before else float("inf")

    def is_worse(self, tolerance: float) -> bool:
        worse = -self.change if self.field in HIGHER_IS_BETTER else self.change
        return worse > tolerance


def load(path: Path) -> list[Result]:
    """The points of a sweep, or the one result of a run.

    Raises: ValueError naming the file, OSError.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as wrong:
        raise ValueError(f"{path}: not JSON: {wrong}") from None
    results = found.get("points", [found]) if isinstance(found, dict) else None
    if not results or not all(isinstance(result, dict) and "request_throughput" in result for result in results):
        raise ValueError(f"{path}: no result of vlmrt bench or of vllm bench serve")
    return list(results)


def differences(before: Result, after: Result) -> list[Difference]:
    """Of the figures that both have."""
    return [
        Difference(field, float(before[field]), float(after[field]))
        for field in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
        if _is_number(before.get(field)) and _is_number(after.get(field)) and (before[field] or after[field])
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def paired(before: Sequence[Result], after: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Results with the same concurrency and rate; two single runs are a pair whatever they are."""
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    known = {_point(result): result for result in after}
    return [(result, known[_point(result)]) for result in before if _point(result) in known]


def _point(result: Result) -> tuple[object, object]:
    return result.get("max_concurrency"), result.get("request_rate")


def unlike(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """What was not the same, so that figures may differ for that reason."""
    return [
        f"{field}: {before[field]} and {after[field]}"
        for field in SAME
        if field in before and field in after and before[field] != after[field]
    ]


def lines(before: Result, after: Result, tolerance: float) -> list[str]:
    found = [f"note: not the same {text}" for text in unlike(before, after)]
    found.append(" ".join(["".ljust(LABEL_WIDTH), *(name.rjust(COLUMN_WIDTH) for name in ("A", "B", "change"))]))
    for difference in differences(before, after):
        cells = (cell(difference.before), cell(difference.after), f"{difference.change:+.1%}")
        mark = "  worse" if difference.is_worse(tolerance) else ""
        row = " ".join([difference.field.ljust(LABEL_WIDTH), *(value.rjust(COLUMN_WIDTH) for value in cells)])
        found.append(row + mark)
    return found

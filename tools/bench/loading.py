"""`vlmrt bench serve` and `sweep`, from options to files."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from vlmrt.tools.bench import report, tables
from vlmrt.tools.bench.arrivals import Arrivals
from vlmrt.tools.bench.asks import Target, fields_of
from vlmrt.tools.bench.datasets import DATASETS, Wanted
from vlmrt.tools.bench.pool import ClientPool, Unplayable
from vlmrt.tools.bench.probe import Found, Unusable, first_model, probed, wait_until_up
from vlmrt.tools.bench.recounted import Tokenizer
from vlmrt.tools.bench.run import Run, detailed, measured, warnings_of
from vlmrt.tools.bench.settings import Settings
from vlmrt.tools.bench.summary import Result
from vlmrt.tools.bench.trace import Trace
from vlmrt.tools.displayed import displayed
from vlmrt.tools.terminal import console_for

SWEPT_PER_CLIENT = 8  # requests of a point, for each that runs at once
SWEPT_AT_LEAST = 32


def load(arguments: argparse.Namespace) -> int:
    """Returns the exit status.  Raises: ValueError, OSError."""
    console = console_for(sys.stderr)
    settings = settings_of(arguments)
    tokenizer = Tokenizer(arguments.tokenizer) if arguments.tokenizer is not None else None
    try:
        found = _found(settings.target, arguments)
        settings = msgspec.structs.replace(settings, target=found.target)
        if arguments.kind == "sweep":
            return sweep(settings, tokenizer, arguments, console, found.notes)
        return serve(settings, tokenizer, arguments, console, found.notes)
    except (Unusable, Unplayable) as wrong:
        raise ValueError(str(wrong)) from None
    except KeyboardInterrupt:
        print("vlmrt bench: interrupted; there is no result", file=sys.stderr)
        return 130


def _found(target: Target, arguments: argparse.Namespace) -> Found:
    wait_until_up(target, arguments.ready_check_timeout_sec)
    model = arguments.model or first_model(target)
    return probed(msgspec.structs.replace(target, model=model))


def serve(
    settings: Settings,
    tokenizer: Tokenizer | None,
    arguments: argparse.Namespace,
    console: Console,
    notes: Sequence[str],
) -> int:
    trace = Trace(settings.target.url, sampled=False) if arguments.trace else None
    with ClientPool(settings.target, settings.client_processes) as pool:
        run = measured(pool, settings, tokenizer, console, shown=not arguments.no_progress, trace=trace)
    notes = [*notes, *warnings_of(run.result)]
    print(displayed("\n".join(tables.result_lines(run.result, arguments.percentile_metrics, notes))))
    saved = {**(detailed(run) if arguments.save_detailed else run.result), "notes": notes}
    saved |= dict(arguments.metadata)
    for path in _result_files(arguments, run.result):
        _write(path, json.dumps(saved, indent=2) + "\n")
    if arguments.html:
        _write(Path(arguments.html), report.run_page(run.result, run.replies, notes))
    return 1 if run.failed else 0


def _result_files(arguments: argparse.Namespace, result: Result) -> list[Path]:
    files = [Path(arguments.output)] if arguments.output else []
    if arguments.save_result:
        rate, model = result["request_rate"], Path(result["model_id"]).name
        name = arguments.result_filename or f"{result['backend']}-{rate}qps-{model}-{result['date']}.json"
        files.append(Path(arguments.result_dir or ".") / name)
    return files


def sweep(
    settings: Settings,
    tokenizer: Tokenizer | None,
    arguments: argparse.Namespace,
    console: Console,
    notes: Sequence[str],
) -> int:
    """A run at each point, about other pictures and texts each time."""
    points = points_of(settings, arguments)
    runs: list[Run] = []
    with ClientPool(settings.target, settings.client_processes) as pool:
        for number, point in enumerate(points, start=1):
            label = f"point {number} of {len(points)}: "
            runs.append(measured(pool, point, tokenizer, console, shown=not arguments.no_progress, label=label))
            columns = tables.sweep_columns([runs[0].result])
            if number == 1:
                print(tables.sweep_head(columns))
            print(tables.sweep_line(runs[-1].result, columns), flush=True)
    results = [run.result for run in runs]
    all_notes = list(dict.fromkeys([*notes, *(note for result in results for note in warnings_of(result))]))
    print(f"\n{tables.sweep_legend(results[0])}")
    print("".join(f"note: {note}\n" for note in all_notes), end="")
    for result in results:
        for line in tables.error_lines(result):
            print(displayed(f"{tables.title(result)}: {line}"))
    if arguments.output:
        saved = {"points": results, "notes": all_notes, **dict(arguments.metadata)}
        _write(Path(arguments.output), json.dumps(saved, indent=2) + "\n")
    if arguments.html:
        _write(Path(arguments.html), report.sweep_page(results, all_notes))
    return 1 if any(run.failed for run in runs) else 0


def points_of(settings: Settings, arguments: argparse.Namespace) -> list[Settings]:
    """Raises: ValueError where a dataset says itself when its requests are sent."""
    if settings.dataset == "stall":
        raise ValueError("--dataset-name stall: its bursts come at their own times; there is nothing to sweep")

    def point(number: int, max_concurrency: int | None, rate: float) -> Settings:
        wanted = msgspec.structs.replace(settings.wanted, seed=settings.wanted.seed + number)
        if arguments.num_prompts is None and settings.dataset != "jsonl":
            count = max(SWEPT_AT_LEAST, SWEPT_PER_CLIENT * (max_concurrency or 0))
            wanted = msgspec.structs.replace(wanted, num_prompts=count)
        arrivals = msgspec.structs.replace(settings.arrivals, rate=rate)
        return msgspec.structs.replace(settings, wanted=wanted, max_concurrency=max_concurrency, arrivals=arrivals)

    if arguments.concurrencies:
        return [point(number, count, float("inf")) for number, count in enumerate(arguments.concurrencies)]
    return [point(number, None, rate) for number, rate in enumerate(arguments.request_rates)]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Raises: ValueError naming the option."""
    dataset = DATASETS[arguments.dataset_name]
    arrivals = arrivals_of(arguments)
    max_concurrency = getattr(arguments, "max_concurrency", None)
    if arguments.dataset_name == "stall" and (max_concurrency or arrivals != Arrivals()):
        raise ValueError("--dataset-name stall: its bursts come at their own times; leave concurrency and rate out")
    if max_concurrency is None and arrivals == Arrivals():  # a rate alone is an open loop
        max_concurrency = dataset.usual_concurrency
    return Settings(
        target=target_of(arguments),
        dataset=arguments.dataset_name,
        wanted=wanted_of(arguments, dataset.usual),
        max_concurrency=max_concurrency,
        arrivals=arrivals,
        num_warmups=arguments.num_warmups,
        limit_s=arguments.limit_s,
        objectives_ms=dict(arguments.goodput),
        percentiles=arguments.metric_percentiles,
        client_processes=arguments.client_processes,
    )


def target_of(arguments: argparse.Namespace) -> Target:
    headers = list(arguments.header)
    if (key := os.environ.get("OPENAI_API_KEY")) and not any(name.lower() == "authorization" for name, _ in headers):
        headers.append(("Authorization", f"Bearer {key}"))
    fields: dict[str, Any] = {"temperature": arguments.temperature}
    if arguments.top_p is not None:
        fields["top_p"] = arguments.top_p
    try:
        more = fields_of((arguments.extra_body or "{}").encode())
    except msgspec.DecodeError as wrong:
        raise ValueError(f"--extra-body {arguments.extra_body}: no JSON object: {wrong}") from None
    is_chat = arguments.endpoint.endswith("/chat/completions")
    if not is_chat and arguments.dataset_name != "random":
        raise ValueError(f"--dataset-name {arguments.dataset_name} needs an --endpoint of chat completions")
    if not is_chat and not arguments.endpoint.endswith("/completions"):
        raise ValueError(f"--endpoint {arguments.endpoint} ends neither with /chat/completions nor with /completions")
    return Target(
        url=url_of(arguments),
        endpoint=arguments.endpoint,
        headers=tuple(headers),
        ignore_eos=arguments.ignore_eos,
        fields=msgspec.json.encode(fields | more),
        verified=not arguments.insecure,
        tokenizer=arguments.tokenizer,
    )


def url_of(arguments: argparse.Namespace) -> str:
    """Without the /v1 that clients of OpenAI have at the end of theirs, since the endpoint has it."""
    url: str = (arguments.base_url or f"http://{arguments.host}:{arguments.port}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url {url} begins neither with http:// nor with https://")
    return url.removesuffix("/v1") if arguments.endpoint.startswith("/v1/") else url


def arrivals_of(arguments: argparse.Namespace) -> Arrivals:
    rate = getattr(arguments, "request_rate", float("inf"))
    ramp = getattr(arguments, "ramp_up_strategy", None)
    if ramp is None:
        return Arrivals(rate, arguments.burstiness if rate != float("inf") else 1.0)
    if arguments.ramp_up_start_rps is None or arguments.ramp_up_end_rps is None:
        raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    if rate != float("inf"):
        raise ValueError("--request-rate and --ramp-up-strategy: the ramp says the rate")
    start, end = arguments.ramp_up_start_rps, arguments.ramp_up_end_rps
    return Arrivals(rate, arguments.burstiness, ramp, start, end)


def wanted_of(arguments: argparse.Namespace, usual: Wanted) -> Wanted:
    """What the options say, and the dataset where they do not."""
    said = {
        "num_prompts": arguments.num_prompts,
        "input_tokens": arguments.input_len,
        "output_tokens": arguments.output_len,
        "range_ratio": arguments.range_ratio,
        "prefix_tokens": arguments.prefix_len,
        "image_sizes": tuple(arguments.image_size) if arguments.image_size else None,
        "num_images": arguments.images_per_request,
        "image_format": arguments.image_format,
        "same_images": arguments.same_images,
        "num_turns": arguments.turns,
        "window": arguments.window,
        "clip_s": arguments.clip_s,
        "clip_fps": arguments.clip_fps,
        "clip_size": arguments.clip_size,
        "num_streams": arguments.streams,
        "burst": arguments.burst,
        "path": arguments.dataset_path,
        "seed": secrets.randbelow(1 << 30) if arguments.seed is None else arguments.seed,
    }
    wanted = msgspec.structs.replace(usual, **{name: value for name, value in said.items() if value is not None})
    return msgspec.structs.replace(wanted, clip_fps=wanted.clip_fps or None)

"""The options of `vlmrt bench serve` and `sweep`: those of `vllm bench serve` where it has them, and what they mean."""

from __future__ import annotations

import argparse
import re
from argparse import ArgumentTypeError

from vlmrt.tools.argument_types import (
    fraction,
    non_negative_float,
    non_negative_int,
    number,
    port_number,
    positive_float,
    positive_int,
)

DATASET_NAMES = ("random", "images", "two-images", "dialogues", "sliding-window", "clips", "stall", "jsonl")
OTHER_NAMES = {"random-mm": "images", "custom": "jsonl", "custom_image": "jsonl"}  # as vLLM's benchmark calls them
OBJECTIVE_NAMES = ("ttft", "tpot", "e2el")
METRIC_NAMES = ("ttft", "tpot", "itl", "e2el", "silence", "client_queue_time")


def add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server", "any OpenAI-compatible one; a key is taken from OPENAI_API_KEY")
    group.add_argument("--base-url", metavar="URL", help="in place of --host and --port")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="of a server without TLS")
    group.add_argument("--port", type=port_number, default=8000, metavar="N", help="of that server")
    group.add_argument(
        "--endpoint", default="/v1/chat/completions", metavar="PATH", help="or /v1/completions, for text alone"
    )
    group.add_argument("--model", metavar="NAME", help="in requests; default: the first that the server lists")
    group.add_argument(
        "--header", nargs="+", action="extend", type=header, default=[], metavar="NAME=VALUE", help="of every request"
    )
    group.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=non_negative_float,
        default=0.0,
        metavar="S",
        help="to wait for a server that does not listen yet",
    )


def add_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests", "options that a dataset has no use for change nothing")
    group.add_argument("--dataset-name", type=dataset_name, default="random", metavar="NAME", help=_datasets())
    group.add_argument("--dataset-path", metavar="FILE", help="of jsonl; docs/bench.md shows its lines")
    group.add_argument("--num-prompts", type=positive_int, metavar="N", help="requests, dialogues or users")
    group.add_argument(
        "--input-len", "--random-input-len", type=positive_int, metavar="TOKENS", help="of random text; random: 128"
    )
    group.add_argument(
        "--output-len", "--random-output-len", type=positive_int, metavar="TOKENS", help="of each answer; random: 128"
    )
    group.add_argument(
        "--range-ratio",
        "--random-range-ratio",
        type=range_ratio,
        default=0.0,
        metavar="F",
        help="lengths are drawn from 1 - F to 1 + F times these",
    )
    group.add_argument(
        "--prefix-len", "--random-prefix-len", type=non_negative_int, default=0, metavar="TOKENS", help="all share"
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers of exactly the length asked for, from servers that can",
    )
    group.add_argument("--temperature", type=non_negative_float, default=0.0, metavar="F", help="of every request")
    group.add_argument("--top-p", type=fraction, metavar="F", help="of every request")
    group.add_argument("--extra-body", metavar="JSON", help="an object: more fields of every request")
    group.add_argument("--seed", type=non_negative_int, metavar="N", help="of all that is drawn; default: a new one")


def add_media(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures and clips", "generated ones; their number and size follow the dataset")
    group.add_argument(
        "--image-size", nargs="+", type=size, metavar="WxH", help="of generated pictures, in turn; mostly 640x480"
    )
    group.add_argument("--images-per-request", type=non_negative_int, metavar="N", help="mostly 1")
    group.add_argument("--image-format", choices=("jpeg", "png"), default="jpeg", help="they are sent in")
    group.add_argument(
        "--same-images", action=argparse.BooleanOptionalAction, help="the same in all requests, or fresh ones"
    )
    group.add_argument("--turns", type=positive_int, metavar="N", help="of a dialogue: 5; of a user of a window: 8")
    group.add_argument("--window", type=positive_int, default=5, metavar="N", help="pictures in a sliding window")
    group.add_argument("--clip-s", type=positive_float, default=10.0, metavar="S", help="length of a clip")
    group.add_argument("--clip-size", type=even_size, default="1280x720", metavar="WxH", help="of a clip")
    group.add_argument(
        "--clip-fps", type=non_negative_float, default=2.0, metavar="F", help="the server is to look at; 0: as it does"
    )
    group.add_argument("--streams", type=positive_int, default=8, metavar="N", help="of text, in the stall test")
    group.add_argument("--burst", type=positive_int, default=8, metavar="N", help="pictures at once, in the stall test")


def add_traffic(parser: argparse.ArgumentParser, *, swept: bool) -> None:
    group = parser.add_argument_group("traffic", "all at once, unless a bound or a rate says otherwise")
    if not swept:
        group.add_argument(
            "--max-concurrency", type=positive_int, metavar="N", help="requests at once: a closed loop of N clients"
        )
        group.add_argument(
            "--request-rate", type=rate, default=float("inf"), metavar="R", help="requests/s: an open loop; inf: none"
        )
        group.add_argument(
            "--ramp-up-strategy", choices=("linear", "exponential"), help="how the rate goes from start to end"
        )
        group.add_argument("--ramp-up-start-rps", type=positive_float, metavar="R", help="the rate at the start")
        group.add_argument("--ramp-up-end-rps", type=positive_float, metavar="R", help="the rate at the end")
    group.add_argument(
        "--burstiness",
        type=burstiness,
        default=1.0,
        metavar="F",
        help="of a rate: 1 is a Poisson process, less comes in bursts, more evenly, inf exactly so",
    )
    group.add_argument(
        "--num-warmups",
        type=non_negative_int,
        metavar="N",
        help="requests before the clock starts; default: as many as run at once, at most 16",
    )
    group.add_argument("--limit-s", type=positive_float, default=3600.0, metavar="S", help="a run's; later is failed")
    group.add_argument("--client-processes", type=positive_int, default=4, metavar="N", help="that send requests")


def add_judging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--goodput",
        nargs="+",
        action="extend",
        type=objective,
        default=[],
        metavar="NAME:MS",
        help=f"objectives of a good request, of {', '.join(OBJECTIVE_NAMES)}",
    )
    group.add_argument(
        "--percentile-metrics",
        type=metrics,
        default="ttft,tpot,itl,e2el",
        metavar="NAMES",
        help=f"that the table shows, of {','.join(METRIC_NAMES)}",
    )
    group.add_argument(
        "--metric-percentiles", type=percentiles, default="90,95,99", metavar="P,P", help="of each of them"
    )
    group.add_argument(
        "--tokenizer", metavar="DIR", help="of the model, for exact lengths and for servers that send no counts"
    )


def add_output(parser: argparse.ArgumentParser, *, single: bool) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="FILE", help="the result as JSON, named as vllm bench serve does")
    group.add_argument("--html", metavar="FILE", help="a page with tables and plots that needs nothing else")
    if single:
        group.add_argument(
            "--trace", action="store_true", help="what moved in /metrics meanwhile, of a server that is vlmrt's"
        )
        group.add_argument("--save-result", action="store_true", help="JSON under a name that says what it is of")
        group.add_argument("--save-detailed", action="store_true", help="with the times of every request")
        group.add_argument("--result-dir", metavar="DIR", help="of --save-result; default: here")
        group.add_argument("--result-filename", metavar="NAME", help="in place of that name")
    group.add_argument(
        "--metadata", nargs="+", action="extend", type=header, default=[], metavar="NAME=VALUE", help="for the JSON"
    )
    group.add_argument("--no-progress", "--disable-tqdm", action="store_true", help="no bar, and no lines in its place")


def _datasets() -> str:
    return f"one of {', '.join(DATASET_NAMES)}"


def dataset_name(text: str) -> str:
    name = OTHER_NAMES.get(text, text)
    if name not in DATASET_NAMES:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(DATASET_NAMES)}")
    return name


def header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value.strip()


def objective(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in OBJECTIVE_NAMES:
        raise ArgumentTypeError(f"{text!r} is not NAME:MS with a name of {', '.join(OBJECTIVE_NAMES)}")
    return name, positive_float(limit)


def metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in METRIC_NAMES:
            raise ArgumentTypeError(f"{name!r} is none of {', '.join(METRIC_NAMES)}")
    return names


def percentiles(text: str) -> tuple[float, ...]:
    values = tuple(number(part) for part in text.split(","))
    for value in values:
        if not 0 <= value <= 100:
            raise ArgumentTypeError(f"{value:g} is not within 0..100")
    return values


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(found[1]), int(found[2])


def even_size(text: str) -> tuple[int, int]:
    width, height = size(text)
    if width % 2 or height % 2:
        raise ArgumentTypeError(f"{text}: H.264 wants even sides")
    return width, height


def range_ratio(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{text} is not within [0, 1)")
    return value


def rate(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise ArgumentTypeError(f"{text} is not above 0")
    return value


burstiness = rate


def rates(text: str) -> tuple[float, ...]:
    return tuple(rate(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))

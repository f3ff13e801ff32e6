"""The options of whatever runs a model: `launch`, `generate`, `LLM(...)` and, of its files, `export`."""

from __future__ import annotations

import argparse

from vlmrt.tools.argument_types import (
    fraction,
    non_negative_float,
    non_negative_int,
    percent,
    positive_float,
    positive_int,
)


def add_engine_files(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--engine-cache", metavar="DIR", help="of exported vision towers; default: $XDG_CACHE_HOME/vlmrt/engines"
    )
    parser.add_argument(
        "--vit-engine-gib",
        type=positive_float,
        default=8.0,
        metavar="GIB",
        help="of a GPU: all that onnxruntime takes for a ViT, or tensorrt's workspace",
    )


def add_engine(parser: argparse.ArgumentParser, preset: str = "interactive") -> None:
    """The options of whatever runs a model: all of `launch` but those of its HTTP server."""
    _add_model(parser)
    _add_places(parser)
    _add_memory(parser)
    _add_limits(parser, preset)
    _add_media(parser)
    _add_running(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR|HUB_ID", help="a local directory or a hub id; default: the demo model")
    model.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of the hub id")
    model.add_argument(
        "--served-model-name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help='the first is the one that answers report; "model" always works too',
    )
    model.add_argument(
        "--max-model-len",
        type=positive_int,
        metavar="TOKENS",
        help="of prompt and answer together; default: the model's own, <= 32768",
    )
    model.add_argument("--chat-template", metavar="FILE", help="a Jinja template in place of the checkpoint's")
    model.add_argument(
        "--generation-config", choices=("auto", "none"), default="auto", help="where sampling defaults come from"
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    place = parser.add_argument_group("devices")
    place.add_argument("--tp", type=positive_int, default=1, metavar="N", help="tensor-parallel ranks of the LLM")
    place.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if the driver shows any"
    )
    place.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    place.add_argument(
        "--num-vits",
        type=positive_int,
        metavar="N",
        help="processes that encode images; default: one per GPU; on a CPU one",
    )
    place.add_argument(
        "--media-workers", type=positive_int, default=1, metavar="N", help="processes that decode images and videos"
    )
    place.add_argument(
        "--video-reader",
        choices=("auto", "decord", "av"),
        default="auto",
        help="what reads videos; auto: decord, and PyAV where it fails or is not installed",
    )
    place.add_argument(
        "--llm-threads", type=positive_int, metavar="N", help="CPU threads per rank; default: cores / tp"
    )
    place.add_argument("--vit-threads", type=positive_int, default=1, metavar="N", help="CPU threads of a ViT")

    place.add_argument(
        "--vit-quantum-ms",
        type=positive_float,
        default=8.0,
        metavar="MS",
        help="vision work that a GPU is given at once; less leaves more gaps for decoding",
    )
    place.add_argument(
        "--gpu-sharing",
        choices=("auto", "mps", "time-slice"),
        default="auto",
        help="where a ViT and a rank share a GPU; auto: MPS if it can be had",
    )
    place.add_argument(
        "--vit-sm-percent", type=percent, default=80, metavar="P", help="of a shared GPU, under MPS: the ViT's part"
    )

    place.add_argument(
        "--vit-engine",
        choices=("torch", "onnxruntime", "tensorrt"),
        default="torch",
        help="what runs the vision tower; another than torch has it exported once",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory")
    add_engine_files(memory)
    memory.add_argument(
        "--kv-cache-gib",
        type=positive_float,
        metavar="GIB",
        help="memory of the KV cache per rank; default: what is free",
    )
    memory.add_argument(
        "--num-kv-blocks", type=positive_int, metavar="N", help="blocks of 16 tokens, in place of --kv-cache-gib"
    )
    memory.add_argument(
        "--kv-host-cache-gib",
        type=non_negative_float,
        default=0.0,
        metavar="GIB",
        help="of host memory per rank, for prefixes that the KV cache has no more room for; 0: none",
    )
    memory.add_argument(
        "--embedding-cache-gib",
        type=positive_float,
        metavar="GIB",
        help="memory of encoded images per ViT; default: 2 on a GPU, else 0.25",
    )
    memory.add_argument(
        "--embedding-host-cache-gib",
        type=non_negative_float,
        metavar="GIB",
        help="of host memory per ViT, for images that --embedding-cache-gib has no more room for; 0: none; "
        "default: 2 on a GPU, else 0",
    )
    memory.add_argument(
        "--pixel-arena-mib", type=positive_int, default=256, metavar="MIB", help="decoded pixels per media worker"
    )
    memory.add_argument(
        "--media-worker-mib",
        type=non_negative_int,
        default=4096,
        metavar="MIB",
        help="that decoding may allocate in a media worker, beside its pixel arena; 0: no bound",
    )
    memory.add_argument(
        "--gpu-memory-fraction",
        type=fraction,
        default=0.92,
        metavar="F",
        help="of a GPU's memory: what all processes on it take together",
    )
    memory.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt from its first token")
    memory.add_argument("--no-embedding-caching", action="store_true", help="encode every image of every request")


def _add_limits(parser: argparse.ArgumentParser, preset: str) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-num-seqs",
        type=positive_int,
        metavar="N",
        help="requests that run at once; default: 256 on a GPU, else 64",
    )
    limits.add_argument(
        "--preset",
        choices=("interactive", "throughput"),
        default=preset,
        help="short steps for those who read along, or long ones for those who wait for the end",
    )
    limits.add_argument(
        "--itl-target-ms",
        type=non_negative_float,
        metavar="MS",
        help="prefill beside decoding streams is bounded so that a step takes no longer; 0: no bound; "
        "default: interactive 30 on a GPU, else none",
    )
    limits.add_argument(
        "--max-num-batched-tokens",
        type=positive_int,
        metavar="N",
        help="of one step; default: interactive 4096 on a GPU, else 1024; throughput 8192",
    )
    limits.add_argument("--limit-images", type=positive_int, default=64, metavar="N", help="images of one request")
    limits.add_argument("--max-pixels", type=positive_int, default=100_000_000, metavar="N", help="of one sent image")
    limits.add_argument("--limit-videos", type=positive_int, default=16, metavar="N", help="videos of one request")
    limits.add_argument("--max-video-mib", type=positive_int, default=256, metavar="MIB", help="of one sent video")
    limits.add_argument("--max-video-s", type=positive_float, default=3600.0, metavar="S", help="of one video")
    limits.add_argument(
        "--max-video-frames", type=positive_int, default=768, metavar="N", help="that are looked at, of one video"
    )


def _add_media(parser: argparse.ArgumentParser) -> None:
    media = parser.add_argument_group("media")
    media.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts, IPs, CIDRs or * that media may be fetched from, each with an optional :port; none: no fetching",
    )
    media.add_argument("--allowed-media-root", metavar="DIR", help="file:// media may lie below this directory")


def _add_running(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running")
    running.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="least level that is logged",
    )
    running.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: one object a line, from every process"
    )
    running.add_argument(
        "--shutdown-grace-s",
        type=positive_float,
        default=10.0,
        metavar="S",
        help="that open requests get to end when the server stops",
    )
    running.add_argument(
        "--start-timeout-s", type=positive_float, default=600.0, metavar="S", help="until every process must be up"
    )
    running.add_argument("--fault-hooks", action="store_true", help=argparse.SUPPRESS)  # for the test suite only

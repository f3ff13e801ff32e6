"""`vlmrt`: the command line.  Imports of a command happen when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlmrt import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit status: 0 clean, 1 a failure said in one line, 2 usage."""
    arguments = build_parser().parse_args(argv)
    match arguments.command:
        case "launch":
            from vlmrt.tools.launch import launch

            return launch(arguments)
        case "export":
            from vlmrt.tools.export import export

            return export(arguments)
    raise AssertionError(arguments.command)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmrt", description="An inference server for vision-language models (Qwen2-VL, Qwen2.5-VL)."
    )
    parser.add_argument("--version", action="version", version=f"vlmrt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_launch(
        commands.add_parser(
            "launch",
            help="serve a model behind an OpenAI-compatible HTTP API",
            description="Serve a model behind an OpenAI-compatible HTTP API; without --model, the demo model.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    add_export(
        commands.add_parser(
            "export",
            help="make the vision tower's files for another engine",
            description="Make the files of a vision tower for --vit-engine onnxruntime or tensorrt, as a launch does "
            "that does not find them.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="a local directory or a hub id; default: the demo model")
    parser.add_argument("--revision", default="main", help="of the hub id")
    parser.add_argument("--engine", choices=("onnx", "tensorrt"), default="onnx", help="onnx: for onnxruntime")
    parser.add_argument("--output", metavar="DIR", help="a new directory for the files; default: in the cache")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="that will run it")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add_engine_files(parser)


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


def add_launch(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR|HUB_ID", help="a local directory or a hub id; default: the demo model")
    model.add_argument("--revision", default="main", help="of the hub id")
    model.add_argument("--served-model-name", nargs="+", metavar="NAME", help='"model" always works too')
    model.add_argument(
        "--max-model-len", type=positive_int, metavar="TOKENS", help="default: the model's own, <= 32768"
    )
    model.add_argument("--chat-template", metavar="FILE", help="a Jinja template in place of the checkpoint's")
    model.add_argument(
        "--generation-config", choices=("auto", "none"), default="auto", help="where sampling defaults come from"
    )

    place = parser.add_argument_group("devices")
    place.add_argument("--tp", type=positive_int, default=1, metavar="N", help="tensor-parallel ranks of the LLM")
    place.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    place.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    place.add_argument("--num-vits", type=positive_int, metavar="N", help="default: one per GPU; on a CPU one")
    place.add_argument(
        "--media-workers", type=positive_int, default=1, metavar="N", help="processes that decode images"
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

    memory = parser.add_argument_group("memory")
    add_engine_files(memory)
    memory.add_argument("--kv-cache-gib", type=positive_float, metavar="GIB", help="per rank; default: what is free")
    memory.add_argument("--num-kv-blocks", type=positive_int, metavar="N", help="in place of --kv-cache-gib")
    memory.add_argument(
        "--kv-host-cache-gib",
        type=non_negative_float,
        default=0.0,
        metavar="GIB",
        help="of host memory per rank, for prefixes that the KV cache has no more room for; 0: none",
    )
    memory.add_argument("--embedding-cache-gib", type=positive_float, metavar="GIB", help="per ViT")
    memory.add_argument(
        "--embedding-host-cache-gib",
        type=non_negative_float,
        metavar="GIB",
        help="of host memory per ViT, for images that --embedding-cache-gib has no more room for; 0: none; "
        "default: 2 on a GPU, else 0",
    )
    memory.add_argument("--pixel-arena-mib", type=positive_int, default=256, metavar="MIB", help="per media worker")
    memory.add_argument("--gpu-memory-fraction", type=fraction, default=0.92, metavar="F")
    memory.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt from its first token")
    memory.add_argument("--no-embedding-caching", action="store_true", help="encode every image of every request")

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-num-seqs",
        type=positive_int,
        metavar="N",
        help="requests that run at once; default: 256 on a GPU, else 64",
    )
    limits.add_argument("--max-waiting", type=positive_int, default=256, metavar="N", help="more are refused with 429")
    limits.add_argument(
        "--preset",
        choices=("interactive", "throughput"),
        default="interactive",
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
    limits.add_argument("--request-timeout-s", type=positive_float, default=600.0, metavar="S")
    limits.add_argument("--max-body-mib", type=positive_int, default=64, metavar="MIB", help="more is refused with 413")
    limits.add_argument("--limit-images", type=positive_int, default=64, metavar="N", help="images of one request")
    limits.add_argument("--max-pixels", type=positive_int, default=100_000_000, metavar="N", help="of one sent image")

    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=port_number, default=8000, help="0: any free port")
    http.add_argument("--cors-origins", nargs="+", default=[], metavar="ORIGIN")
    http.add_argument("--admin-routes", action="store_true", help="POST /reset_prefix_cache and /reset_mm_cache")
    http.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts, IPs, CIDRs or * that images may be fetched from, each with an optional :port; none: no fetching",
    )
    http.add_argument("--allowed-media-root", metavar="DIR", help="file:// images may lie below this directory")

    running = parser.add_argument_group("running")
    running.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    running.add_argument("--shutdown-grace-s", type=positive_float, default=10.0, metavar="S", help="for open requests")
    running.add_argument("--start-timeout-s", type=positive_float, default=600.0, metavar="S")
    running.add_argument("--fault-hooks", action="store_true", help=argparse.SUPPRESS)  # for the test suite only


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or a positive number")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within (0, 1]")
    return value


def percent(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not within 1..100")
    return value


def port_number(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not within 0..65535")
    return value


if __name__ == "__main__":
    sys.exit(main())

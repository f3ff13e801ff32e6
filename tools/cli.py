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
        case "generate":
            from vlmrt.tools.offline.generate import generate

            return generate(arguments)
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
    add_generate(
        commands.add_parser(
            "generate",
            help="answer a file of requests, or one question, without a server",
            description="Answer a file of requests, or one question: starts the engine, answers, ends it. "
            "Without --model, the demo model.",
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


def add_engine(parser: argparse.ArgumentParser, preset: str = "interactive") -> None:
    """The options of whatever runs a model: all of `launch` but those of its HTTP server."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR|HUB_ID", help="a local directory or a hub id; default: the demo model")
    model.add_argument("--revision", default="main", help="of the hub id")
    model.add_argument(
        "--served-model-name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help='the first is the one that answers report; "model" always works too',
    )
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
    memory.add_argument(
        "--media-worker-mib",
        type=non_negative_int,
        default=4096,
        metavar="MIB",
        help="that decoding may allocate in a media worker, beside its pixel arena; 0: no bound",
    )
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

    media = parser.add_argument_group("media")
    media.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts, IPs, CIDRs or * that media may be fetched from, each with an optional :port; none: no fetching",
    )
    media.add_argument("--allowed-media-root", metavar="DIR", help="file:// media may lie below this directory")

    running = parser.add_argument_group("running")
    running.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    running.add_argument("--shutdown-grace-s", type=positive_float, default=10.0, metavar="S", help="for open requests")
    running.add_argument("--start-timeout-s", type=positive_float, default=600.0, metavar="S")
    running.add_argument("--fault-hooks", action="store_true", help=argparse.SUPPRESS)  # for the test suite only


def add_launch(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=port_number, default=8000, help="0: any free port")
    http.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="requests need one of these; who lists this machine's processes sees them: rather --api-key-file, or "
        "VLMRT_API_KEY (comma separated)",
    )
    http.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="lines of KEY or KEY TENANT, # comments; tenants never share cached work",
    )
    http.add_argument("--max-waiting", type=positive_int, default=256, metavar="N", help="more are refused with 429")
    http.add_argument("--request-timeout-s", type=positive_float, default=600.0, metavar="S")
    http.add_argument("--max-body-mib", type=positive_int, default=64, metavar="MIB", help="more is refused with 413")
    http.add_argument("--cors-origins", nargs="+", default=[], metavar="ORIGIN")
    http.add_argument("--no-page", action="store_true", help="no page to chat on at / for browsers")
    http.add_argument("--admin-routes", action="store_true", help="POST /reset_prefix_cache and /reset_mm_cache")


def add_generate(parser: argparse.ArgumentParser) -> None:
    requests = parser.add_argument_group("requests")
    source = requests.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        metavar="FILE",
        help='one request per line: {"messages": [...]}, {"prompt": "..."} or a line of an OpenAI batch; -: stdin',
    )
    source.add_argument("--prompt", metavar="TEXT", help="one question; its answer is printed as text")
    requests.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures that --prompt is about")
    requests.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="a line of JSON per answer; requests that an existing file answers are skipped; -: stdout",
    )
    requests.add_argument("--unordered", action="store_true", help="answers as they come, not in the input's order")
    requests.add_argument("--no-progress", action="store_true", help="no bars on the terminal")
    sampling = parser.add_argument_group("sampling", "for requests that do not say it themselves")
    sampling.add_argument("--n", type=int, metavar="N", help="answers for each request")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="default: as much as the context holds")
    sampling.add_argument("--min-tokens", type=int, metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="F", help="0: greedy")
    sampling.add_argument("--top-p", type=float, metavar="F")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--min-p", type=float, metavar="F")
    sampling.add_argument("--presence-penalty", type=float, metavar="F")
    sampling.add_argument("--frequency-penalty", type=float, metavar="F")
    sampling.add_argument("--repetition-penalty", type=float, metavar="F")
    sampling.add_argument("--seed", type=int, metavar="N")
    sampling.add_argument("--stop", nargs="+", metavar="TEXT")
    sampling.add_argument("--logprobs", type=int, metavar="N", help="alternatives told for each token")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    add_engine(parser, preset="throughput")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
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

"""`vlmrt bench`: loads for any OpenAI-compatible server, and what came of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmrt.tools.argument_types import non_negative_float
from vlmrt.tools.bench import options
from vlmrt.tools.displayed import displayed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Load any OpenAI-compatible server, and say how fast it answers. Options and the fields of the JSON are those "
        "of vllm bench serve where it has them."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND", title="commands")
    _add_serve(kinds.add_parser("serve", help="one load", description="Send one load and sum it up."))
    _add_sweep(
        kinds.add_parser(
            "sweep",
            help="the same load at several concurrencies or rates",
            description="Send the same load at several concurrencies or rates, one after the other, and plot them.",
        )
    )
    _add_compare(
        kinds.add_parser(
            "compare",
            help="two results side by side",
            description="Show two results side by side, of vlmrt bench or of vllm bench serve.",
        )
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    options.add_server(parser)
    options.add_requests(parser)
    options.add_media(parser)
    options.add_traffic(parser, swept=False)
    options.add_judging(parser)
    options.add_output(parser, single=True)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    points = parser.add_argument_group("points").add_mutually_exclusive_group(required=True)
    points.add_argument("--concurrencies", type=options.counts, metavar="N,N", help="requests at once, such as 1,2,4,8")
    points.add_argument("--request-rates", type=options.rates, metavar="R,R", help="requests/s, such as 0.5,1,2")
    options.add_server(parser)
    options.add_requests(parser)
    options.add_media(parser)
    options.add_traffic(parser, swept=True)
    options.add_judging(parser)
    options.add_output(parser, single=False)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json", help="a result, or those of a sweep")
    parser.add_argument("after", type=Path, metavar="B.json", help="another one")
    parser.add_argument(
        "--tolerance", type=non_negative_float, default=5.0, metavar="PERCENT", help="more is said to be worse"
    )
    parser.add_argument("--fail-if-worse", action="store_true", help="exit with 1 where a figure of B is worse")


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where a request failed, the server could not be loaded, or a comparison shows what was not wanted."""
    try:
        if arguments.kind == "compare":
            return compare(arguments)
        from vlmrt.tools.bench.loading import load

        return load(arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        raise
    except (OSError, ValueError) as wrong:
        print(f"vlmrt bench {arguments.kind}: error: {displayed(str(wrong))}", file=sys.stderr)
        return 1


def compare(arguments: argparse.Namespace) -> int:
    """Raises: ValueError, OSError of a file that is no result."""
    from vlmrt.tools.bench import compare as comparing

    pairs = comparing.paired(comparing.load(arguments.before), comparing.load(arguments.after))
    if not pairs:
        raise ValueError("the two sweeps have no point in common")
    tolerance = arguments.tolerance / 100
    for before, after in pairs:
        if len(pairs) > 1:
            print(f"\nat once: {before['max_concurrency']}, requests/s: {before['request_rate']}")
        print(displayed("\n".join(comparing.lines(before, after, tolerance))))
    is_worse = any(
        difference.is_worse(tolerance) for before, after in pairs for difference in comparing.differences(before, after)
    )
    return 1 if is_worse and arguments.fail_if_worse else 0

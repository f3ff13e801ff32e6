"""`vlmrt generate`: its options."""

from __future__ import annotations

import argparse

from vlmrt.tools.argument_types import number, whole_number
from vlmrt.tools.engine_options import add_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer a file of requests, or one question: starts the engine, answers, ends it. Without --model, the demo "
        "model."
    )
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
    sampling.add_argument("--n", type=whole_number, metavar="N", help="answers for each request")
    sampling.add_argument("--max-tokens", type=whole_number, metavar="N", help="default: as much as the context holds")
    sampling.add_argument("--min-tokens", type=whole_number, metavar="N", help="before an answer may end")
    sampling.add_argument("--temperature", type=number, metavar="F", help="0: greedy")
    sampling.add_argument("--top-p", type=number, metavar="F", help="only the likeliest tokens that make up this much")
    sampling.add_argument("--top-k", type=whole_number, metavar="N", help="only so many of the likeliest tokens")
    sampling.add_argument(
        "--min-p", type=number, metavar="F", help="only tokens with this share of the likeliest one's probability"
    )
    sampling.add_argument("--presence-penalty", type=number, metavar="F", help="on tokens that were generated")
    sampling.add_argument("--frequency-penalty", type=number, metavar="F", help="for each time a token was generated")
    sampling.add_argument(
        "--repetition-penalty", type=number, metavar="F", help="factor, also for tokens of the prompt"
    )
    sampling.add_argument("--seed", type=whole_number, metavar="N", help="the same draws again")
    sampling.add_argument("--stop", nargs="+", metavar="TEXT", help="an answer ends before any of these")
    sampling.add_argument("--logprobs", type=whole_number, metavar="N", help="alternatives told for each token")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    add_engine(parser, preset="throughput")


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.offline.generate import generate

    return generate(arguments)

"""`vlmrt launch`: its options."""

from __future__ import annotations

import argparse

from vlmrt.tools.argument_types import port_number, positive_float, positive_int
from vlmrt.tools.engine_options import add_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model behind an OpenAI-compatible HTTP API; without --model, the demo model."
    add_engine(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="address to listen on; 0.0.0.0: every one of this machine"
    )
    http.add_argument("--port", type=port_number, default=8000, metavar="N", help="0: any free port")
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
    http.add_argument(
        "--max-waiting",
        type=positive_int,
        default=256,
        metavar="N",
        help="requests that wait to run; more are refused with 429",
    )
    http.add_argument(
        "--request-timeout-s",
        type=positive_float,
        default=600.0,
        metavar="S",
        help="from arrival to last byte; later: 504",
    )
    http.add_argument(
        "--max-body-mib", type=positive_int, default=64, metavar="MIB", help="of one request; more is refused with 413"
    )
    http.add_argument(
        "--cors-origins", nargs="+", default=[], metavar="ORIGIN", help="pages of these may call from a browser; *: any"
    )
    http.add_argument("--admin-routes", action="store_true", help="POST /reset_prefix_cache and /reset_mm_cache")


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.launch import launch

    return launch(arguments)

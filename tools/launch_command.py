"""`vlmrt launch`: its options."""

from __future__ import annotations

import argparse
import os
import sys

from vlmrt.tools.argument_types import port_number, positive_float, positive_int
from vlmrt.tools.arguments import Parser
from vlmrt.tools.engine_options import add_engine
from vlmrt.tools.settings import add_opposites, read_settings
from vlmrt.tools.settings_file import SettingsError
from vlmrt.tools.show_settings import shown_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model behind an OpenAI-compatible HTTP API; without --model, the demo model."
    parser.epilog = (
        "Every option may also be set in the environment (--max-num-seqs as VLMRT_MAX_NUM_SEQS; lists with commas) and "
        "in a file, TOML or YAML (max-num-seqs = 64). Flags go before the environment, that before the file, that "
        "before defaults. --no-X or --X turns off what a file has turned on."
    )
    settings = parser.add_argument_group("configuration")
    settings.add_argument(
        "--config",
        metavar="FILE",
        help="options from this .toml, .yaml or .yml; none: from no file; default: $VLMRT_CONFIG, else config.toml or "
        "config.yaml in $XDG_CONFIG_HOME/vlmrt (~/.config/vlmrt), if it is there",
    )
    settings.add_argument("--show-config", action="store_true", help="print every option with its origin, and exit")
    add_engine(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="address to listen on; 0.0.0.0: every one of this machine"
    )
    http.add_argument("--port", type=port_number, default=8000, metavar="N", help="to listen on; 0: any free port")
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
    http.add_argument(
        "--log-requests",
        action="store_true",
        help="a log line for each request: status, tokens, times, and nothing of its text",
    )
    http.add_argument("--no-page", action="store_true", help="no page to chat on at / for browsers")
    http.add_argument(
        "--metrics-compat",
        choices=("none", "vllm"),
        default="none",
        help="vllm: /metrics has the figures under vLLM's names as well, for dashboards made for it",
    )
    http.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="of an OpenTelemetry collector that gets a span tree per request; needs the extra otel",
    )
    http.add_argument("--admin-routes", action="store_true", help="POST /reset_prefix_cache and /reset_mm_cache")
    add_admin(parser)
    add_opposites(parser)


def add_admin(parser: argparse.ArgumentParser) -> None:
    admin = parser.add_argument_group("administration", "of this user, on this machine, `vlmrt admin` needs none of it")
    admin.add_argument(
        "--admin-address",
        metavar="ADDRESS",
        help="tcp://HOST:PORT for `vlmrt admin` on other machines; port 0: any free one; needs one of the next two",
    )
    admin.add_argument("--admin-keys", metavar="DIR", help="CURVE keys, as `vlmrt admin keygen` makes them")
    admin.add_argument("--admin-token-file", metavar="FILE", help="a secret, 16 characters or more")
    admin.add_argument(
        "--profile-dir",
        default="vlmrt-profiles",
        metavar="DIR",
        help="where `vlmrt admin profile` has its files written",
    )


def run(arguments: argparse.Namespace) -> int:
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    try:
        settings = read_settings(parser, arguments.command_line, os.environ)
    except SettingsError as error:
        parser.error(str(error))
    if settings.arguments.show_config:
        print(shown_settings(parser, settings), end="")
    for warning in settings.warnings:
        print(f"vlmrt: warning: {warning}", file=sys.stderr)
    if settings.arguments.show_config:
        return 0
    from vlmrt.tools.launch import launch

    return launch(settings.arguments, settings.origins)

"""`vlmrt admin`: its sub-commands and their options."""

from __future__ import annotations

import argparse

from vlmrt.tools.argument_types import positive_float, positive_int

DESCRIPTION = (
    "See and steer a running service. Without --address or --pid it is the one service of yours on this machine. "
    "Every question has a deadline; a service is not slowed down by being asked."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    where = argparse.ArgumentParser(add_help=False)
    add_where(where)
    commands = parser.add_subparsers(
        dest="admin_command", required=True, metavar="WHAT", title="what", prog="vlmrt admin"
    )

    def command(name: str, help: str) -> argparse.ArgumentParser:
        description = help[0].upper() + help[1:] + "."
        return commands.add_parser(name, help=help, description=description, parents=[where])

    stats = command("stats", "what the service does: requests, rates, latencies, caches, actors")
    stats.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    stats.add_argument("--interval", type=positive_float, default=2.0, metavar="S", help="between two looks of --watch")
    stats.add_argument("--json", action="store_true", help="one line of JSON for each look")
    command("top", "a live view of all that, with keys to cancel a request and to drain")
    requests = command("requests", "the open requests and how far each is")
    requests.add_argument("--json", action="store_true", help="one line of JSON for each request")
    cancel = command("cancel", "end an open request: its client gets the error code cancelled")
    cancel.add_argument("id", metavar="ID", help="its x-request-id, or the id of its answer")
    trace = command("trace", "where the time of a request went, actor by actor; it may have ended")
    trace.add_argument("id", metavar="ID", help="its x-request-id, or the id of its answer")
    trace.add_argument("--json", action="store_true", help="the timeline as JSON")
    cache = command("cache", "look at the caches, or empty them of what no request uses")
    cache.add_argument("action", choices=("show", "reset"), help="look, or empty")
    cache.add_argument("kind", nargs="?", choices=("prefix", "embedding", "all"), default="all", help="which to empty")
    drain = command("drain", "refuse new requests (503, Retry-After) and let the open ones end")
    drain.add_argument("--stop", action="store_true", help="end the service when none is open")
    drain.add_argument("--wait", action="store_true", help="return only when none is open")
    command("undrain", "take new requests again")
    config = command("config", "the configuration in use, and where each value comes from")
    config.add_argument("action", choices=("show",), help="print it")
    config.add_argument("--json", action="store_true", help="as one JSON object")
    level = command("log-level", "log from this level on, until the service ends")
    level.add_argument("level", choices=("debug", "info", "warning", "error"), help="the least that is logged")
    level.add_argument("--actor", default="", metavar="NAME", help="such as vit:0; default: all")
    profile = command("profile", "record what an actor does into a file of the server")
    profile.add_argument("action", choices=("start", "stop"), help="begin, or end and write")
    profile.add_argument("actor", metavar="ACTOR", help="such as vit:0 or llm:0 (torch's profiler), or edge:0 (stacks)")
    profile.add_argument(
        "--seconds", type=positive_float, default=30.0, metavar="S", help="after which the recording ends by itself"
    )
    keygen = commands.add_parser(
        "keygen", help="make CURVE keys for --admin-keys", description="Make CURVE keys, for a service reached by TCP."
    )
    keygen.add_argument("directory", metavar="DIR", help="DIR/server is for the service, DIR/client for its operators")


def add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("which service")
    place = where.add_mutually_exclusive_group()
    place.add_argument("--address", metavar="ADDRESS", help="as the service's --admin-address, or ipc://PATH")
    place.add_argument("--pid", type=positive_int, metavar="PID", help="of the service, where several run")
    key = where.add_mutually_exclusive_group()
    key.add_argument("--keys", metavar="DIR", help="CURVE keys of an operator: the client folder of `keygen`")
    key.add_argument("--token-file", metavar="FILE", help="the secret of the service's --admin-token-file")
    where.add_argument("--timeout", type=positive_float, default=10.0, metavar="S", help="for each answer")


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.admin.commands import run_command

    return run_command(arguments)

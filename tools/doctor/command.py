"""`vlmrt doctor`: what of this machine is well, and what to do about the rest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vlmrt.tools.argument_types import port_number, positive_int

if TYPE_CHECKING:
    from vlmrt.tools.doctor.findings import Finding

PASSED_ON = ("config", "model", "revision", "tp", "host", "port")  # to the options of a launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at everything that a launch would need: a line each, ok, warning or problem, with what to do. Exits with "
        "1 if there is a problem. Options that are not given here are those of the configuration file and the "
        "environment."
    )
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="look at its files too; nothing is downloaded")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub id; default: main")
    parser.add_argument("--tp", type=positive_int, metavar="N", help="ranks that the model is to run on; default: 1")
    parser.add_argument("--host", metavar="NAME", help="address that a launch will listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=port_number, metavar="N", help="and its port; default: 8000")
    parser.add_argument("--config", metavar="FILE", help="the configuration file of the launch; none: of none")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of lines")


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.doctor.show import show_findings, show_json

    findings = examine(arguments)
    num_problems = show_json(findings, sys.stdout) if arguments.json else show_findings(findings, sys.stdout)
    return 1 if num_problems else 0


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in a fixed order; the slow ones are looked for meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    from vlmrt.tools.doctor import host
    from vlmrt.tools.doctor.child import run_probe

    options, of_settings = _options(arguments)
    probes: dict[str, tuple[str, tuple[str, ...]]] = {
        "CUDA driver": ("driver", ()),
        "PyTorch": ("torch", ()),
        "MPS": ("sharing", ()),
        "video": ("video", ()),
        "engines": ("engines", ()),
    }
    if options.model is not None:
        probes["model"] = ("model", (options.model, options.revision, str(options.tp)))
    checks: list[Callable[[], Iterator[Finding]]] = [
        host.processor,
        host.memory,
        host.shared_memory,
        host.open_files,
        host.loopback,
        host.run_directory,
        lambda: host.port(options.host, options.port),
        lambda: host.disks(os.environ),
    ]
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as executor:
        running = [
            executor.submit(run_probe, subject, f"vlmrt.tools.doctor.probes:{name}", words)
            for subject, (name, words) in probes.items()
        ]
        yield from host.python()
        yield from host.packages()
        yield from of_settings
        for check in checks:
            yield from check()
        for probe in running:
            yield from probe.result()


def _options(arguments: argparse.Namespace) -> tuple[argparse.Namespace, list[Finding]]:
    """What a launch would run with, as far as it is looked at here; and what of its settings is wrong."""
    from vlmrt.tools.arguments import Parser
    from vlmrt.tools.doctor.findings import ok, problem, warning
    from vlmrt.tools.launch_command import add_arguments as add_launch
    from vlmrt.tools.settings import read_settings
    from vlmrt.tools.settings_file import SettingsError

    parser = Parser(prog="vlmrt launch")
    add_launch(parser)
    words = [f"--{name}={getattr(arguments, name)}" for name in PASSED_ON if getattr(arguments, name) is not None]
    try:
        settings = read_settings(parser, words, os.environ)
    except SettingsError as error:
        remedy = "put it right, or name another file with --config"
        without = [word for word in words if not word.startswith("--config=")]
        return read_settings(parser, [*without, "--config=none"], {}).arguments, [
            problem("settings", str(error), remedy)
        ]
    places = [origin for origin in settings.origins.values() if origin.startswith(("file", "environment"))]
    found = [ok("settings", ", ".join(dict.fromkeys(places)) or "no configuration file, no VLMRT_ variables")]
    found += [warning("settings", text, "rename it or unset it") for text in settings.warnings]
    return settings.arguments, found

"""Findings as lines for a person, or as one JSON object."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterable
from typing import TextIO

from msgspec import structs

from vlmrt import __version__
from vlmrt.runtime.logs import wants_colour
from vlmrt.tools.doctor.findings import Finding, Status

MAX_WIDTH = 100
COLOURS: dict[Status, str] = {"ok": "32", "warning": "33", "problem": "31"}
INDENT = 23


def show_findings(findings: Iterable[Finding], stream: TextIO) -> int:
    """A line each as they come, remedies below, and a sum.  Returns the number of problems."""
    in_colour = wants_colour(stream, os.environ)
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns - 1) if stream.isatty() else None
    counts: dict[Status, int] = dict.fromkeys(COLOURS, 0)
    for finding in findings:
        counts[finding.status] += 1
        status = f"{finding.status:<8}"
        if in_colour:
            status = f"\x1b[{COLOURS[finding.status]}m{status}\x1b[0m"
        print(f"{status} {finding.subject:<13} {_wrapped(finding.text, width)}", file=stream)
        if finding.remedy:
            print(f"{'':{INDENT}}-> {_wrapped(finding.remedy, width)}", file=stream, flush=True)
    warnings = f"{counts['warning']} warning" + ("s" if counts["warning"] != 1 else "")
    problems = f"{counts['problem']} problem" + ("s" if counts["problem"] != 1 else "")
    print(f"\n{problems}, {warnings}, {counts['ok']} ok", file=stream, flush=True)
    return counts["problem"]


def _wrapped(text: str, width: int | None) -> str:
    """On a terminal below its beginning; in a pipe a finding is a line."""
    if width is None:
        return text
    lines = textwrap.wrap(text, max(20, width - INDENT - 3), break_on_hyphens=False, break_long_words=False)
    return f"\n{'':{INDENT}}".join(lines)


def show_json(findings: Iterable[Finding], stream: TextIO) -> int:
    """Returns the number of problems."""
    found = list(findings)
    num_problems = sum(finding.status == "problem" for finding in found)
    shown = {
        "vlmrt": __version__,
        "problems": num_problems,
        "warnings": sum(finding.status == "warning" for finding in found),
        "findings": [structs.asdict(finding) for finding in found],
    }
    print(json.dumps(shown, indent=2, ensure_ascii=False), file=stream)
    return num_problems

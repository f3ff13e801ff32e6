"""What the last `make test-clients` found, as a table.

python -m tests.clients.table docs/clients.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from tests.clients import environments

HEAD = """# Clients

What `make test-clients` found on {date} with Python {python}: each client in an environment of its own
([tests/clients/environments](../tests/clients/environments)), all against one server with the demo model behind a key.
Written by `python -m tests.clients.table docs/clients.md`.

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    found = {name: _outcomes(name) for name in environments.names()}
    head = HEAD.format(date=datetime.date.today().isoformat(), python=platform.python_version())
    parser.parse_args().file.write_text(head + _counts(found) + _by_topic(found) + _not_passed(found))


def _outcomes(name: str) -> dict[str, Any] | None:
    file = environments.outcomes_of(name)
    return json.loads(file.read_text())["cases"] if file.exists() else None


def _counts(found: dict[str, dict[str, Any] | None]) -> str:
    lines = ["| environment | cases | passed | skipped | failed |", "|---|---|---|---|---|"]
    for name, cases in found.items():
        if cases is None:
            lines.append(f"| {name} | | could not be built, or was not run | | |")
            continue
        count = Counter(case["outcome"] for case in cases.values())
        lines.append(f"| {name} | {len(cases)} | {count['passed']} | {count['skipped']} | {count['failed']} |")
    return "\n".join(lines) + "\n\n"


def _by_topic(found: dict[str, dict[str, Any] | None]) -> str:
    """Passed of all, for each topic of the openai suite."""
    columns = {name: cases for name, cases in found.items() if cases and environments.suite_of(name) == "openai"}
    topics = dict.fromkeys(key.partition(":")[0] for cases in columns.values() for key in cases)
    lines = ["| topic | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for topic in topics:
        cells = []
        for cases in columns.values():
            of_topic = [case["outcome"] for key, case in cases.items() if key.partition(":")[0] == topic]
            cells.append(f"{of_topic.count('passed')} of {len(of_topic)}")
        lines.append(f"| {topic} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n"


def _not_passed(found: dict[str, dict[str, Any] | None]) -> str:
    lines = [
        f"| {name} | {key} | {case['outcome']} | {case['reason'].replace('|', '/')} |"
        for name, cases in found.items()
        for key, case in (cases or {}).items()
        if case["outcome"] != "passed"
    ]
    if not lines:
        return ""
    return "\n".join(["| environment | case | outcome | reason |", "|---|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    main()

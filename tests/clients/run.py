"""The client suites, outside of pytest: they run where nothing but the client is installed.

    python -m tests.clients.run --url http://127.0.0.1:8000 [--suite langchain] [--json FILE] [PART OF A NAME]

The server's key, if it has one, is in VLMRT_API_KEY.
Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from tests.clients.api import Api, Skip
from tests.clients.cases import SUITES, Case, cases_of

SHOWN_CHARS = 400


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--suite", choices=tuple(SUITES), default="openai")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    parser.add_argument("part", nargs="?", default="", help="run only the cases whose names hold this")
    options = parser.parse_args(arguments)
    api = Api(options.url, os.environ.get("VLMRT_API_KEY"))
    began_s = time.monotonic()
    outcomes = {case.name: outcome(case, api) for case in cases_of(options.suite) if options.part in case.name}
    took_s = time.monotonic() - began_s
    counts = Counter(found["outcome"] for found in outcomes.values())
    for name, found in outcomes.items():
        if found["outcome"] != "passed":
            print(f"{found['outcome']}  {name}: {found['reason']}")
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"openai {openai.__version__}: {told}, {took_s:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"client": f"openai {openai.__version__}", "cases": outcomes}))
    return 1 if counts["failed"] or not counts["passed"] else 0


def outcome(case: Case, api: Api) -> dict[str, Any]:
    try:
        case.run(api)
    except Skip as reason:
        return {"outcome": "skipped", "reason": str(reason)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN_CHARS]
        return {"outcome": "failed", "reason": f"{told} ({Path(last.filename).name}:{last.lineno}: {last.line})"}
    return {"outcome": "passed", "reason": ""}


if __name__ == "__main__":
    sys.exit(main())

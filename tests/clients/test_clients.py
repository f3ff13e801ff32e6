"""The client suites against a real server: one version of openai in `make test`, all by `make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clients import environments
from tests.clients.api import Api, Skip
from tests.clients.cases import SUITES, Case, cases_of
from tests.system.server import Server, launch

KEY = "a-key-of-the-client-suite"
CASES = cases_of("openai")


class Keyed(NamedTuple):
    server: Server
    key: str


@pytest.fixture(scope="session")
def keyed_server() -> Iterator[Keyed]:
    """The demo model behind a key."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        key_file = Path(name) / "keys"
        key_file.write_text(KEY + "\n")
        root = Path(name) / "run"
        root.mkdir()
        with launch("--api-key-file", str(key_file), run_root=root) as server:
            yield Keyed(server, KEY)


@pytest.fixture(scope="session")
def api(demo_server: Server) -> Api:
    return Api(demo_server.url)


def test_the_suite_is_long_enough() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)
    assert {environments.suite_of(name) for name in environments.names()} == set(SUITES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_openai_client_works(case: Case, api: Api) -> None:
    try:
        case.run(api)
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.clients
@pytest.mark.timeout(environments.BUILD_TIMEOUT_S + 600)
@pytest.mark.parametrize("name", environments.names())
def test_every_case_passes_with(name: str, keyed_server: Keyed) -> None:
    """An environment that pip cannot build fails, with pip's words."""
    outcomes = environments.outcomes_of(name)
    outcomes.unlink(missing_ok=True)
    python = environments.python_of(environments.LISTS / f"{name}.txt")
    command = [
        *(str(python), "-m", "tests.clients.run", "--url", keyed_server.server.url),
        *("--suite", environments.suite_of(name), "--json", str(outcomes)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(environments.ROOT), "VLMRT_API_KEY": keyed_server.key}
    done = subprocess.run(
        command, cwd=environments.ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(found["outcome"] == "passed" for found in json.loads(outcomes.read_text())["cases"].values())

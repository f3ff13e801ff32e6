"""Finding the services of this user, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlmrt.runtime.run_dir import RunDir
from vlmrt.runtime.service_file import ServiceFile, read_service_file, write_service_file
from vlmrt.tools.admin import discovery
from vlmrt.tools.admin.client import AdminError
from vlmrt.tools.admin.discovery import find_address, running_services


@contextmanager
def run_dir(base: Path, pid: int, started_at: float = 1.0) -> Iterator[Path]:
    """That of a service which runs for as long as the block."""
    directory = RunDir(base)
    try:
        address = f"ipc://{directory.path}/admin.sock"
        write_service_file(directory.path, ServiceFile(pid, f"http://h:{pid}", "m", started_at, (address,)))
        yield directory.path
    finally:
        directory.remove()


@pytest.fixture(autouse=True)
def bases(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "candidate_bases", lambda: [short_dir, short_dir])  # named twice, found once


def test_the_only_service_is_found_without_arguments(short_dir: Path) -> None:
    with run_dir(short_dir, 11) as path:
        assert find_address(None, None) == f"ipc://{path}/admin.sock"
    with pytest.raises(AdminError, match="no service of yours runs here"):
        find_address(None, None)


def test_of_several_one_has_to_be_chosen_and_the_newest_is_listed_first(short_dir: Path) -> None:
    with run_dir(short_dir, 11, 1.0), run_dir(short_dir, 12, 2.0) as second:
        with pytest.raises(AdminError, match="2 services run; say which") as raised:
            find_address(None, None)
        assert str(raised.value).splitlines()[1:] == ["  --pid 12  m at http://h:12", "  --pid 11  m at http://h:11"]
        assert find_address(None, 12) == f"ipc://{second}/admin.sock"


def test_an_address_is_taken_as_it_is() -> None:
    assert find_address("tcp://elsewhere:1", None) == "tcp://elsewhere:1"


def test_what_an_ended_service_left_is_none(short_dir: Path) -> None:
    with run_dir(short_dir, 11) as path:
        left = short_dir / "vlmrt-left"
        left.mkdir(mode=0o700)
        (left / "lock").touch()
        (left / "service.json").write_bytes((path / "service.json").read_bytes())
        assert [service.run_dir for service in running_services()] == [path]


def test_a_directory_that_others_can_enter_is_not_trusted(short_dir: Path) -> None:
    with run_dir(short_dir, 11) as path:
        path.chmod(0o750)
        assert running_services() == []
        path.chmod(0o700)
        assert len(running_services()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_broken_file_is_no_service(text: str, short_dir: Path) -> None:
    with run_dir(short_dir, 11) as path:
        (path / "service.json").write_text(text)
        assert read_service_file(path) is None
        assert running_services() == []


def test_a_service_with_another_tmpdir_is_found_by_its_process(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short_dir / "far").mkdir()
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.tools.admin.test_discovery import run_dir\n"
        "with run_dir(Path(sys.argv[1]), os.getpid()) as path:\n"
        "    print(path, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(short_dir / "far")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert running_services() == []
        assert find_address(None, process.pid) == f"ipc://{path}/admin.sock"
        with pytest.raises(AdminError, match=rf"--pid {os.getpid()}: no service of yours"):
            find_address(None, os.getpid())
        process.stdin.close()

"""The run directory: private, short, removed, and cleared of what dead services left."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.services import ROOT
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.listener import bind_http, bind_private
from vlmrt.runtime.run_dir import RunDir


def test_it_is_private_and_goes_away(run_root: Path) -> None:
    run_dir = RunDir()
    assert run_dir.path.parent == run_root
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    (run_dir.path / "some.sock").touch()
    run_dir.remove()
    run_dir.remove()
    assert not run_dir.path.exists()


def test_a_directory_of_a_dead_service_is_removed_and_that_of_a_living_one_is_not(
    run_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    living = RunDir()
    code = "from vlmrt.runtime.run_dir import RunDir; RunDir()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    (dead,) = set(run_root.iterdir()) - {living.path}
    young = run_root / "vlmrt-young"  # made, but not locked yet
    young.mkdir()
    newcomer = RunDir()
    assert not dead.exists()
    assert living.path.exists()
    assert young.exists()
    assert caplog.messages == [f"removing {dead}, which an earlier service left"]
    young.rmdir()
    living.remove()
    newcomer.remove()


def test_a_base_that_is_too_long_or_missing_is_refused(tmp_path: Path) -> None:
    for base in (tmp_path / ("d" * 60), Path("/nowhere")):
        with pytest.raises(StartupError, match="set TMPDIR"):
            RunDir(base)


def test_a_too_long_runtime_dir_gives_way_to_a_shorter_one(
    run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_base = tmp_path / ("d" * 60)
    long_base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long_base))
    run_dir = RunDir()
    assert run_dir.path.parent == run_root
    run_dir.remove()


@pytest.mark.parametrize(("host", "port", "flag"), [("no-such-host.invalid", 0, "--host"), ("192.0.2.1", 0, "--port")])
def test_an_address_that_cannot_be_bound_names_the_flag(host: str, port: int, flag: str) -> None:
    with pytest.raises(StartupError, match=flag):
        bind_http(ServerOptions(host=host, port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_listener_listens_without_reuseport(host: str) -> None:
    listener = bind_http(ServerOptions(host=host, port=0))
    try:
        with pytest.raises(StartupError, match="--port"):
            bind_http(ServerOptions(host=host, port=listener.getsockname()[1]))
    finally:
        listener.close()


def test_a_private_socket_is_reached_by_its_path_alone_and_goes_with_the_run_directory(run_root: Path) -> None:
    run_dir = RunDir()
    with bind_private(run_dir.path) as listener, socket.socket(socket.AF_UNIX) as client:
        assert Path(listener.getsockname()).parent == run_dir.path
        client.connect(listener.getsockname())
    run_dir.remove()
    assert list(run_root.iterdir()) == []

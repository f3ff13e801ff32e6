"""The MPS daemon's life with a fake control program on the PATH and fake actors: no GPU."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.runtime.services import (
    DEADLINE_S,
    FAKE_CLIENT,
    SHARED_MEMORY,
    LeftBehind,
    Service,
    children_of,
    daemons,
    fake_config,
    fake_specs,
    read_until,
    service,
    start_service_process,
)
from vlmrt.runtime import gpu_sharing, sweeper
from vlmrt.runtime.config import GpuSharingChoice, ParallelOptions
from vlmrt.runtime.errors import is_device_fault
from vlmrt.runtime.topology import ActorKind
from vlmrt.tools.cli import build_parser

# a daemon is a `sleep` with the control program's environment
CONTROL = """#!/bin/sh
pipes="$CUDA_MPS_PIPE_DIRECTORY"
if [ "$1" = -d ]; then
  case "$FAKE_MPS" in
    fails) echo "no such device" > "$CUDA_MPS_LOG_DIRECTORY/control.log"; exit 3;;
    hangs) exec sleep 300;;
  esac
  setsid sleep 301 < /dev/null > /dev/null 2>&1 &
  echo $! > "$pipes/pid"
else
  read command
  case "$command $FAKE_MPS" in
    "get_server_list no-server") ;;
    "get_server_list"*) echo 4711;;
    "quit deaf") exec sleep 300;;
    "quit"*) kill "$(cat "$pipes/pid")"; echo quit >> "$FAKE_QUITS";;
  esac
fi
"""
ON_GPU = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=2, vit_sm_percent=70)  # vit:0 on a GPU of its own
NOTERS: dict[ActorKind, str] = {
    "scheduler": "EnvironmentNoter",
    "vit": "EnvironmentNoter",
    "llm": "EnvironmentNoter",
}


@pytest.fixture(autouse=True)
def control(tmp_path: Path, run_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A control program that works; call it with "fails", "hangs", "no-server", "deaf" or "missing"."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / sweeper.MPS_CONTROL
    program.write_text(CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_QUITS", str(tmp_path / "quits"))
    monkeypatch.setattr(gpu_sharing, "CLIENT", FAKE_CLIENT)
    monkeypatch.setattr(gpu_sharing, "DAEMON_S", 2.0)
    monkeypatch.setattr(sweeper, "_MPS_QUIT_S", 1.0)

    def behave(how: str) -> None:
        monkeypatch.setenv("FAKE_MPS", how)
        if how == "missing":
            program.unlink()

    return behave


def num_quits(tmp_path: Path) -> int:
    """How many daemons were asked to quit and did."""
    file = tmp_path / "quits"
    return len(file.read_text().split()) if file.exists() else 0


def noted(running: Service, actor: str) -> list[str]:
    return [line for line in running.lines(actor) if "pipes" in line]


async def test_every_actor_on_a_gpu_is_a_client_and_only_a_vit_beside_a_rank_is_capped(
    tmp_path: Path, run_root: Path
) -> None:
    async with service(fake_config(tmp_path, parallel=ON_GPU), NOTERS, tmp_path) as running:
        await running.until_ready()
        assert noted(running, "vit:0") == ["1 pipes mps-1 percent none"]
        assert noted(running, "vit:1") == ["1 pipes mps-1 percent 70"]
        assert noted(running, "llm:0") == ["1 pipes mps-1 percent none"]
        assert noted(running, "scheduler:0") == ["1 pipes none percent none"]
        assert running.observer.of("sharing") == [("sharing", "MPS, vit:1 on at most 70 % of the SMs")]
        assert len(daemons(run_root)) == 1
    assert daemons(run_root) == []
    assert num_quits(tmp_path) == 1


async def test_a_daemon_that_does_not_quit_is_killed(
    tmp_path: Path, run_root: Path, control: Callable[[str], None]
) -> None:
    control("deaf")
    async with service(fake_config(tmp_path, parallel=ON_GPU), NOTERS, tmp_path) as running:
        await running.until_ready()
        assert len(daemons(run_root)) == 1
    assert daemons(run_root) == []


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("missing", "time slicing: nvidia-cuda-mps-control is not installed"),
        ("fails", "time slicing: nvidia-cuda-mps-control -d failed (exit code 3): no such device"),
        ("hangs", "time slicing: nvidia-cuda-mps-control -d did not return within 2 s"),
        ("no-server", "time slicing: nvidia-cuda-mps-control has no server for a client that has started"),
        ("client", "time slicing: a first client failed: cuInit returned CUDA error 805"),
        ("stuck client", "time slicing: a first client was not ready within 0.5 s"),
        ("asked", "time slicing: --gpu-sharing time-slice"),
    ],
)
async def test_without_mps_one_line_says_why_and_the_service_starts_all_the_same(
    how: str, line: str, tmp_path: Path, run_root: Path, control: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    control(how)
    if how == "client":
        monkeypatch.setattr(gpu_sharing, "CLIENT", "print('cuInit returned CUDA error 805')")
    if how == "stuck client":
        monkeypatch.setattr(gpu_sharing, "CLIENT", "import time; time.sleep(300)")
        monkeypatch.setattr(gpu_sharing, "CLIENT_S", 0.5)
    choice: GpuSharingChoice = "time-slice" if how == "asked" else "auto"
    parallel = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=2, gpu_sharing=choice)
    async with service(fake_config(tmp_path, parallel=parallel), NOTERS, tmp_path) as running:
        await running.until_ready()
        assert running.observer.of("sharing") == [("sharing", line)]
        assert noted(running, "vit:1") == noted(running, "llm:0") == ["1 pipes none percent none"]
        assert daemons(run_root) == []


async def test_mps_that_was_asked_for_and_cannot_be_had_ends_the_start(
    tmp_path: Path, control: Callable[[str], None]
) -> None:
    control("fails")
    parallel = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=2, gpu_sharing="mps")
    async with service(fake_config(tmp_path, parallel=parallel), NOTERS, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert message == "--gpu-sharing mps: nvidia-cuda-mps-control -d failed (exit code 3): no such device"


async def test_where_no_gpu_is_shared_no_daemon_is_started(tmp_path: Path, run_root: Path) -> None:
    of_its_own = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=1, gpu_sharing="mps")
    for number, parallel in enumerate((ParallelOptions(gpu_sharing="mps"), of_its_own)):
        events = tmp_path / str(number)
        events.mkdir()
        async with service(fake_config(events, parallel=parallel), NOTERS, events) as running:
            await running.until_ready()
            assert running.observer.of("sharing") == []
            assert noted(running, "vit:0") == ["1 pipes none percent none"]
            assert daemons(run_root) == []


async def test_a_service_that_is_stopped_while_the_daemon_hangs_ends_at_once(
    tmp_path: Path, run_root: Path, control: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    control("hangs")
    monkeypatch.setattr(gpu_sharing, "DAEMON_S", 300.0)
    async with service(fake_config(tmp_path, parallel=ON_GPU), NOTERS, tmp_path) as running:
        await running.until(lambda: len(daemons(run_root)) == 1, "the hanging program")
        running.supervisor.request_stop()
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 0
    assert daemons(run_root) == []


async def test_a_daemon_that_is_being_stopped_when_the_service_ends_leaves_no_program(
    tmp_path: Path, run_root: Path, control: Callable[[str], None]
) -> None:
    control("deaf")
    specs = fake_specs(fake_config(tmp_path, parallel=ON_GPU), NOTERS)
    others = set(children_of(os.getpid()))
    sharing = gpu_sharing.GpuSharing(ON_GPU, specs, run_root, lambda how: None)
    sharing.start()
    groups = {spec.group for spec in specs if spec.device != "cpu"}
    for group in groups:
        await sharing.enter(group)
    assert sharing.fault("llm") == groups
    for group in groups:
        sharing.leave(group)
    async with asyncio.timeout(DEADLINE_S):
        while set(children_of(os.getpid())) <= others:  # noqa: ASYNC110 - until the program is asked to quit
            await asyncio.sleep(0.005)
    await sharing.close()
    assert set(children_of(os.getpid())) <= others
    assert daemons(run_root) == []
    (run_root / "mps-1" / "pid").unlink()
    (run_root / "mps-1").rmdir()


def test_killing_the_supervisor_leaves_no_daemon(tmp_path: Path, run_root: Path) -> None:
    parallel = {"FAKE_GPUS": "1"}
    with start_service_process(tmp_path, NOTERS, **parallel) as process:
        output = read_until(process, "ready http")
        assert "gpu_sharing MPS, vit:1 on at most 80 % of the SMs" in output
        found = daemons(run_root)
        assert len(found) == 1
        children = [*children_of(process.pid), *map(psutil.Process, found)]
        process.kill()
        process.wait()
        deadline_s = time.monotonic() + DEADLINE_S
        while not num_quits(tmp_path) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert LeftBehind(run_root, children, set(SHARED_MEMORY.iterdir())).after(DEADLINE_S) == []


async def test_a_killed_client_is_replaced_under_the_same_daemon(tmp_path: Path, run_root: Path) -> None:
    async with service(fake_config(tmp_path, parallel=ON_GPU), NOTERS, tmp_path) as running:
        await running.until_ready()
        before = daemons(run_root)
        os.kill(running.pid("vit:1"), signal.SIGKILL)
        await running.until_ready(2)
        assert noted(running, "vit:1")[1:] == ["2 pipes mps-1 percent 70"]
        assert running.process("llm:0").epoch == 1
        assert daemons(run_root) == before


@pytest.mark.parametrize("kind", ["vit", "llm"])
async def test_a_cuda_fault_takes_all_clients_and_the_daemon_with_it(
    kind: ActorKind, tmp_path: Path, run_root: Path
) -> None:
    fakes: dict[ActorKind, str] = {**NOTERS, kind: "Faulter"}
    async with service(fake_config(tmp_path, parallel=ON_GPU), fakes, tmp_path) as running:
        await running.until_ready()
        before = daemons(run_root)
        (tmp_path / "fault").touch()
        await running.until_ready(2)
        after = daemons(run_root)
        assert len(after) == 1
        assert after != before
        assert {noted(running, name)[1] for name in ("vit:0", "llm:0")} == {"2 pipes mps-2 percent none"}
        assert noted(running, "vit:1")[1] == "2 pipes mps-2 percent 70"
        assert running.process("scheduler:0").epoch == 1
        reasons = [entry[3] for entry in running.observer.of("down")]
        assert len(reasons) == 3
        assert sum("CUDA fault under the same MPS daemon" in reason for reason in reasons) == 2
        assert sum("exit code 76" in reason for reason in reasons) == 1
        assert len(running.observer.of("sharing")) == 2


async def test_a_daemon_that_cannot_be_started_anew_gives_way_to_time_slicing(
    tmp_path: Path, run_root: Path, control: Callable[[str], None]
) -> None:
    parallel = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=2, gpu_sharing="mps")
    async with service(fake_config(tmp_path, parallel=parallel), {**NOTERS, "llm": "Faulter"}, tmp_path) as running:
        await running.until_ready()
        control("fails")
        (tmp_path / "fault").touch()
        await running.until_ready(2)
        assert noted(running, "vit:1")[1] == "2 pipes none percent none"
        assert "time slicing" in running.observer.of("sharing")[1][1]
        (tmp_path / "fault").touch()  # its own affair now
        await running.until_ready(3)
        assert running.process("vit:1").epoch == 2
        assert running.process("llm:0").epoch == 3


class CudaError(RuntimeError):
    pass


def _wrapped() -> Exception:
    try:
        try:
            raise RuntimeError("CUDA error: unspecified launch failure")
        except RuntimeError as error:
            raise ValueError("a step failed") from error
    except ValueError as error:
        return ExceptionGroup("tasks", [KeyError("x"), error])


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (CudaError("cudaFree: cudaErrorIllegalAddress"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (_wrapped(), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("a step failed"), False),
        (ExceptionGroup("tasks", [ValueError("x")]), False),
    ],
)
def test_a_device_fault_is_known_by_name_or_message(error: Exception, is_fault: bool) -> None:
    assert is_device_fault(error) is is_fault


def test_clients_count_among_the_devices_that_the_daemon_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert gpu_sharing._client_variables(tmp_path)["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in gpu_sharing._client_variables(tmp_path)


@pytest.mark.parametrize(
    "wrong", [["--vit-sm-percent", "0"], ["--vit-sm-percent", "101"], ["--gpu-sharing", "green"]], ids=" ".join
)
def test_wrong_options_are_a_usage_error_that_names_them(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["launch", *wrong])
    assert wrong[0] in capsys.readouterr().err

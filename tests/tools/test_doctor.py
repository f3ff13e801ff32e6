"""`vlmrt doctor`: what is found and its remedy, probes that crash or hang, exit status and both forms."""

from __future__ import annotations

import ctypes
import io
import json
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from vlmrt.tools import demo
from vlmrt.tools.checkpoint import make_checkpoint
from vlmrt.tools.cli import build_parser, main
from vlmrt.tools.doctor import command, host, probes
from vlmrt.tools.doctor.child import run_probe
from vlmrt.tools.doctor.findings import Finding, ok, problem, warning
from vlmrt.tools.doctor.show import show_findings, show_json

PROBES = "tests.tools.doctor_probes"


def only(findings: Iterable[Finding]) -> Finding:
    [finding] = findings
    return finding


# ---------------------------------------------------------------- probes in a child


def test_a_probe_gives_its_findings_whatever_its_libraries_print() -> None:
    assert run_probe("subject", f"{PROBES}:well", ("a", "b")) == [ok("subject", "a b")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("crash", "its probe was ended by SIGSEGV: deep in C"),
        ("fail", "its probe failed with exit code 1: ImportError: libcudart.so.12: no such file"),
        ("leave", "its probe failed with exit code 0"),
        ("absent", "has no attribute 'absent'"),
    ],
)
def test_a_probe_that_dies_is_a_problem_of_its_subject(name: str, says: str) -> None:
    found = only(run_probe("decord", f"{PROBES}:{name}"))
    assert (found.subject, found.status) == ("decord", "problem")
    assert says in found.text
    assert found.remedy


def test_a_probe_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    found: list[Finding] = []
    deadline_s = 1.0
    while not file.exists():  # a loaded machine may need longer to reach the hang
        found = run_probe("torch", f"{PROBES}:hang", (str(file),), deadline_s)
        deadline_s *= 2
    assert only(found).text.startswith("its probe did not end within ")
    for pid in map(int, file.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# ---------------------------------------------------------------- this machine


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 1), "problem"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 14, 0), "warning")]
)
def test_the_version_of_python_is_judged(
    version: tuple[int, int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert next(host.python()).status == status


def test_packages_that_are_missing_or_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda _: ["numpy>=1", "msgspec>=99", "quux>=1", "winonly; sys_platform == 'win32'", "x; extra == 'test'"],
    )
    found = only(host.packages())
    assert found.status == "problem"
    assert "quux is missing" in found.text
    assert "msgspec 0." in found.text
    assert "numpy" not in found.text
    assert "winonly" not in found.text
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["numpy>=1"])
    assert only(host.packages()).status == "ok"


def test_memory_is_what_machine_and_container_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_gib", lambda: 8.0)
    limit = tmp_path / "memory.max"
    assert only(host.memory(limit)).status == "ok"
    limit.write_text("max\n")
    assert only(host.memory(limit)).status == "ok"
    limit.write_text(f"{2 << 30}\n")
    assert only(host.memory(limit)) == warning(
        "memory", "8.0 GiB available; this container may take 2.0", only(host.memory(limit)).remedy
    )


def test_shared_memory_that_is_small_or_absent_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(host.shared_memory(tmp_path / "absent")).status == "warning"
    for free, status in ((64 << 20, "warning"), (1 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert only(host.shared_memory(tmp_path)).status == status


@pytest.mark.parametrize(
    ("soft", "hard", "status", "remedy"),
    [(1024, 4096, "warning", "ulimit -n 4096"), (256, -1, "warning", "ulimit -n 65536"), (65536, 65536, "ok", "")],
)
def test_few_open_files_are_a_warning_with_what_can_be_set(
    soft: int, hard: int, status: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    found = only(host.open_files())
    assert found.status == status
    assert remedy in found.remedy


def test_a_port_is_free_or_taken_or_its_host_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        taken = only(host.port("127.0.0.1", number))
        assert taken.status == "problem"
        assert f"--port {number}" in taken.text
    assert only(host.port("127.0.0.1", number)).status == "ok"
    assert only(host.port("192.0.2.1", number)).status == "problem"


def test_the_place_of_sockets_must_be_short_and_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(host.run_directory()).status == "ok"
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("vlmrt.runtime.run_dir.candidate_bases", lambda: [long])
    assert only(host.run_directory()).status == "problem"
    assert list(long.iterdir()) == []


def test_disks_of_caches_are_found_by_their_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 30))
    models, engines = host.disks({"HF_HOME": str(tmp_path / "hf")})
    assert (models.status, engines.status) == ("warning", "ok")
    assert models.text == f"5.0 GiB free for {tmp_path}/hf/hub"
    assert engines.text.startswith(f"5.0 GiB free for {tmp_path}/vlmrt")
    assert not (tmp_path / "hf").exists()


# ---------------------------------------------------------------- GPUs, readers, engines


class FakeDriver:
    """What a libcuda would say."""

    def __init__(self, code: int = 0, capability: tuple[int, int] = (9, 0)) -> None:
        self._code = code
        self._capability = capability

    def cuInit(self, flags: int) -> int:
        return self._code

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self._capability[attribute - 75]
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = 141 << 30
        return 0


def test_a_machine_without_a_driver_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert only(probes.driver()) == ok("CUDA driver", "none: everything runs on the CPU")


def test_gpus_are_named_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver())
    assert [(found.status, found.text) for found in probes.driver()] == [
        ("ok", "for CUDA 13.1, 1 GPUs"), ("ok", "NVIDIA H200 (compute capability 9.0), 141 GiB"),
    ]  # fmt: skip
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(capability=(7, 5)))
    assert [found.status for found in probes.driver()] == ["ok", "problem"]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(code=803))
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in only(probes.driver()).text


def test_a_torch_that_sees_no_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("vlmrt.tools.devices.num_cuda_devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [found.status for found in probes.torch()] == ["ok", "problem"]


@pytest.mark.parametrize(
    ("free_gib", "fails", "status", "says"),
    [
        (79, None, "ok", "computes; 79.0 of 80.0 GiB free"),
        (10, None, "warning", "computes; 10.0 of 80.0 GiB free"),
        (79, "CUDA error: out of memory\nmore", "problem", "cannot compute: CUDA error: out of memory"),
    ],
)
def test_a_gpu_must_compute_and_be_free(free_gib: int, fails: str | None, status: str, says: str) -> None:
    import torch

    def ones(*shape: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        if fails:
            raise RuntimeError(fails)
        return torch.ones(*shape, dtype=dtype)

    memory = SimpleNamespace(mem_get_info=lambda _: (free_gib << 30, 80 << 30))
    fake = SimpleNamespace(cuda=memory, ones=ones, bfloat16=torch.bfloat16)
    found = probes._multiply(fake, 0)
    assert (found.status, found.text) == (status, says)


def test_mps_is_looked_for_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrt.tools.devices.num_cuda_devices", lambda: 0)
    assert probes.sharing() == []
    monkeypatch.setattr("vlmrt.tools.devices.num_cuda_devices", lambda: 1)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert only(probes.sharing()).status == "warning"
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-cuda-mps-control")
    assert only(probes.sharing()).status == "ok"


@pytest.mark.parametrize("probe", [probes.video, probes.engines])
def test_libraries_that_cannot_be_loaded_are_named(
    probe: Callable[[], list[Finding]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("decord", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libavcodec.so.58: cannot open')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = [finding for finding in probe() if finding.status != "ok"]
    assert [finding.status for finding in found] == ["warning"]
    assert "libavcodec.so.58: cannot open" in found[0].text


# ---------------------------------------------------------------- a model


def test_the_demo_model_is_well() -> None:
    described, fits = probes.model(str(demo.CHECKPOINT), "main", "1")
    assert described.text.startswith("qwen2_vl, 0.01 billion parameters, in ")
    assert fits.status == "ok"


def test_files_that_are_wrong_are_a_problem(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "test-qwen2-vl", weights=False)
    assert "neither model.safetensors nor" in only(probes.model(str(directory), "main", "1")).text
    assert "no such directory" in only(probes.model(str(tmp_path / "absent"), "main", "1")).text
    assert only(probes.model(str(demo.CHECKPOINT), "main", "3")).status == "problem"  # heads / 3


def test_a_hub_id_is_looked_for_and_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = only(probes.model("nobody/no-such-model", "main", "1"))
    assert (found.status, found.text) == ("warning", "nobody/no-such-model is not on this machine yet")


@pytest.mark.parametrize(("billions", "status"), [(0.5, "ok"), (1.8, "warning"), (7.0, "problem")])
def test_weights_must_leave_room(billions: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "available_gib", lambda: 8.0)
    monkeypatch.setattr("vlmrt.tools.devices.num_cuda_devices", lambda: 0)
    assert probes._fit(int(billions * 1e9), 1).status == status


# ---------------------------------------------------------------- the command


FOUND = [ok("Python", "3.11"), warning("MPS", "none", "install it"), problem("port 8000", "taken", "--port")]


def test_lines_have_status_subject_and_remedy_and_a_sum() -> None:
    stream = io.StringIO()
    assert show_findings(FOUND, stream) == 1
    assert stream.getvalue().splitlines() == [
        "ok       Python        3.11",
        "warning  MPS           none",
        "                       -> install it",
        "problem  port 8000     taken",
        "                       -> --port",
        "",
        "1 problem, 1 warning, 1 ok",
    ]


def test_on_a_terminal_lines_are_not_longer_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    show_findings([warning("subject", "word " * 40, "remedy " * 40)], stream)
    assert max(map(len, stream.getvalue().splitlines())) < 60
    assert stream.getvalue().count("word") == 40
    assert "\x1b" not in stream.getvalue()


def test_json_is_one_object_with_all_of_it() -> None:
    stream = io.StringIO()
    assert show_json(FOUND, stream) == 1
    shown = json.loads(stream.getvalue())
    assert (shown["problems"], shown["warnings"]) == (1, 1)
    assert shown["findings"][1] == {"subject": "MPS", "status": "warning", "text": "none", "remedy": "install it"}


def test_the_command_looks_at_all_and_exits_with_1_for_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def fake(subject: str, function: str, words: tuple[str, ...]) -> list[Finding]:
        asked.append((function.rpartition(":")[2], *words))
        return [ok(subject, "well")]

    monkeypatch.setattr("vlmrt.tools.doctor.child.run_probe", fake)
    file = tmp_path / "c.yaml"
    file.write_text("tp: 2\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        words = ["doctor", "--json", "--config", str(file), "--model", "some/model", "--port"]
        assert main([*words, str(number)]) == 1
        shown = json.loads(capsys.readouterr().out)
    assert [f["subject"] for f in shown["findings"] if f["status"] == "problem"] == [f"port {number}"]
    assert ("model", "some/model", "main", "2") in asked
    assert {name for name, *_ in asked} == {"driver", "torch", "sharing", "video", "engines", "model"}
    assert all(callable(getattr(probes, name)) for name, *_ in asked)
    settings = next(f for f in shown["findings"] if f["subject"] == "settings")
    assert settings["text"] == f"file {file}"
    assert main([*words, str(number)]) == 0


def test_wrong_settings_are_a_problem_and_the_rest_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tp: 0\n")
    arguments = build_parser().parse_args(["doctor", "--config", str(file), "--port", "1234"])
    options, found = command._options(arguments)
    assert only(found).text == f"{file}, line 1: tp: 0 is not at least 1"
    assert (options.port, options.tp) == (1234, 1)

"""The options of the host tiers: defaults, contradictions, what the machine has; and what the ready block says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import make_config
from vlmrt.actors.models.registry import load_model_config
from vlmrt.runtime.config import Config, MemoryOptions, ParallelOptions
from vlmrt.runtime.control_messages import LlmReady
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_memory import available_gib
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.tools import demo
from vlmrt.tools.cli import build_parser
from vlmrt.tools.host_tiers import check_host_memory, embedding_host_cache_gib, kv_host_cache_gib
from vlmrt.tools.launch import build_config
from vlmrt.tools.launch_report import LaunchReport


def config(kv_gib: float, embedding_gib: float, tp: int = 1, num_vits: int = 1) -> Config:
    return make_config(
        demo.CHECKPOINT,
        memory=MemoryOptions(kv_host_cache_gib=kv_gib, embedding_host_cache_gib=embedding_gib),
        parallel=ParallelOptions(device="cuda", dtype="bfloat16", tp=tp, num_vits=num_vits),
    )


def test_images_have_a_host_tier_on_a_gpu_and_kv_blocks_where_it_is_asked_for() -> None:
    arguments = build_parser().parse_args(["launch"])
    assert (embedding_host_cache_gib(arguments, "cuda"), embedding_host_cache_gib(arguments, "cpu")) == (2.0, 0.0)
    assert kv_host_cache_gib(arguments) == 0.0
    arguments = build_parser().parse_args(
        ["launch", "--kv-host-cache-gib", "1.5", "--embedding-host-cache-gib", "0"]  # 0: none, also on a GPU
    )
    assert (embedding_host_cache_gib(arguments, "cuda"), kv_host_cache_gib(arguments)) == (0.0, 1.5)


def test_a_host_tier_without_its_cache_is_refused_but_its_default_is_not() -> None:
    nothing_cached = ["launch", "--no-prefix-caching", "--no-embedding-caching"]
    arguments = build_parser().parse_args([*nothing_cached, "--kv-host-cache-gib", "1"])
    assert embedding_host_cache_gib(arguments, "cuda") == 0.0
    with pytest.raises(StartupError, match="--kv-host-cache-gib 1: --no-prefix-caching"):
        kv_host_cache_gib(arguments)
    arguments = build_parser().parse_args([*nothing_cached, "--embedding-host-cache-gib", "3"])
    with pytest.raises(StartupError, match="--embedding-host-cache-gib 3: --no-embedding-caching"):
        embedding_host_cache_gib(arguments, "cpu")


@pytest.mark.parametrize(
    ("kv_gib", "embedding_gib", "tp", "num_vits", "message"),
    [
        (8.5, 0.0, 1, 1, r"--kv-host-cache-gib 8.5 \(for each of 1 ranks\): 8.50 GiB"),
        (4.5, 0.0, 2, 1, r"--kv-host-cache-gib 4.5 \(for each of 2 ranks\): 9.00 GiB"),
        (0.0, 3.0, 2, 3, r"--embedding-host-cache-gib 3 \(for each of 3 ViTs\): 9.00 GiB"),
        (3.0, 2.5, 2, 1, r"--kv-host-cache-gib 3 .* and --embedding-host-cache-gib 2.5 .*: 8.50 GiB"),
    ],
)
def test_more_than_the_machine_has_is_refused_by_the_options_that_ask_for_it(
    kv_gib: float, embedding_gib: float, tp: int, num_vits: int, message: str
) -> None:
    with pytest.raises(StartupError, match=f"^{message} of host memory, of which 8.00 GiB are available$"):
        check_host_memory(config(kv_gib, embedding_gib, tp, num_vits), available=8.0)


def test_on_a_cpu_the_first_tiers_are_host_memory_too() -> None:
    memory = MemoryOptions(kv_cache_gib=3.0, embedding_cache_gib=4.0, embedding_host_cache_gib=2.0)
    with pytest.raises(StartupError, match=r"-kv-cache-gib 3 .* --embedding-cache-gib 4 .*: 9.00 GiB of host memory"):
        check_host_memory(make_config(demo.CHECKPOINT, memory=memory), available=8.0)
    check_host_memory(make_config(demo.CHECKPOINT, memory=memory), available=9.0)


def test_what_the_machine_has_is_taken() -> None:
    check_host_memory(config(2.0, 2.0, tp=2, num_vits=2), available=8.0)
    check_host_memory(config(0.0, 0.0), available=0.0)


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       99999999 kB\nMemFree:         9999999 kB\nMemAvailable:    3145728 kB\nHuge: 0\n"
    )
    assert available_gib(meminfo) == 3.0
    assert available_gib() > 0.1


def test_options_reach_the_config() -> None:
    arguments = build_parser().parse_args(
        ["launch", "--device", "cpu", "--kv-host-cache-gib", "0.125", "--embedding-host-cache-gib", "0.0625"]
    )
    memory = build_config(arguments)[0].memory
    assert (memory.kv_host_cache_gib, memory.embedding_host_cache_gib) == (0.125, 0.0625)


def ready_block(config: Config, ready: LlmReady, capsys: pytest.CaptureFixture[str]) -> list[str]:
    report = LaunchReport(config, load_model_config(demo.CHECKPOINT))
    report.actor_up(ActorName("llm:0"), Epoch(1), ready)
    report.ready("http://127.0.0.1:1", 1.0)
    return capsys.readouterr().out.splitlines()


def test_the_ready_block_says_which_host_tiers_are_on(capsys: pytest.CaptureFixture[str]) -> None:
    block = ready_block(config(1.5, 2.0), LlmReady(1000, 300, 1 << 20), capsys)
    line = block.index("  KV cache   16000 tokens (0.98 GiB), prefix caching on; in host memory 4800 tokens (1.5 GiB)")
    assert block[line - 1].startswith("  context  ")
    assert "  images     0.25 GiB of encoded images; in host memory 2 GiB" in ready_block(
        config(0.0, 2.0), LlmReady(1000), capsys
    )
    assert not any("host memory" in line for line in ready_block(config(0.0, 0.0), LlmReady(1000), capsys))

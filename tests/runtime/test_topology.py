"""Which actors a config means, where they run and who hears of whom."""

from __future__ import annotations

import pytest

from tests.support import make_config
from vlmrt.runtime.config import ParallelOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.process_table import MAX_BACKOFF_S, RestartBudget
from vlmrt.runtime.topology import (
    FACTORIES,
    INBOXES,
    TOLD_ABOUT,
    actor_specs,
    restart_groups,
    thread_environment,
)


def test_a_laptop_runs_one_of_each_and_no_gpu() -> None:
    specs = actor_specs(make_config())
    assert [spec.name for spec in specs] == ["edge:0", "media:0", "scheduler:0", "vit:0", "llm:0"]
    assert {spec.device for spec in specs} == {"cpu"}
    assert all(spec.factory == FACTORIES[spec.kind] for spec in specs)
    assert all(spec.group == (spec.name if spec.kind != "llm" else "llm") for spec in specs)


def test_ranks_go_to_their_gpus_and_vits_round_them() -> None:
    parallel = ParallelOptions(device="cuda", dtype="bfloat16", tp=2, num_vits=4, num_edges=2, llm_threads=3)
    specs = {spec.name: spec for spec in actor_specs(make_config(parallel=parallel), num_gpus=3)}
    assert [specs[name].device for name in ("llm:0", "llm:1")] == ["cuda:0", "cuda:1"]  # type: ignore[index]
    assert [specs[f"vit:{i}"].device for i in range(4)] == ["cuda:2", "cuda:1", "cuda:0", "cuda:2"]  # type: ignore[index]
    assert {specs[f"edge:{i}"].device for i in range(2)} == {"cpu"}  # type: ignore[index]
    assert thread_environment(specs["llm:1"])["OMP_NUM_THREADS"] == "3"  # type: ignore[index]


def test_all_ranks_are_one_restart_group_and_everyone_else_is_alone() -> None:
    specs = actor_specs(make_config(parallel=ParallelOptions(tp=3, num_vits=2)))
    groups = restart_groups(specs)
    assert [spec.name for spec in groups["llm"]] == ["llm:0", "llm:1", "llm:2"]
    assert sorted(map(len, groups.values())) == [1, 1, 1, 1, 1, 3]


def test_too_few_gpus_are_an_error_that_names_the_flag() -> None:
    config = make_config(parallel=ParallelOptions(device="cuda", tp=4))
    with pytest.raises(StartupError, match="--tp 4 needs 4 GPUs, but 2 are visible"):
        actor_specs(config, num_gpus=2)


def test_links_are_mutual_and_cover_every_kind() -> None:
    assert set(TOLD_ABOUT) == set(INBOXES) == set(FACTORIES)
    for kind, peers in TOLD_ABOUT.items():
        assert all(kind in TOLD_ABOUT[peer] for peer in peers)
    assert TOLD_ABOUT["scheduler"] == set(TOLD_ABOUT) - {"scheduler"}


def test_restarts_are_counted_within_the_period_and_wait_longer_each_time() -> None:
    budget = RestartBudget(3, period_s=60.0)
    assert [budget.next_delay_s(float(now)) for now in (0, 1, 2, 3)] == [0.1, 0.2, 0.4, None]
    assert budget.next_delay_s(61.5) is not None
    patient = RestartBudget(20, period_s=60.0)
    delays = [patient.next_delay_s(0.0) for _ in range(20)]
    assert delays[-1] == MAX_BACKOFF_S
    assert patient.next_delay_s(0.0) is None

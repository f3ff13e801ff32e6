"""Config -> the actors of a service, where they run and who is told about whom.  Pure: nothing here starts anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import ActorName, EdgeInbox, LlmInbox, MediaInbox, SchedulerInbox, VitInbox

ActorKind = Literal["edge", "media", "scheduler", "vit", "llm"]

FACTORIES: Mapping[ActorKind, str] = {
    "edge": "vlmrt.actors.edge.actor:EdgeActor",
    "media": "vlmrt.actors.media.actor:MediaActor",
    "scheduler": "vlmrt.actors.scheduler.actor:SchedulerActor",
    "vit": "vlmrt.actors.vit.actor:VitActor",
    "llm": "vlmrt.actors.llm.actor:LlmActor",
}

INBOXES: Mapping[ActorKind, Any] = {
    "edge": EdgeInbox,
    "media": MediaInbox,
    "scheduler": SchedulerInbox,
    "vit": VitInbox,
    "llm": LlmInbox,
}

TOLD_ABOUT: Mapping[ActorKind, frozenset[ActorKind]] = {
    "edge": frozenset({"scheduler", "media"}),
    "media": frozenset({"scheduler", "edge"}),
    "scheduler": frozenset({"edge", "media", "vit", "llm"}),
    "vit": frozenset({"scheduler"}),
    "llm": frozenset({"scheduler"}),
}


class ActorSpec(msgspec.Struct, frozen=True):
    """One actor, whatever its incarnation."""

    name: ActorName
    kind: ActorKind
    index: int
    group: str  # fails and restarts as one
    factory: str  # "package.module:Class", called with the ActorContext
    num_threads: int
    device: str  # "cpu" or "cuda:<ordinal>"


def actor_specs(
    config: Config, *, num_gpus: int = 0, factories: Mapping[ActorKind, str] = FACTORIES
) -> tuple[ActorSpec, ...]:
    """Every actor of the service.  LLM rank i runs on GPU i, ViTs go round the GPUs from the last down.

    Raises StartupError if there are fewer GPUs than the config needs.
    """
    parallel = config.parallel
    on_gpu = parallel.device == "cuda"
    if on_gpu and num_gpus < parallel.tp:
        raise StartupError(f"--tp {parallel.tp} needs {parallel.tp} GPUs, but {num_gpus} are visible")

    def spec(kind: ActorKind, index: int, *, group: str = "", threads: int = 1, device: str = "cpu") -> ActorSpec:
        name = ActorName(f"{kind}:{index}")
        return ActorSpec(name, kind, index, group or name, factories[kind], threads, device)

    def vit_device(index: int) -> str:
        return f"cuda:{num_gpus - 1 - index % num_gpus}" if on_gpu else "cpu"

    def llm_device(index: int) -> str:
        return f"cuda:{index}" if on_gpu else "cpu"

    return (
        *(spec("edge", i) for i in range(parallel.num_edges)),
        *(spec("media", i) for i in range(parallel.num_media_workers)),
        spec("scheduler", 0),
        *(spec("vit", i, threads=parallel.vit_threads, device=vit_device(i)) for i in range(parallel.num_vits)),
        *(spec("llm", i, group="llm", threads=parallel.llm_threads, device=llm_device(i)) for i in range(parallel.tp)),
    )


def restart_groups(specs: tuple[ActorSpec, ...]) -> dict[str, tuple[ActorSpec, ...]]:
    """Group name -> its actors, in the order of the specs."""
    groups: dict[str, tuple[ActorSpec, ...]] = {}
    for spec in specs:
        groups[spec.group] = (*groups.get(spec.group, ()), spec)
    return groups


def thread_environment(spec: ActorSpec) -> dict[str, str]:
    """Variables that libraries read when they are imported, so they are set before the process starts."""
    threads = str(spec.num_threads)
    return {
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",  # threads that spin at a barrier take the cores that other actors need
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "NUMEXPR_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_NVLS_ENABLE": "0",  # multicast stays off: it binds memory of the whole NVLink domain
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }

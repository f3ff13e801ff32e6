"""Gates by which a test holds an actor at a named point; without `supervision.fault_hooks` they do nothing.

While the file `run_dir/hold-<name>` exists, whoever reaches the gate of that name waits.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from vlmrt.runtime.actor import ActorContext

_POLL_S = 0.005


def hold_file(run_dir: Path, name: str) -> Path:
    """Create it to hold the gate, remove it to open the gate."""
    return run_dir / f"hold-{name}"


async def gate(context: ActorContext, name: str) -> None:
    """Wait while a test holds this gate."""
    if context.config.supervision.fault_hooks:
        while hold_file(context.run_dir, name).exists():  # noqa: ASYNC110 - another process removes it
            await asyncio.sleep(_POLL_S)


def gate_in_thread(context: ActorContext, name: str) -> None:
    """The same from a worker thread."""
    if context.config.supervision.fault_hooks:
        while hold_file(context.run_dir, name).exists():
            time.sleep(_POLL_S)

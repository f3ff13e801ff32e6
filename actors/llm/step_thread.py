"""The one thread that runs a rank's work strictly in order, so that its event loop stays free for heartbeats."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, NamedTuple, Protocol, TypeVar, assert_never

import msgspec

from vlmrt.actors.llm.process_group import LAST_STEP, step_key
from vlmrt.runtime.control_messages import LlmReady
from vlmrt.runtime.messages import ActorName, DetachSlab, Epoch, StepPlan, StepResult
from vlmrt.runtime.slab import EmbeddingSlab

Pending = TypeVar("Pending")
POLL_S = 0.0001  # between looks at a step on a GPU while no further work is queued


class EndOfEpoch(msgspec.Struct, frozen=True):
    """The scheduler's incarnation is gone: forget its sequences and slabs."""


class OpenedSlab(NamedTuple):
    """A ViT's slab, mapped by this process; later plans refer to it."""

    vit: ActorName
    epoch: Epoch
    slab: EmbeddingSlab


class Aside:
    """Something else to be done in the thread, between two steps; what it raises ends only it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.done: Future[None] = Future()
        self._work = work

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self._work()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


Work = OpenedSlab | DetachSlab | StepPlan | EndOfEpoch | Aside
Finished = Callable[[Epoch, Work, StepResult | None], None]
Launched = tuple[Epoch, StepPlan, Pending]


class Rank(Protocol[Pending]):
    """What the thread drives."""

    @property
    def ready(self) -> LlmReady: ...

    def attach(self, opened: OpenedSlab) -> None: ...

    def detach(self, message: DetachSlab) -> None: ...

    def clear(self) -> None: ...

    def agrees(self, key: int) -> bool:
        """Whether all ranks do this now; False: this rank drops it."""
        ...

    def launch(self, plan: StepPlan) -> Pending: ...

    def is_done(self, pending: Pending) -> bool: ...

    def complete(self, pending: Pending) -> StepResult: ...

    def close(self) -> None: ...


class StepThread(Generic[Pending]):
    """Loads a rank, then runs what is put, one piece after the other; a plan is launched while the last one still runs.

    load: makes the rank, in the thread.  finished: called in the thread after every piece of work, with the result
    of a plan that ran.  `failure` ends with the exception of whatever raised, and then nothing
    runs any more.
    """

    def __init__(self, load: Callable[[], Rank[Pending]], finished: Finished) -> None:
        self.ready: Future[LlmReady] = Future()
        self.failure: Future[None] = Future()
        self.oldest_epoch = Epoch(0)  # plans of earlier schedulers are dropped
        self._load = load
        self._finished = finished
        self._queue: queue.SimpleQueue[tuple[Epoch, Work] | None] = queue.SimpleQueue()
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)  # a stuck step holds up no exit

    def start(self) -> None:
        self._thread.start()

    def put(self, epoch: Epoch, work: Work) -> None:
        """Queue work of this epoch of the scheduler; whoever puts bounds how much."""
        self._queue.put((epoch, work))

    def busy_s(self) -> float:
        """How long the oldest unfinished piece of work has been running."""
        since = self._busy_since_s
        return 0.0 if since is None else time.monotonic() - since

    def stop(self, timeout_s: float) -> None:
        """End after the work that is queued, within timeout_s; blocks."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            rank = self._load()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(rank.ready)
        try:
            self._work(rank)
            rank.close()
        except BaseException as error:
            self.failure.set_exception(error)

    def _work(self, rank: Rank[Pending]) -> None:
        running: Launched[Pending] | None = None  # launched, not complete
        while True:
            if running is not None and rank.is_done(running[2]):
                self._complete(rank, running)
                running = None
            try:
                item = self._queue.get(timeout=None if running is None else POLL_S)
            except queue.Empty:
                continue
            if item is None:
                break
            epoch, work = item
            if running is None:
                self._busy_since_s = time.monotonic()
            if isinstance(work, StepPlan):
                launched = self._launch(rank, epoch, work)
                self._complete(rank, running)
                running = launched
            else:
                self._complete(rank, running)
                running = None
                self._do(rank, epoch, work)
            self._busy_since_s = None if running is None else time.monotonic()
        self._complete(rank, running)

    def _launch(self, rank: Rank[Pending], epoch: Epoch, plan: StepPlan) -> Launched[Pending] | None:
        """A plan of a scheduler that is gone is dropped: what it would have changed is cleared anyway."""
        if epoch < self.oldest_epoch or not rank.agrees(step_key(epoch, plan.step)):
            self._finished(epoch, plan, None)
            return None
        return epoch, plan, rank.launch(plan)

    def _complete(self, rank: Rank[Pending], running: Launched[Pending] | None) -> None:
        if running is not None:
            epoch, plan, pending = running
            self._finished(epoch, plan, rank.complete(pending))
            self._busy_since_s = None

    def _do(self, rank: Rank[Pending], epoch: Epoch, work: OpenedSlab | DetachSlab | EndOfEpoch | Aside) -> None:
        match work:
            case OpenedSlab():
                rank.attach(work)
            case DetachSlab():
                rank.detach(work)
            case EndOfEpoch():
                rank.agrees(step_key(epoch, LAST_STEP))  # every rank drops the plans that not every rank has
                rank.clear()
            case Aside():
                work.run()
            case _:
                assert_never(work)
        self._finished(epoch, work, None)

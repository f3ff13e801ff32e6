"""Spawns the actors, links them, watches them, restarts or fails groups of them, and ends the service in order.

The supervisor never imports torch and never prints: what happens goes to an Observer and to logging.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, assert_never

import zmq

from vlmrt.runtime import sweeper
from vlmrt.runtime.admin import AdminServer
from vlmrt.runtime.admin_desk import AdminDesk
from vlmrt.runtime.admin_keys import server_keys
from vlmrt.runtime.asks import Asks
from vlmrt.runtime.config import Config
from vlmrt.runtime.control import SUPERVISOR, ActorReport, ControlServer
from vlmrt.runtime.control_messages import (
    AdminAnswer,
    Capabilities,
    Heartbeat,
    Hello,
    LlmReady,
    MemoryTurn,
    PeerDown,
    Progress,
    Ready,
    Shutdown,
    StartFailed,
)
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.gpu_sharing import GpuSharing
from vlmrt.runtime.listener import bind_http, bind_private, url_of
from vlmrt.runtime.memory_server import MemoryServer, memory_limits
from vlmrt.runtime.messages import ActorName, Epoch, Message
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.process_table import Process, ProcessTable, RestartBudget
from vlmrt.runtime.run_dir import RUN_DIR_VARIABLE, RunDir
from vlmrt.runtime.service_file import ServiceFile, write_service_file
from vlmrt.runtime.spawner import DEVICE_FAULT, START_FAILED, LocalSpawner, ProcessSpec, Spawner
from vlmrt.runtime.topology import ActorSpec, actor_specs, restart_groups
from vlmrt.runtime.transport import (
    Socket,
    admin_address,
    control_address,
    inbox_address,
    new_context,
    socket_path,
)

_EXIT_MARGIN_S = 4.0  # beyond a grace time, before SIGKILL
_OTHERS_GRACE_S = 2.0  # for actors other than edges: their requests have ended by then
_REAP_S = 10.0  # a killed process that is not gone by then is stuck in the kernel
_SWEEPER_S = 20.0
_LAST_WORDS_S = 1.0
_MAX_TICK_S = 0.25

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Told what happens, in the event loop; must not block."""

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None: ...

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None: ...

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        """It was lost; not called for those that end because the service does."""
        ...

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        """`epoch` will be spawned after delay_s."""
        ...

    def gpu_sharing(self, how: str) -> None:
        """How ViTs and ranks share their GPUs; told where they do, and again when it was set up anew."""
        ...

    def ready(self, url: str, start_s: float) -> None:
        """Every actor is up: at the first start, and again after each loss.  start_s: since the start or the loss."""
        ...

    def stopping(self, reason: str) -> None: ...

    def failed(self, message: str) -> None:
        """The service ends with exit code 1 for this reason, one line for a person."""
        ...


class LogObserver:
    """The observer of a service without a terminal."""

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        logger.debug("%s: %s %d/%d", actor, stage, done, total)

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        logger.debug("%s epoch %d is up: %s", actor, epoch, capabilities)

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        logger.warning("%s epoch %d is down: %s", actor, epoch, reason)

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        logger.warning("%s restarts as epoch %d in %.1f s", actor, epoch, delay_s)

    def gpu_sharing(self, how: str) -> None:
        logger.info("GPU sharing: %s", how)

    def ready(self, url: str, start_s: float) -> None:
        logger.info("ready at %s after %.1f s", url, start_s)

    def stopping(self, reason: str) -> None:
        logger.info("stopping: %s", reason)

    def failed(self, message: str) -> None:
        logger.error("%s", message)


class Supervisor:
    """One service, from its first process to its last.  Use once."""

    def __init__(
        self,
        config: Config,
        observer: Observer | None = None,
        *,
        specs: tuple[ActorSpec, ...] | None = None,
        spawner: Spawner | None = None,
        num_gpus: int = 0,
        handle_signals: bool = True,
    ) -> None:
        """`specs` default to the topology of the config on num_gpus GPUs; `spawner` to processes on this machine."""
        self._config = config
        self._observer = observer or LogObserver()
        self._specs = specs
        self._spawner = spawner or LocalSpawner()
        self._num_gpus = num_gpus
        self._handle_signals = handle_signals
        self._metrics = Metrics()
        self._table = ProcessTable()
        self._failures: dict[str, asyncio.Future[str]] = {}  # group -> why its present incarnation must end
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._stop_reason = ""
        self._fatal: str | None = None
        self._num_kv_blocks: int | None = None  # what the first start found room for, beside everyone else
        self._was_ready = False
        self._is_ready = False
        self._began_s = self._unready_since_s = time.monotonic()
        self.url = ""  # of the HTTP server, once run() has bound it
        self.run_dir: Path | None = None

    # ------------------------------------------------------------ the whole life

    async def run(self) -> int:
        """Start, serve until a signal, `request_stop` or a failure, then end everything.  Returns the exit code.

        Nothing is left behind: no process, no run directory, no shared memory.
        """
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._open(stack)
                await self._supervise()
        except StartupError as error:
            self._fail(str(error))
        if self._fatal is not None:
            self._observer.failed(self._fatal)
            return 1
        return 0

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Begin the ordered end; a second call makes it immediate."""
        if self._stop.is_set():
            self._stop_now.set()
        else:
            self._stop_reason = reason
            self._stop.set()

    def _fail(self, message: str) -> None:
        if self._fatal is None and not self._stop.is_set():
            self._fatal = " ".join(message.split())
            self.request_stop("failed")

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Everything that lives as long as the service; closed in reverse order."""
        specs = self._specs or actor_specs(self._config, num_gpus=self._num_gpus)
        self._table = ProcessTable.of(specs)
        zmq_context = new_context()
        stack.callback(zmq_context.destroy, 0)
        run_dir = RunDir()
        stack.callback(run_dir.remove)
        self.run_dir = run_dir.path
        server = self._config.server
        self._listener = stack.enter_context(bind_private(run_dir.path) if server.private_socket else bind_http(server))
        self.url = url_of(self._listener)
        self._lifeline_fd, lifeline_writer = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, self._lifeline_fd)
        self._sweeper = _start_sweeper(self._lifeline_fd, run_dir.path)
        stack.push_async_callback(self._end_sweeper, lifeline_writer)
        self._memory = MemoryServer(
            socket_path(run_dir.path, "memory"), memory_limits(self._config.memory), self._table.owner_of_pid
        )
        stack.callback(self._memory.close)
        self._sharing = GpuSharing(self._config.parallel, specs, run_dir.path, self._observer.gpu_sharing)
        stack.push_async_callback(self._sharing.close)
        self._control_address = control_address(run_dir.path)
        self._control = ControlServer(zmq_context, self._control_address, self._take_report, self._metrics)
        stack.callback(self._control.close)
        self._open_admin(stack, zmq_context, run_dir.path)
        if self._handle_signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.request_stop, f"got {number.name}")
                stack.callback(loop.remove_signal_handler, number)

    def _open_admin(self, stack: contextlib.AsyncExitStack, zmq_context: zmq.Context[Socket], run_dir: Path) -> None:
        admin = self._config.admin
        self._asks = Asks(self._table, self._control.send)
        self._desk = AdminDesk(
            self._config,
            self._table,
            self._asks,
            url=self.url,
            announce=self._send_status,
            request_stop=lambda reason: None if self._stop.is_set() else self.request_stop(reason),
        )
        stack.callback(self._desk.close)
        address, keys = admin_address(run_dir), server_keys(admin)
        server = AdminServer(zmq_context, self._desk, self._metrics, address, admin.address, keys)
        stack.callback(server.close)
        model = self._config.model.served_names[0]
        write_service_file(run_dir, ServiceFile(os.getpid(), self.url, model, time.time(), server.addresses))

    async def _supervise(self) -> None:
        groups = restart_groups(self._specs_in_use())
        self._sharing.start()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(self._memory.serve()), tasks.create_task(self._tick())]
            lives = {name: tasks.create_task(self._keep_alive(name, specs)) for name, specs in groups.items()}
            await self._stop.wait()
            self._observer.stopping(self._stop_reason)
            await self._sharing.close()
            await self._end_in_order(lives)
            for task in background:
                task.cancel()

    def _specs_in_use(self) -> tuple[ActorSpec, ...]:
        return tuple(process.spec for process in self._table)

    # ------------------------------------------------------------ one restart group

    async def _keep_alive(self, group: str, specs: tuple[ActorSpec, ...]) -> None:
        """Run incarnation after incarnation of a group, within its restart budget, until the service stops."""
        options = self._config.supervision
        budget = RestartBudget(options.max_restarts, options.restart_period_s)
        members = [self._table.processes[spec.name] for spec in specs]
        epoch = Epoch(1)
        while not self._stop.is_set():
            reason = await self._one_incarnation(group, members, epoch)
            if self._stop.is_set():
                return
            if not self._was_ready:
                self._fail(reason)
                return
            delay_s = budget.next_delay_s(time.monotonic())
            if delay_s is None:
                self._fail(
                    f"{group} ended more than {options.max_restarts} times within {options.restart_period_s:g} s "
                    f"(supervision.max_restarts), the last time: {reason}"
                )
                return
            epoch = Epoch(epoch + 1)
            for member in members:
                member.num_restarts += 1
                self._observer.restarting(member.spec.name, epoch, delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay_s)
                return

    async def _one_incarnation(self, group: str, members: list[Process], epoch: Epoch) -> str:
        """Spawn the group, announce it when all of it is ready, and return why it ended; all of it is reaped then."""
        failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._failures[group] = failure
        try:
            await self._sharing.enter(group)
        except StartupError as error:
            return str(error)
        if self._stop.is_set():
            self._sharing.leave(group)
            return self._stop_reason
        watchers: list[asyncio.Task[None]] = []
        limit = asyncio.create_task(self._limit_start(members, failure))
        asked_to_end = False
        try:
            for member in members:
                self._spawn(member, epoch)
                watchers.append(asyncio.create_task(self._watch(member, failure)))
            reason = await failure
            asked_to_end = self._stop.is_set()
        except OSError as error:
            reason = f"{group} cannot be spawned: {error}"
        finally:
            limit.cancel()
            await self._reap(members, watchers, kill=not asked_to_end)
            self._sharing.leave(group)
        for member in members:
            if member.handle is not None:  # else it was not even spawned
                self._take_down(member, reason)
        self._refresh_readiness()
        return reason

    async def _reap(self, members: list[Process], watchers: list[asyncio.Task[None]], *, kill: bool) -> None:
        """Wait for every process of the group; without `kill` they were told to end, and `_end` sees to it."""
        if kill:
            for member in members:
                if member.handle is not None:
                    member.handle.kill()
        if watchers:
            _, stuck = await asyncio.wait(watchers, timeout=_REAP_S if kill else None)
            for watcher in stuck:
                watcher.cancel()
            if stuck:  # it may still hold its device: a successor would fail in stranger ways
                self._fail(f"a killed process of {members[0].spec.group} is still there after {_REAP_S:g} s")

    def _spawn(self, member: Process, epoch: Epoch) -> None:
        assert self.run_dir is not None
        address = inbox_address(self.run_dir, member.spec.name, epoch)
        handle = self._spawner.spawn(
            ProcessSpec(
                actor=member.spec,
                epoch=epoch,
                config=self._desk.config_of(member.spec.name),
                run_dir=str(self.run_dir),
                control_address=self._control_address,
                inbox_address=address,
                memory_path=str(socket_path(self.run_dir, "memory")),
                parent_pid=os.getpid(),
                lifeline_fd=self._lifeline_fd,
                listen_fd=self._listener.fileno() if member.spec.kind == "edge" else None,
                environment=dict(self._sharing.environment(member.spec)),
            )
        )
        member.begin(epoch, address, handle, time.monotonic())

    async def _watch(self, member: Process, failure: asyncio.Future[str]) -> None:
        assert member.handle is not None
        code = await member.handle.wait()
        if code == START_FAILED:
            await asyncio.wait({failure}, timeout=_LAST_WORDS_S)  # its StartFailed says more than its exit code
        if code == DEVICE_FAULT:
            self._on_device_fault(member)
        during = "" if member.is_up else " during its start"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        _settle(failure, f"{member.spec.name} ended{during} ({how}); its last log lines say why")

    def _on_device_fault(self, member: Process) -> None:
        """Under MPS nobody else on the daemon can be trusted any more: all of them and the daemon begin anew."""
        for group in self._sharing.fault(member.spec.group) - {member.spec.group}:
            _settle(self._failures[group], f"{member.spec.name} had a CUDA fault under the same MPS daemon")

    async def _limit_start(self, members: list[Process], failure: asyncio.Future[str]) -> None:
        limit_s = self._config.supervision.start_timeout_s
        await asyncio.sleep(limit_s)
        late = [member.spec.name for member in members if member.capabilities is None]
        if late:
            _settle(failure, f"{', '.join(late)} not ready after {limit_s:g} s (--start-timeout-s)")

    def _take_down(self, member: Process, reason: str) -> None:
        """Its process is reaped: tell those who knew it, let go of its memory, keep its counts."""
        was_up, name, epoch = member.is_up, member.spec.name, member.epoch
        member.end("failed" if self._stop.is_set() else "restarting")
        self._memory.drop(name, epoch)
        self._asks.lose(name, epoch)
        Path(member.address.removeprefix("ipc://")).unlink(missing_ok=True)
        if was_up:
            for peer in self._table.told_about(member):
                self._send(peer, PeerDown(name, epoch))
        if not self._stop.is_set():
            self._observer.actor_down(name, epoch, reason)

    # ------------------------------------------------------------ what actors say

    def _take_report(self, sender: ActorName, epoch: Epoch, report: ActorReport) -> None:
        """Called from the event loop, which would only log an exception and leave the table half changed."""
        try:
            self._on_report(sender, epoch, report)
        except Exception as error:
            logger.exception("%s of %s could not be processed", type(report).__name__, sender)
            self._fail(f"internal error: {error!r}")

    def _on_report(self, sender: ActorName, epoch: Epoch, report: ActorReport) -> None:
        member = self._table.find(sender, epoch)
        if member is None:
            self._metrics.add("stale_messages_total")
            return
        match report:
            case Hello():
                member.said_hello = True
                member.last_heartbeat_s = time.monotonic()
                self._give_memory_turns()
            case Heartbeat():
                member.last_heartbeat_s = time.monotonic()
                member.loop_lag_ms = report.loop_lag_ms
                member.live_metrics = report.metrics
            case Progress():
                self._observer.progress(sender, report.stage, report.done, report.total)
            case StartFailed():
                _settle(self._failures[member.spec.group], report.message)
            case Ready():
                member.capabilities = report.capabilities
                if isinstance(report.capabilities, LlmReady):
                    self._num_kv_blocks = report.capabilities.num_blocks
                self._give_memory_turns()
                self._announce_if_complete(member.spec.group)
            case AdminAnswer():
                if not self._asks.take(sender, epoch, report):
                    self._metrics.add("stale_messages_total")
            case _:
                assert_never(report)

    def _announce_if_complete(self, group: str) -> None:
        """Link the group with everyone once all its members are ready."""
        members = [member for member in self._table if member.spec.group == group]
        if self._failures[group].done() or any(member.capabilities is None or member.is_up for member in members):
            return
        for member in members:
            member.is_up, member.state = True, "ready"
        for member in members:
            assert member.capabilities is not None
            for peer in self._table.told_about(member):
                self._send(peer, member.peer_up())
            for peer in self._table.peers_of(member):
                self._send(member, peer.peer_up())
            self._observer.actor_up(member.spec.name, member.epoch, member.capabilities)
        self._refresh_readiness()

    def _give_memory_turns(self) -> None:
        for rank in self._table.ranks_whose_turn_it_is(is_restart=self._num_kv_blocks is not None):
            rank.had_memory_turn = True
            self._send(rank, MemoryTurn(self._num_kv_blocks))

    def _send(self, member: Process, message: Message) -> None:
        """News that must arrive: an actor that cannot take it is ended."""
        if not self._control.send(member.spec.name, member.epoch, message):
            reason = f"{member.spec.name} does not read its control channel"
            failure = self._failures[member.spec.group]
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, _settle, failure, reason)  # its exit says more

    # ------------------------------------------------------------ time

    async def _tick(self) -> None:
        """Heartbeats, statuses and the sweeper's life, for as long as the service runs."""
        options = self._config.supervision
        period_s = min(options.heartbeat_s, _MAX_TICK_S)
        ticked_s = sent_s = time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            if (pause_s := now_s - ticked_s - period_s) > options.heartbeat_s:
                for member in self._table:  # we were stopped or starved ourselves: silence then says nothing
                    member.last_heartbeat_s += pause_s
            ticked_s = now_s
            self._check_heartbeats(now_s)
            if now_s - sent_s >= options.heartbeat_s - period_s / 2:
                sent_s = now_s
                self._send_status()
            if self._sweeper.poll() is not None and self.run_dir is not None:
                logger.warning("the sweeper is gone (exit code %d): starting another", self._sweeper.returncode)
                self._sweeper = _start_sweeper(self._lifeline_fd, self.run_dir)

    def _check_heartbeats(self, now_s: float) -> None:
        limit_s = self._config.supervision.heartbeat_timeout_s
        for member in self._table:
            if member.handle is not None and member.said_hello and now_s - member.last_heartbeat_s > limit_s:
                reason = f"{member.spec.name} sent no heartbeat for {limit_s:g} s (supervision.heartbeat_timeout_s)"
                _settle(self._failures[member.spec.group], reason)
                member.handle.kill()

    def _send_status(self) -> None:
        now_s = time.monotonic()
        draining = self._desk.draining
        status = self._table.status(now_s, self._is_ready, uptime_s=now_s - self._began_s, draining=draining)
        own = self._metrics.snapshot()
        if own.counters:
            status.metrics[SUPERVISOR] = own
        self._desk.update(status)
        for member in self._table:
            if member.is_up and member.spec.kind == "edge":
                self._control.send(member.spec.name, member.epoch, status)  # the next one makes up for a lost one

    def _refresh_readiness(self) -> None:
        """Tell edges and the observer at once when the service becomes ready or stops being so."""
        now_ready = self._table.all_up and not self._stop.is_set()
        if now_ready == self._is_ready:
            return
        self._is_ready = now_ready
        if now_ready:
            self._was_ready = True
            self._observer.ready(self.url, time.monotonic() - self._unready_since_s)
        else:
            self._unready_since_s = time.monotonic()
        self._send_status()

    # ------------------------------------------------------------ the end

    async def _end_in_order(self, lives: dict[str, asyncio.Task[None]]) -> None:
        """Edges first, so that open requests end while the rest still works; then everyone else."""
        self._refresh_readiness()
        grace_s = self._config.supervision.shutdown_grace_s
        if self._fatal is not None:
            grace_s = min(grace_s, _OTHERS_GRACE_S) if self._was_ready else 0.0
        edges = [member for member in self._table if member.spec.kind == "edge"]
        others = [member for member in self._table if member.spec.kind != "edge"]
        await self._end(edges, lives, grace_s)
        await self._end(others, lives, min(grace_s, _OTHERS_GRACE_S))

    async def _end(self, members: list[Process], lives: dict[str, asyncio.Task[None]], grace_s: float) -> None:
        """Ask these to end within grace_s, then kill those that did not."""
        for member in members:
            asked = member.capabilities is not None and grace_s > 0
            if asked:
                asked = self._control.send(member.spec.name, member.epoch, Shutdown(grace_s))
            if not asked and member.handle is not None:
                member.handle.kill()
        pending = {lives[member.spec.group] for member in members}
        if not pending:
            return
        now = asyncio.create_task(self._stop_now.wait())
        await _wait_all_or(pending, now, grace_s + _EXIT_MARGIN_S)
        now.cancel()
        for member in members:
            if member.handle is not None:
                member.handle.kill()
        _, stuck = await asyncio.wait(pending, timeout=_REAP_S)
        for life in stuck:
            life.cancel()

    async def _end_sweeper(self, lifeline_writer: int) -> None:
        """Let go of the pipe: the sweeper does its work at this end as at any other."""
        os.close(lifeline_writer)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._sweeper.wait, _SWEEPER_S)
            return
        self._sweeper.kill()
        self._sweeper.wait()


def _settle(failure: asyncio.Future[str], reason: str) -> None:
    if not failure.done():
        failure.set_result(reason)


async def _wait_all_or(tasks: Collection[asyncio.Task[None]], other: asyncio.Task[bool], timeout_s: float) -> None:
    """Until all tasks are done, or the other one is, or the time is up."""
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {*tasks}
    deadline_s = time.monotonic() + timeout_s
    while pending and not other.done() and (left_s := deadline_s - time.monotonic()) > 0:
        done, _ = await asyncio.wait({*pending, other}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        pending -= done


def _start_sweeper(lifeline_fd: int, run_dir: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that no Ctrl-C reaches it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", sweeper.__file__, str(lifeline_fd), str(run_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(lifeline_fd,),
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != RUN_DIR_VARIABLE},
        cwd="/",
    )

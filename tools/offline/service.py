"""The process that an LLM starts: the supervisor of `vlmrt launch`, on a private socket, reporting to its parent.

`python -m vlmrt.tools.offline.service REPORT_FD PARENT_PID [options of vlmrt launch]`.  It ends with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from msgspec import structs

from vlmrt.actors.models.config import CheckpointError
from vlmrt.runtime.config import Config
from vlmrt.runtime.control_messages import Capabilities
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.logs import set_up_logging
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.supervisor import Supervisor
from vlmrt.tools.cli import build_parser
from vlmrt.tools.devices import num_cuda_devices
from vlmrt.tools.launch import SUPERVISOR, build_config
from vlmrt.tools.offline.reports import Loading, Report, ServiceFailed, ServiceNews, ServiceReady, encode_report
from vlmrt.tools.vit_engines import build_engine_files

# One user, who waits for the end and knows what is sent: nothing here is refused or cut because others wait.
REQUEST_TIMEOUT_S = 30 * 24 * 3600.0
MAX_WAITING = 4096
MAX_BODY_MIB = 1024
MAX_MEDIA_MIB = 4096


class PipeReport:
    """An observer that writes a line of JSON for each piece of news; without effect once nobody reads."""

    def __init__(self, report_fd: int) -> None:
        os.set_blocking(report_fd, False)  # a parent that is stopped must not stop the service
        self._fd = report_fd
        self._max_num_seqs = 0

    def of(self, config: Config) -> PipeReport:
        self._max_num_seqs = config.scheduling.max_num_seqs
        return self

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        self._write(Loading(actor, stage, done, total))

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        pass

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        self._write(ServiceNews(f"{actor} is down: {reason}"))

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        self._write(ServiceNews(f"{actor} restarts"))

    def gpu_sharing(self, how: str) -> None:
        pass

    def ready(self, url: str, start_s: float) -> None:
        self._write(ServiceReady(url, self._max_num_seqs))

    def stopping(self, reason: str) -> None:
        pass

    def failed(self, message: str) -> None:
        self._write(ServiceFailed(message))

    def _write(self, report: Report) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._fd, encode_report(report) + b"\n")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status, as `vlmrt launch`."""
    report, parent_pid = PipeReport(int(arguments[0])), int(arguments[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the supervisor takes it
    with contextlib.suppress(OSError):
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not join the parent's output
    options = build_parser().parse_args(["launch", *arguments[2:]])  # of neither a file nor the environment
    set_up_logging(options.log_level, options.log_format, SUPERVISOR)
    try:
        config = private_config(build_config(options)[0])
        build_engine_files(config)
        return asyncio.run(_serve(config, report.of(config), parent_pid))
    except (StartupError, CheckpointError) as error:
        report.failed(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def private_config(config: Config) -> Config:
    """For a service with one user."""
    server = structs.replace(
        config.server,
        private_socket=True,
        request_timeout_s=REQUEST_TIMEOUT_S,
        max_body_mib=MAX_BODY_MIB,
        max_media_mib=MAX_MEDIA_MIB,
    )
    return structs.replace(
        config, server=server, scheduling=structs.replace(config.scheduling, max_waiting=MAX_WAITING)
    )


async def _serve(config: Config, report: PipeReport, parent_pid: int) -> int:
    supervisor = Supervisor(config, report, num_gpus=num_cuda_devices())

    def stop_at_once() -> None:
        loop.remove_reader(parent_fd)
        supervisor.request_stop("its parent ended")
        supervisor.request_stop()

    try:
        parent_fd = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        return 0
    loop = asyncio.get_running_loop()
    try:
        if os.getppid() != parent_pid:
            return 0
        loop.add_reader(parent_fd, stop_at_once)
        return await supervisor.run()
    finally:
        loop.remove_reader(parent_fd)
        os.close(parent_fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What `vlmrt launch` tells: stages and weight progress while it starts, one ready block, a line for each loss.

For a person that is lines on standard output, with bars on a terminal; with --log-format json it is log records.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import time

from vlmrt.actors.models.config import ModelConfig
from vlmrt.runtime.config import Config
from vlmrt.runtime.control_messages import Capabilities, LlmReady
from vlmrt.runtime.logs import LAUNCH_LOGGER
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.tools.loading_bars import LoadingBars, amount_text
from vlmrt.tools.ready_block import Started, example, place, ready_entries
from vlmrt.tools.terminal import console_for

logger = logging.getLogger(LAUNCH_LOGGER)


class LaunchReport:
    """An observer of the supervisor that writes for a person: bars on a terminal, plain lines in a pipe."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        self._config = config
        self._model = model
        self._started = Started(LlmReady(0))
        self._was_ready = False
        self._began_s = time.monotonic()
        self._console = console_for(sys.stdout)
        self._line(f"vlmrt: starting {config.model.served_names[0]} on {place(config)}")
        self._bars = LoadingBars(self._console)

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        self._bars.show(actor, stage, done, total)
        if not self._bars.shown and done in (0, total):
            self._line(f"  {actor}: {stage} {amount_text(stage, done, total)}")

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        if isinstance(capabilities, LlmReady):
            self._started = self._started._replace(llm=capabilities)
        self._line(f"  {actor} is up after {time.monotonic() - self._began_s:.1f} s")

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        self._line(f"vlmrt: {actor} is down: {reason}")

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        self._began_s = time.monotonic()
        self._line(f"vlmrt: {actor} restarts" + (f" in {delay_s:.1f} s" if delay_s else ""))

    def gpu_sharing(self, how: str) -> None:
        self._started = self._started._replace(gpu_sharing=how)
        if self._was_ready:
            self._line(f"vlmrt: GPU sharing set up anew: {how}")

    def ready(self, url: str, start_s: float) -> None:
        self._bars.stop()
        if self._was_ready:
            self._line(f"vlmrt: ready again after {start_s:.1f} s")
            return
        self._was_ready = True
        entries = ready_entries(self._config, self._model, url, self._started)
        self._line("")
        self._line(f"  vlmrt is ready at {url}  (after {start_s:.1f} s)")
        for label, text in entries:
            self._line(self._wrapped(f"  {label:<10} ", text))
        for line in ("", "  Try it:", "", example(self._config, url), ""):
            self._line(line)

    def stopping(self, reason: str) -> None:
        self._bars.stop()
        self._line(f"vlmrt: stopping: {reason}")

    def failed(self, message: str) -> None:
        self._bars.stop()
        print(f"vlmrt: error: {message}", file=sys.stderr, flush=True)

    def _wrapped(self, label: str, text: str) -> str:
        """Below its own beginning where a terminal would break it anywhere; in a pipe a line is a line."""
        if not self._console.is_terminal:
            return label + text
        width, indent = max(40, self._console.width - 1), " " * len(label)
        return textwrap.fill(
            text, width, initial_indent=label, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._console.file.flush()


class LoggedReport:
    """An observer of the supervisor that writes for a collector: log records, whatever --log-level says."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        self._config = config
        self._model = model
        self._started = Started(LlmReady(0))
        self._was_ready = False
        logger.info("starting %s on %s", config.model.served_names[0], place(config))

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        if done in (0, total):
            logger.info("%s: %s %s", actor, stage, amount_text(stage, done, total))

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        if isinstance(capabilities, LlmReady):
            self._started = self._started._replace(llm=capabilities)
        logger.info("%s is up", actor)

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        logger.warning("%s is down: %s", actor, reason)

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        logger.info("%s restarts in %.1f s", actor, delay_s)

    def gpu_sharing(self, how: str) -> None:
        self._started = self._started._replace(gpu_sharing=how)
        logger.info("GPU sharing: %s", how)

    def ready(self, url: str, start_s: float) -> None:
        fields: dict[str, object] = {"url": url, "start_s": round(start_s, 3)}
        if not self._was_ready:
            entries = ready_entries(self._config, self._model, url, self._started)
            fields["ready"] = {label: text for label, text in entries if label not in ("note", "warning")}
            for label, text in entries:
                if label in ("note", "warning"):
                    logger.log(logging.WARNING if label == "warning" else logging.INFO, "%s", text)
        self._was_ready = True
        logger.info("ready at %s after %.1f s", url, start_s, extra={"fields": fields})

    def stopping(self, reason: str) -> None:
        logger.info("stopping: %s", reason)

    def failed(self, message: str) -> None:
        logger.error("%s", message)

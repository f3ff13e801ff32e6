"""What every process logs, on standard error: lines for a person, or one JSON object a line for a collector.

A record may bring `extra={"request_id": ..., "fields": {...}}`: the first is shown behind the message, the second only
in JSON, where its entries stand beside the others.  The id is given with each record and never kept in the context of a
task, from which a task that outlives the request would inherit it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from vlmrt.runtime.config import LogFormat

ACCESS_LOGGER = "vlmrt.access"  # a line for each request, where --log-requests asks for it
LAUNCH_LOGGER = "vlmrt.launch"  # what a launch tells, where it is no lines for a person
_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


def set_up_logging(level: str, log_format: LogFormat, actor: str, epoch: int = 0) -> None:
    """All of this process's log records from here on, as of this actor; Python's warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(actor, epoch))
    else:
        handler.setFormatter(TextFormatter(actor, in_colour=wants_colour(sys.stderr, os.environ)))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    for name in (ACCESS_LOGGER, LAUNCH_LOGGER):
        logging.getLogger(name).setLevel(logging.INFO)  # each asked for by an option of its own


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """NO_COLOR says no, FORCE_COLOR yes, and without either a terminal that can."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environment.get("TERM", "dumb") != "dumb"


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 WARNING vit:0: message [request id]`."""

    def __init__(self, actor: str, *, in_colour: bool) -> None:
        super().__init__("%(asctime)s %(shown_level)s %(actor)s: %(message)s%(of_request)s")
        self._actor = actor
        self._in_colour = in_colour

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        colour = _COLOURS.get(record.levelname) if self._in_colour else None
        record.actor = self._actor
        record.shown_level = f"\x1b[{colour}m{record.levelname}\x1b[0m" if colour else record.levelname
        record.of_request = f" [{request_id}]" if request_id else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object: time (UTC), level, logger, actor, epoch, message; request_id and exception where there are any."""

    def __init__(self, actor: str, epoch: int) -> None:
        super().__init__()
        self._actor = actor
        self._epoch = epoch

    def format(self, record: logging.LogRecord) -> str:
        line = log_object(self._actor, self._epoch, record.levelname, record.name, record.getMessage(), record.created)
        line |= getattr(record, "fields", {})
        if request_id := getattr(record, "request_id", ""):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: a file name may hold what UTF-8 cannot say


def log_object(
    actor: str, epoch: int, level: str, logger: str, message: str, created_s: float | None = None
) -> dict[str, Any]:
    """What every JSON line has.  created_s: of the wall clock; None: now."""
    created_s = time.time() if created_s is None else created_s
    whole_s, ms = divmod(int(created_s * 1000), 1000)
    return {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole_s))}.{ms:03d}Z",
        "level": level.lower(),
        "logger": logger,
        "actor": actor,
        "epoch": epoch,
        "message": message,
    }

"""With --log-requests, a log line for each request: how it ended, tokens and times, and nothing of its text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from vlmrt.actors.edge.error_answers import LABEL
from vlmrt.actors.edge.generation import Answer
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.logs import ACCESS_LOGGER

ANSWER = web.RequestKey("answer", Answer)  # what runs for the request, once it does
BROKEN = web.RequestKey("broken", str)  # the code of the error that it got, also in a stream that had begun
GONE = 499  # the client went before the end
MAX_PATH = 200
PROBES = ("/health", "/health/live", "/health/ready", "/ping", "/metrics")  # asked every few seconds: told if they fail

logger = logging.getLogger(ACCESS_LOGGER)


class AccessLine:
    def __init__(self) -> None:
        self.status = GONE


class AccessLog:
    def __init__(self, server: ServerOptions) -> None:
        self._is_on = server.log_requests

    @contextmanager
    def line(self, request: web.Request) -> Iterator[AccessLine]:
        """Logged at the end of the block, however it ends."""
        line, began_s = AccessLine(), time.monotonic()
        try:
            yield line
        finally:
            if self._is_on and not (request.path in PROBES and line.status == 200):
                _log(request, line.status, time.monotonic() - began_s)


def _log(request: web.Request, status: int, total_s: float) -> None:
    path = request.rel_url.raw_path[:MAX_PATH]  # still quoted: no line break of a client's gets into the log
    words = [f"{request.method[:20]} {path} {status} after {total_s:.3f} s"]
    fields: dict[str, object] = {
        "client": request.remote or "",
        "method": request.method[:20],
        "path": path,
        "status": status,
        "total_s": round(total_s, 6),
    }
    if BROKEN in request:
        fields["error"] = request[BROKEN]
        words.append(request[BROKEN])
    if ANSWER in request:
        answer = request[ANSWER]
        usage, first_s = answer.usage, answer.time_to_first_token_s
        fields |= {
            "answer_id": answer.answer_id,
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
        }
        if first_s is not None:
            fields["ttft_s"] = round(first_s, 6)
            words.append(f"first token after {first_s:.3f} s")
        words += [f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} output tokens", answer.answer_id]
    client = request.remote or "-"
    logger.info("%s %s", client, ", ".join(words), extra={"request_id": request[LABEL], "fields": fields})

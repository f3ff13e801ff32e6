"""`vlmrt generate`: a file of requests, or one question, answered by an engine that lives as long as the command."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlmrt.runtime.errors import RequestError, VlmrtError
from vlmrt.tools.offline.client import CHAT_PATH, COMPLETIONS_PATH, Client, Request, Result
from vlmrt.tools.offline.engine import Engine
from vlmrt.tools.offline.messages import PictureStore
from vlmrt.tools.offline.options import command_line, engine_options
from vlmrt.tools.offline.outputs import decode_answer
from vlmrt.tools.offline.progress import BatchProgress
from vlmrt.tools.offline.request_lines import Line, Written, answered_id, read_line, write_line
from vlmrt.tools.offline.sampling_params import SamplingParams

_SAMPLING = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "logprobs",
    "ignore_eos",
)
_READ_BYTES = 1 << 20
_MAX_LINES_AHEAD = 4096  # read and not written yet, where the order is kept
_MAX_SHOWN_IGNORED = 5


class UsageError(Exception):
    """The command line cannot be right."""


def generate(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0 all answered, 1 a failed request or start, 2 usage, 130 interrupted."""
    try:
        params = sampling_params(arguments)
        if arguments.prompt is not None:
            return _question(arguments, params)
        return _file(arguments, params)
    except UsageError as error:
        print(f"vlmrt generate: error: {error}", file=sys.stderr)
        return 2
    except (VlmrtError, OSError) as error:
        print(f"vlmrt: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    given = {name: getattr(arguments, name) for name in _SAMPLING}
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UsageError(error) from None


def _engine(arguments: argparse.Namespace) -> Engine:
    words = command_line(arguments.model, engine_options(arguments))
    return Engine(words, show_loading=not arguments.no_progress)


# ---------------------------------------------------------------- one question


def _question(arguments: argparse.Namespace, params: SamplingParams) -> int:
    for image in arguments.image:
        if not Path(image).is_file():
            raise UsageError(f"--image {image}: no such file")
    content = [
        *({"type": "image", "image": Path(image)} for image in arguments.image),
        {"type": "text", "text": arguments.prompt},
    ]
    messages = PictureStore().messages([{"role": "user", "content": content}], "messages")
    fields = {**params.fields(chat=True), "messages": messages, "return_token_ids": True}
    request = Request(CHAT_PATH, fields, params.n)
    with closing(_engine(arguments)) as engine:
        result = engine.call(lambda client: client.answer(request))
    if isinstance(result, RequestError):
        raise result
    if arguments.output == "-":
        for choice in decode_answer(result.body).outputs:
            print(choice.text)
    else:
        Path(arguments.output).write_bytes(write_line(Line("prompt", False, request), result).line)
    return 0


# ---------------------------------------------------------------- a file


def _file(arguments: argparse.Namespace, params: SamplingParams) -> int:
    if arguments.image:
        raise UsageError("--image goes with --prompt; requests of a file hold their own pictures")
    defaults = {CHAT_PATH: params.fields(chat=True), COMPLETIONS_PATH: params.fields(chat=False)}
    with _open_input(arguments.input) as source:
        output, answered = open_output(arguments)
        with (
            output,
            closing(_engine(arguments)) as engine,
            BatchProgress(None, shown=not arguments.no_progress) as progress,
        ):
            run = FileRun(source, output, answered, defaults, progress, in_order=not arguments.unordered)
            try:
                engine.call(run.work)
            finally:
                _report(run, progress)
    return 1 if run.num_failed else 0


def _open_input(name: str) -> BinaryIO:
    if name == "-":
        return open(0, "rb", buffering=0, closefd=False)
    try:
        return open(name, "rb", buffering=0)
    except OSError as error:
        raise UsageError(f"--input {name}: {error.strerror}") from None


def open_output(arguments: argparse.Namespace) -> tuple[BinaryIO, set[str]]:
    """The file, behind what stays of it; and the ids of the requests that it answers already."""
    name = arguments.output
    if name == "-":
        return open(1, "wb", closefd=False), set()
    try:
        if arguments.input != "-" and os.path.exists(name) and os.path.samefile(name, arguments.input):
            raise UsageError(f"--output {name}: the same file as --input")
        kept, answered = _answers(Path(name))
        if kept is not None:
            new = Path(f"{name}.new")
            new.write_bytes(kept)
            new.replace(name)
        return open(name, "ab"), answered
    except OSError as error:
        raise UsageError(f"--output {name}: {error.strerror}") from None


def _answers(path: Path) -> tuple[bytes | None, set[str]]:
    """(what to keep of the file, None for all of it; the ids that it answers).

    Failures are tried again, and a last line without its end was cut when an earlier run was ended.
    """
    if not path.exists():
        return None, set()
    kept: list[bytes] = []
    answered: set[str] = set()
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            custom_id = answered_id(line)
        except ValueError as error:
            raise UsageError(f"--output {path}: line {number} is not an answer of this command: {error}") from None
        if custom_id is not None:
            kept.append(line)
            answered.add(custom_id)
    return (None if len(kept) == len(lines) else b"".join(kept)), answered


def _report(run: FileRun, progress: BatchProgress) -> None:
    skipped = f", {run.num_skipped} answered before" if run.num_skipped else ""
    print(
        f"vlmrt: {progress.num_done} requests, {run.num_failed} failed{skipped}; {progress.elapsed_s:.1f} s, "
        f"{progress.rates()}",
        file=sys.stderr,
    )
    if run.ignored:
        shown = ", ".join(sorted(run.ignored)[:_MAX_SHOWN_IGNORED])
        print(f"vlmrt: warning: fields without effect: {shown}", file=sys.stderr)


class FileRun:
    """The lines of one file, from reading to writing."""

    def __init__(
        self,
        source: BinaryIO,
        output: BinaryIO,
        answered: set[str],
        defaults: dict[str, dict[str, Any]],
        progress: BatchProgress,
        *,
        in_order: bool,
    ) -> None:
        self._source = source
        self._output = output
        self._answered = answered
        self._defaults = defaults
        self._progress = progress
        self._in_order = in_order
        self._open: dict[int, Line] = {}  # sent and not answered
        self._ready: dict[int, Written] = {}  # waiting for an earlier one to be written
        self._next = 0
        self._room = asyncio.Semaphore(_MAX_LINES_AHEAD)
        self.num_failed = 0
        self.num_skipped = 0
        self.ignored: set[str] = set()

    async def work(self, client: Client) -> None:
        await client.answer_all(self._requests(), self._deliver)

    async def _requests(self) -> AsyncIterator[Request | RequestError]:
        index = 0
        async for number, text in _numbered_lines(self._source):
            line = read_line(text, number, self._defaults)
            if line.custom_id in self._answered:
                self.num_skipped += 1
                continue
            await self._room.acquire()
            self._open[index] = line
            index += 1
            yield line.request

    def _deliver(self, index: int, result: Result) -> None:
        if not isinstance(result, RequestError) and result.ignored_fields:
            self.ignored.update(result.ignored_fields.split(","))
        written = write_line(self._open.pop(index), result)
        self.num_failed += written.failed
        self._progress.done(written.num_tokens)
        if not self._in_order:
            self._write(written)
            return
        self._ready[index] = written
        while self._next in self._ready:
            self._write(self._ready.pop(self._next))
            self._next += 1

    def _write(self, written: Written) -> None:
        self._output.write(written.line)
        self._output.flush()
        self._room.release()


class _Chunk(NamedTuple):
    data: bytes  # empty: the end
    error: OSError | None = None


async def _numbered_lines(source: BinaryIO) -> AsyncIterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1; read in a thread, since a pipe may be slow.

    The thread is a daemon that reads the bare descriptor: a read that never returns keeps nobody from leaving.
    Raises: OSError.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[_Chunk] = asyncio.Queue(maxsize=4)

    def read() -> None:
        chunk = _Chunk(b"-")
        while chunk.data:
            try:
                chunk = _Chunk(source.read(_READ_BYTES) or b"")
            except OSError as error:
                chunk = _Chunk(b"", error)
            try:
                asyncio.run_coroutine_threadsafe(chunks.put(chunk), loop).result()
            except RuntimeError:  # the loop is gone
                return

    threading.Thread(target=read, name="vlmrt-input", daemon=True).start()
    number = 0
    pieces: list[bytes] = []  # of the line whose end has not come
    while True:
        chunk = await chunks.get()
        if chunk.error is not None:
            raise chunk.error
        first, *others = chunk.data.split(b"\n") if chunk.data else (b"", b"")
        pieces.append(first)
        if not others:
            continue
        *whole, last = [b"".join(pieces), *others]
        pieces = [last]
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        if not chunk.data:
            return

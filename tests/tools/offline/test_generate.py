"""`vlmrt generate`: lines in, lines out, in order or not, and what a second run does again."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from tests.tools.offline.fake_service import completion
from vlmrt.runtime.errors import RequestError
from vlmrt.tools.cli import build_parser, main
from vlmrt.tools.offline.client import CHAT_PATH, COMPLETIONS_PATH, Answered, Client, Request, Result
from vlmrt.tools.offline.generate import FileRun, UsageError, open_output
from vlmrt.tools.offline.progress import BatchProgress
from vlmrt.tools.offline.request_lines import answered_id, read_line, write_line

DEFAULTS: dict[str, dict[str, Any]] = {CHAT_PATH: {"temperature": 0.5, "seed": 1}, COMPLETIONS_PATH: {"max_tokens": 9}}
MESSAGES = [{"role": "user", "content": "hello"}]


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def answered(text: str = "Hi.") -> Answered:
    return Answered(json.dumps(completion(text)).encode())


def test_a_plain_line_is_a_request_with_the_defaults_that_it_does_not_replace() -> None:
    chat = read_line(line(messages=MESSAGES, seed=2, n=3), 7, DEFAULTS)
    assert chat.custom_id == "line-7"
    assert chat.request == Request(CHAT_PATH, {"temperature": 0.5, "seed": 2, "messages": MESSAGES, "n": 3}, 3)
    completion = read_line(line(prompt="once", custom_id="c"), 8, DEFAULTS)
    assert completion.custom_id == "c"
    assert completion.request == Request(COMPLETIONS_PATH, {"max_tokens": 9, "prompt": "once"})


def test_a_line_of_an_openai_batch_is_a_request() -> None:
    body = {"model": "m", "messages": MESSAGES}
    read = read_line(line(custom_id="r1", method="POST", url=CHAT_PATH, body=body), 1, DEFAULTS)
    assert (read.custom_id, read.is_batch) == ("r1", True)
    assert read.request == Request(CHAT_PATH, {**DEFAULTS[CHAT_PATH], **body})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"no json", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{}", "exactly one of messages, prompt and body"),
        (line(messages=MESSAGES, prompt="x"), "exactly one of"),
        (line(url="/v1/embeddings", body={}), "POST and one of"),
        (line(method="GET", url=CHAT_PATH, body={}), "POST and one of"),
        (line(url=CHAT_PATH, body=[]), "body is not an object"),
        (line(messages=MESSAGES, stream=True), "stream = true"),
        (line(messages=MESSAGES, custom_id=3), "custom_id is not a string"),
    ],
)
def test_a_wrong_line_is_a_failure_of_its_own(text: bytes, message: str) -> None:
    read = read_line(text, 1, DEFAULTS)
    assert isinstance(read.request, RequestError)
    assert message in read.request.message
    written = write_line(read, read.request)
    assert written.failed
    assert answered_id(written.line) is None


def test_answers_have_the_form_of_their_requests() -> None:
    plain = read_line(line(messages=MESSAGES, custom_id="p"), 1, DEFAULTS)
    batch = read_line(line(custom_id="b", url=CHAT_PATH, body={"messages": MESSAGES}), 2, DEFAULTS)
    plain_line, batch_line = write_line(plain, answered()), write_line(batch, answered())
    assert json.loads(plain_line.line) == {
        "custom_id": "p",
        "outputs": [{"index": 0, "text": "Hi.", "finish_reason": "stop", "token_ids": [7, 8]}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert (plain_line.num_tokens, plain_line.failed) == (2, False)
    body = json.loads(batch_line.line)
    assert body["response"] == {"status_code": 200, "request_id": "chatcmpl-fake", "body": completion("Hi.")}
    assert (body["custom_id"], body["error"]) == ("b", None)
    refused = json.loads(write_line(batch, RequestError("no", status=404, code="c", param="p")).line)
    assert refused["response"]["status_code"] == 404
    assert refused["response"]["body"]["error"]["param"] == "p"
    assert refused["error"] == {"code": "c", "message": "no"}
    refused = json.loads(write_line(plain, RequestError("no", status=404, code="c", param="p")).line)
    assert refused == {
        "custom_id": "p",
        "error": {"message": "no", "type": "not_found_error", "param": "p", "code": "c"},
    }


class ShuffledClient:
    """Answers everything it is given once the last request came, in this order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    async def answer_all(
        self, requests: AsyncIterator[Request | RequestError], deliver: Callable[[int, Result], None]
    ) -> None:
        taken = [one async for one in requests]
        for index in self._order:
            request = taken[index]
            deliver(index, request if isinstance(request, RequestError) else answered(f"{index}"))


async def run(
    source: BinaryIO, order: Sequence[int], *, in_order: bool, known: frozenset[str] = frozenset()
) -> tuple[FileRun, list[Any]]:
    output = io.BytesIO()
    progress = BatchProgress(None, shown=False)
    running = FileRun(source, output, set(known), DEFAULTS, progress, in_order=in_order)
    await running.work(cast(Client, ShuffledClient(order)))
    return running, [json.loads(line) for line in output.getvalue().splitlines()]


INPUT = b"\n".join([line(messages=MESSAGES), b"", b"broken", line(messages=MESSAGES), line(messages=MESSAGES)])


async def test_answers_are_written_in_the_order_of_the_input() -> None:
    running, lines = await run(io.BytesIO(INPUT), [3, 0, 2, 1], in_order=True)
    assert [one["custom_id"] for one in lines] == ["line-1", "line-3", "line-4", "line-5"]
    assert [one["outputs"][0]["text"] for one in lines if "outputs" in one] == ["0", "2", "3"]
    assert running.num_failed == 1


async def test_answers_may_be_written_as_they_come() -> None:
    _, lines = await run(io.BytesIO(INPUT), [3, 0, 2, 1], in_order=False)
    assert [one["custom_id"] for one in lines] == ["line-5", "line-1", "line-4", "line-3"]


async def test_what_was_answered_before_is_skipped() -> None:
    running, lines = await run(io.BytesIO(INPUT), [1, 0], in_order=True, known=frozenset({"line-1", "line-4"}))
    assert [one["custom_id"] for one in lines] == ["line-3", "line-5"]
    assert running.num_skipped == 2


async def test_lines_longer_than_a_read_and_lines_cut_anywhere_come_whole() -> None:
    reader_fd, writer_fd = os.pipe()
    long = line(messages=[{"role": "user", "content": "x" * 200_000}])

    def write() -> None:
        with open(writer_fd, "wb", buffering=0) as writer:
            for piece in (long[:7], long[7:], b"\n" + long + b"\n" + long):
                writer.write(piece)

    with io.FileIO(reader_fd) as reader:
        _, written = await asyncio.gather(
            asyncio.to_thread(write), run(cast(BinaryIO, reader), [0, 1, 2], in_order=True)
        )
    assert [one["custom_id"] for one in written[1]] == ["line-1", "line-2", "line-3"]
    assert all("outputs" in one for one in written[1])


def output_of(path: Path) -> tuple[bytes, set[str]]:
    arguments = build_parser().parse_args(["generate", "--input", "-", "--output", str(path)])
    output, known = open_output(arguments)
    output.write(b"new\n")
    output.close()
    return path.read_bytes(), known


def test_a_second_run_keeps_answers_and_does_failures_and_cut_lines_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert output_of(path) == (b"new\n", set())
    good = b'{"custom_id":"a","outputs":[]}\n', b'{"custom_id":"b","response":{},"error":null}\n'
    path.write_bytes(good[0] + b'{"custom_id":"c","error":{"message":"no"}}\n' + good[1] + b'{"custom_id":"d","outp')
    assert output_of(path) == (good[0] + good[1] + b"new\n", {"a", "b"})
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(b"My thesis.\n")
    with pytest.raises(UsageError, match=r"thesis.txt: line 1 is not an answer"):
        output_of(path)
    assert path.read_bytes() == b"My thesis.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "/no/such/file"], "--input /no/such/file: No such file"),
        (["--input", "IN", "--output", "IN"], "the same file as --input"),
        (["--input", "IN", "--output", "/no/such/folder/out"], "--output /no/such/folder/out: No such file"),
        (["--input", "IN", "--image", "a.png"], "--image goes with --prompt"),
        (["--prompt", "x", "--image", "/no/such.png"], "--image /no/such.png: no such file"),
        (["--prompt", "x", "--temperature", "3"], "temperature = 3.0 is not within 0..2"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    assert main(["generate", *(str(tmp_path / "in.jsonl") if word == "IN" else word for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_bytes() == INPUT


@pytest.mark.parametrize("words", [[], ["--prompt", "x", "--input", "y"], ["--prompt", "x", "--tp", "0"]])
def test_the_parser_ends_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", *words])
    assert ended.value.code == 2

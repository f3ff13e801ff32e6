"""LLM and `vlmrt generate` with the demo model: the actors of a server, without a server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.pictures import noise
from tests.system.server import SHARED_MEMORY, Server, left_over
from vlmrt import LLM, BatchError, RequestError, SamplingParams, StartupError

SHAPES = Path(__file__).parents[2] / "docs" / "shapes.png"
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def about(image: object, question: str = "Describe the image.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Nothing may be left of it: no process, no socket, no shared memory."""
    shared_before = set(SHARED_MEMORY.iterdir())
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as root:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", root)
            patch.setenv("XDG_RUNTIME_DIR", "")
            patch.setenv("VLMRT_API_KEY", "of-another-server")
            llm = LLM(max_num_seqs=8, show_loading=False)
        with llm:
            processes = psutil.Process(llm._engine.pid).children(recursive=True)
            assert {"edge", "llm", "vit"} <= {name.partition("-")[0] for name in names(processes)}
            assert [connection for process in processes for connection in process.net_connections("inet")] == []
            yield llm
        assert left_over(processes) == []
        assert list(Path(root).iterdir()) == []
    assert set(SHARED_MEMORY.iterdir()) <= shared_before


def names(processes: list[psutil.Process]) -> list[str]:
    return [Path(process.cmdline()[-1]).name for process in processes]


def test_pictures_in_every_form_get_the_answer_of_a_server(llm: LLM, demo_server: Server) -> None:
    data = SHAPES.read_bytes()
    forms: list[object] = [SHAPES, str(SHAPES), data, Image.open(SHAPES), Image.open(SHAPES).convert("RGBA")]
    outputs = llm.chat([about(form) for form in forms], GREEDY, use_tqdm=False)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = demo_server.chat([part, {"type": "text", "text": "Describe the image."}], temperature=0, max_tokens=16)
    assert {output.outputs[0].text for output in outputs} == {answer.choices[0].message.content}
    assert {len(output.prompt_token_ids) for output in outputs} == {answer.usage.prompt_tokens}
    assert all(len(output.outputs[0].token_ids) == 16 for output in outputs)
    assert all(output.outputs[0].finish_reason == "length" and output.finished for output in outputs)


def test_answers_come_in_the_order_of_the_questions_and_the_same_alone_or_together(llm: LLM) -> None:
    conversations = [about(noise(40 + index, 40, index), "How many shapes?") for index in range(12)]
    conversations += [said(f"What is {index}?") for index in range(28)]
    params = [SamplingParams(temperature=1, seed=index, max_tokens=4 + index % 9) for index in range(40)]
    together = llm.chat(conversations, params, use_tqdm=False)
    for index in (0, 7, 11, 25, 39):
        (alone,) = llm.chat(conversations[index], params[index], use_tqdm=False)
        assert alone.outputs[0].token_ids == together[index].outputs[0].token_ids
        assert alone.prompt_token_ids == together[index].prompt_token_ids


def test_raw_prompts_are_continued_as_the_chat_template_would_have_them(llm: LLM) -> None:
    (chat,) = llm.chat(said("What can you do?"), GREEDY, use_tqdm=False)
    prompts: list[Any] = ["The red", {"prompt": "The red"}, {"prompt_token_ids": chat.prompt_token_ids}]
    first, same, raw = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert first.prompt == same.prompt == "The red"
    assert first.outputs[0].token_ids == same.outputs[0].token_ids
    assert raw.prompt is None
    assert raw.prompt_token_ids == chat.prompt_token_ids
    assert raw.outputs[0] == chat.outputs[0]
    (unlimited,) = llm.generate("What can you do?", SamplingParams(temperature=0, stop_token_ids=[13]), use_tqdm=False)
    assert unlimited.outputs[0].finish_reason == "stop"


def test_several_answers_to_one_question_come_by_their_index(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=2, seed=5, max_tokens=8, stop=["zzz"])
    (output,) = llm.chat(said("Hello"), params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({choice.token_ids for choice in output.outputs}) > 1
    again = llm.chat([said("Hello")] * 2, params, use_tqdm=False)
    assert [one.outputs for one in again] == [output.outputs] * 2


def test_a_large_picture_is_sent_once_and_known_by_name_afterwards(llm: LLM) -> None:
    image = noise(640, 480, 5)
    first = llm.chat(about(image), GREEDY, use_tqdm=False)
    again = llm.chat([about(image) for _ in range(10)], GREEDY, use_tqdm=False)
    assert {output.outputs[0].token_ids for output in again} == {first[0].outputs[0].token_ids}
    assert all(output.num_cached_tokens > 0 for output in again)


def test_failed_requests_are_told_at_the_end_with_their_place(llm: LLM) -> None:
    conversations = [said("Hello"), about(b"no picture"), said("Hello")]
    with pytest.raises(BatchError, match="request 1 of 3 failed") as raised:
        llm.chat(conversations, GREEDY, use_tqdm=False)
    assert list(raised.value.failures) == [1]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False, return_exceptions=True)
    assert isinstance(outputs[1], RequestError)
    assert outputs[1].status == 400
    assert not isinstance(outputs[0], RequestError)
    assert not isinstance(outputs[2], RequestError)
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids


def test_a_field_that_nobody_knows_is_an_error(llm: LLM) -> None:
    with pytest.raises(BatchError, match="colour: not known"):
        llm.chat(said("Hello"), GREEDY, use_tqdm=False, extra_body={"colour": "red"})


def test_wrong_arguments_are_refused_before_anything_is_sent(llm: LLM) -> None:
    wrong: Any = [said("Hello"), "Hello"]
    with pytest.raises(TypeError, match=r"messages\[1\]"):
        llm.chat(wrong, GREEDY)
    wrong = "Hello"
    with pytest.raises(TypeError, match="messages is str"):
        llm.chat(wrong, GREEDY)
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 requests"):
        llm.chat([said("a"), said("b")], [GREEDY])
    with pytest.raises(ValueError, match="use chat"):
        llm.generate({"prompt": "x", "multi_modal_data": {"image": noise(8, 8, 1)}})
    with pytest.raises(TypeError, match="cannot be pickled"):
        __import__("copy").copy(llm)
    assert llm.chat([], GREEDY) == []


def test_it_may_be_used_inside_a_running_event_loop(llm: LLM) -> None:
    async def main() -> str:
        return llm.chat(said("Hello"), GREEDY, use_tqdm=False)[0].outputs[0].text

    assert asyncio.run(main())


def test_a_killed_actor_is_restarted_and_the_batch_goes_on(llm: LLM) -> None:
    processes = psutil.Process(llm._engine.pid).children(recursive=True)
    (edge,) = (process for process, name in zip(processes, names(processes), strict=True) if name.startswith("edge"))
    edge.kill()
    outputs = llm.chat([said(f"What is {index}?") for index in range(6)], GREEDY, use_tqdm=False)
    assert len(outputs) == 6


def test_a_start_that_cannot_be_says_why_in_one_line() -> None:
    with pytest.raises(StartupError, match=r"^--max-model-len 99999999: the model's max_position_embeddings"):
        LLM(max_model_len=99999999)


PROGRAM = """
import os, signal, sys
from vlmrt import LLM, SamplingParams, EngineDeadError
llm = LLM(max_num_seqs=2)
print(llm._engine.pid, flush=True)
if sys.argv[1] == "engine dies":
    import threading
    threading.Timer(0.5, os.kill, (llm._engine.pid, signal.SIGKILL)).start()
    try:
        llm.chat([[{"role": "user", "content": "Hello"}]] * 4, SamplingParams(ignore_eos=True))
    except EngineDeadError as error:
        print(error)
elif sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "engine dies"])
def test_nothing_is_left_however_the_program_ends(how: str, run_root: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(run_root), "XDG_RUNTIME_DIR": ""}
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True, env=environment)
    assert program.stdout is not None
    with program.stdout:
        supervisor = psutil.Process(int(program.stdout.readline()))
        assert supervisor.name()
        said = program.stdout.read()
    program.wait(60)
    assert ("the engine is gone: its process ended with exit code -9" in said) == (how == "engine dies")
    psutil.wait_procs([supervisor], timeout=30)
    deadline_s = time.monotonic() + 30
    while list(run_root.iterdir()):  # the sweeper's, where the supervisor was killed
        assert time.monotonic() < deadline_s, list(run_root.iterdir())
        time.sleep(0.05)
    marked = [process for process in psutil.process_iter() if str(run_root) in environment_of(process)]
    assert left_over(marked) == []


def environment_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("VLMRT_RUN_DIR", ""))
    except psutil.Error:
        return ""


def generate(*words: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vlmrt.tools.cli", "generate", "--max-num-seqs", "4", *words]
    return subprocess.run(command, input=text, capture_output=True, timeout=100, check=False)


def test_generate_answers_a_file_and_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    lines = [
        *(json.dumps({"custom_id": f"q{index}", "messages": said(f"What is {index}?")}) for index in range(12)),
        json.dumps({"custom_id": "wrong", "messages": said("Hello"), "temperature": 9}),
        json.dumps(
            {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": said("Hi")}}
        ),
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    output.write_text(json.dumps({"custom_id": "q3", "outputs": []}) + "\n" + '{"custom_id": "q4", "outp')
    done = generate("--input", str(source), "--output", str(output), "--temperature", "0", "--max-tokens", "5")
    assert done.returncode == 1, done.stderr.decode()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [f"q{index}" for index in range(12) if index != 3]
    assert [answer["custom_id"] for answer in answers] == ["q3", *asked, "wrong", "b"]
    assert all(answer["usage"]["completion_tokens"] <= 5 for answer in answers[1:-2])
    assert answers[-2]["error"]["param"] == "temperature"
    assert answers[-1]["response"]["body"]["object"] == "chat.completion"
    assert b"13 requests, 1 failed, 1 answered before" in done.stderr


def test_generate_answers_one_question_about_a_picture() -> None:
    done = generate("--prompt", "Describe the image.", "--image", str(SHAPES), "--temperature", "0", "--n", "1")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("There are three shapes")
    assert done.stderr == b""

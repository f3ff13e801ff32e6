"""Starting an edge and a media worker: without torch, with clear errors, with the configured defaults."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from tests.actors.edge.running import edge_config, running_edge
from tests.support import FakeContext
from vlmrt.actors.edge.actor import EdgeActor
from vlmrt.actors.edge.chat_request import parse_chat_request
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.models.config import GenerationDefaults
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import StopRule
from vlmrt.tools.checkpoint import make_checkpoint

HELLO = [{"role": "user", "content": "Hello"}]

PROGRAM = """
import sys
for name in ("torch", "transformers"{more}):
    sys.modules[name] = None
import asyncio, socket, pathlib, typing
from tests.support import FakeContext, make_config, peer_up
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import ActorName, Decode, Epoch, MmHash
{imports}

async def main():
    directory = pathlib.Path(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0))
    async with FakeContext("{actor}:0", directory, make_config(directory), listen_socket=listener) as context:
{run}
    listener.close()

asyncio.run(main())
print("loaded", *sorted(sys.modules))
"""
EDGE = """
        actor = EdgeActor(context)
        print(await actor.start())
        await actor.stop(0.0)
"""
MEDIA = """
        actor = MediaActor(context)
        print(await actor.start())
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        await actor.handle(Decode(MmHash("a"), b"broken", (1, 1), (28, 28), Epoch(1)), ActorName("edge:0"))
        print((await context.outbox.next()).message)
        await actor.stop(0.0)
"""


@pytest.mark.parametrize(
    ("actor", "imports", "run", "more"),
    [
        ("edge", "from vlmrt.actors.edge.actor import EdgeActor", EDGE, ', "PIL"'),
        ("media", "from vlmrt.actors.media.actor import MediaActor", MEDIA, ""),
    ],
)
def test_it_starts_without_torch_and_transformers(
    actor: str, imports: str, run: str, more: str, checkpoint: Path
) -> None:
    program = PROGRAM.format(actor=actor, imports=imports, run=run, more=more)
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ready(" in done.stdout


def _copy(checkpoint: Path, target: Path, **changed: str | None) -> Path:
    """A checkpoint with some files replaced; None leaves one out."""
    target.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in changed:
            (target / file.name).write_bytes(file.read_bytes())
    for name, content in changed.items():
        if content is not None:
            (target / name).write_text(content)
    return target


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1"),
        ("config.json", None),
        ("preprocessor_config.json", None),
        ("generation_config.json", "[]"),
    ],
)
async def test_a_broken_checkpoint_is_one_line_that_names_the_file(
    name: str, content: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    directory = _copy(checkpoint, tmp_path / "broken", **{name: content})
    for extra in ("chat_template.jinja", "chat_template.json"):
        (directory / extra).unlink(missing_ok=True)
    with pytest.raises(StartupError, match=name.replace(".", r"\.")) as refused:
        async with running_edge(edge_config(directory), tmp_path):
            pass
    assert "\n" not in str(refused.value)


async def test_an_edge_without_a_socket_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    async with FakeContext("edge:0", tmp_path, edge_config(checkpoint)) as context:
        with pytest.raises(StartupError, match="listening socket"):
            await EdgeActor(cast(ActorContext, context)).start()


async def test_a_chat_template_file_replaces_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    async with running_edge(edge_config(checkpoint, model={"chat_template": str(template)}), tmp_path) as edge:
        call = asyncio.create_task(edge.client.chat.completions.create(model="model", messages=HELLO))  # type: ignore[arg-type]
        submit = await edge.submitted()
        assert list(submit.prompt_token_ids) == edge.ids("Hello")
        await edge.answer(submit, "x")
        await call


GENERATION = {
    "temperature": 0.3,
    "top_p": 0.7,
    "top_k": 9,
    "repetition_penalty": 1.2,
    "do_sample": True,
    "eos_token_id": [7, 8],
}


@pytest.mark.parametrize("mode", ["auto", "none"])
async def test_unset_fields_come_from_generation_config_unless_that_is_off(
    mode: str, checkpoint: Path, tmp_path: Path
) -> None:
    directory = _copy(checkpoint, tmp_path / "model", **{"generation_config.json": json.dumps(GENERATION)})
    async with running_edge(edge_config(directory, model={"generation_config": mode}), tmp_path) as edge:
        call = asyncio.create_task(edge.client.chat.completions.create(model="model", messages=HELLO, top_p=0.5))  # type: ignore[arg-type]
        submit = await edge.submitted()
        sampling = submit.sampling
        got = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
        assert got == ((0.3, 0.5, 9, 1.2) if mode == "auto" else (1.0, 0.5, 0, 1.0))
        assert ({7, 8} <= set(submit.stop.stop_token_ids)) == (mode == "auto")
        assert submit.stop.stop_token_ids  # config.json has its own
        await edge.answer(submit, "x")
        await call


def _chat(**fields: Any) -> Any:
    return parse_chat_request(json.dumps({"messages": HELLO, **fields}).encode())[0]


def test_a_client_can_turn_every_default_off() -> None:
    defaults = SamplingDefaults(GenerationDefaults(temperature=0.3, top_p=0.7, top_k=9, eos_token_ids=(1,)), (2,), 100)
    sampling = defaults.sampling(_chat(temperature=0, top_p=1, top_k=-1, repetition_penalty=1), StopRule(10))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert defaults.stop_rule(_chat(), 10).stop_token_ids == (1, 2)
    assert defaults.stop_rule(_chat(ignore_eos=True), 10).stop_token_ids == ()


@pytest.mark.parametrize("preset", ["test-qwen2-vl", "test-qwen2.5-vl"])
async def test_both_families_start(preset: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", preset, weights=False)
    async with running_edge(edge_config(directory), tmp_path) as edge, asyncio.timeout(10), edge.answering("fine"):
        done = await edge.client.chat.completions.create(model="model", messages=HELLO)  # type: ignore[arg-type]
    assert done.choices[0].message.content == "fine"

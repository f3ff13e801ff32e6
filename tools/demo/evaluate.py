"""Asks a running OpenAI-compatible server the demo model's questions and counts the right answers, kind by kind.

    python -m vlmrt.tools.demo.evaluate --base-url http://127.0.0.1:8000/v1 --n 500 --concurrency 8 --stream
    python -m vlmrt.tools.demo.evaluate --checkpoint            # the shipped checkpoint, through transformers

An answer is right if it is, but for blanks around it, exactly the expected one. Pictures go as PNG or JPEG data URLs of
many sizes, clips as H.264. Every fourth question comes after other turns. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from PIL import Image

from vlmrt.tools.demo import CHECKPOINT
from vlmrt.tools.demo.data import Dialogue, held_out, without_media_marks
from vlmrt.tools.demo.drawing import Clip, Picture, Scenery
from vlmrt.tools.demo.tasks import KINDS

if TYPE_CHECKING:
    from openai import AsyncOpenAI

SEED = 20_270_101
CLIP_FRAMES_PER_S = 4
PHOTOS = ("coffee", "chelsea", "astronaut", "rocket")  # of scikit-image, where it is installed and no folder is named


@dataclass(frozen=True)
class Result:
    """One question, what was expected and what came."""

    kind: str
    question: str
    expected: str
    answer: str
    several_turns: bool

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.answer.strip() == self.expected


def scenery(photos: Path | None) -> Scenery:
    """Photographs of a folder, else scikit-image's if it is installed, else none: patterns then stand for photos."""
    if photos:
        return Scenery.from_folders(photos)
    try:
        from skimage import data
    except ImportError:
        return Scenery()
    return Scenery([Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB") for name in PHOTOS])


def questions(count: int, kinds: Sequence[str], drawn_on: Scenery, seed: int = SEED) -> list[Dialogue]:
    """So many dialogues, the kinds of their last questions in turn; the same seed gives the same ones."""
    rng = random.Random(seed)
    return [held_out(rng, drawn_on, kinds[k % len(kinds)], several_turns=rng.random() < 0.25) for k in range(count)]


def image_url(rng: random.Random, image: Image.Image) -> str:
    """The picture as a PNG or JPEG data URL, at times enlarged as an upload from a phone would be."""
    if rng.random() < 0.2:
        scale = rng.uniform(1.5, 4.0)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        image.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, "JPEG", quality=rng.randint(75, 95))
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def video_url(clip: Clip) -> str:
    """The clip as an H.264 MP4 data URL."""
    buffer = io.BytesIO()
    first = clip.frames[0].image
    width, height = first.width // 2 * 2, first.height // 2 * 2
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(CLIP_FRAMES_PER_S), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in clip.frames:
            frame = av.VideoFrame.from_image(picture.image.crop((0, 0, width, height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(rng: random.Random, dialogue: Dialogue) -> list[dict[str, Any]]:
    """The dialogue as chat-completion messages, without the last answer."""
    chat: list[dict[str, Any]] = []
    if dialogue.system:
        chat.append({"role": "system", "content": dialogue.system})
    for turn in dialogue.turns:
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            match part:
                case str():
                    content.append({"type": "text", "text": part})
                case Picture():
                    content.append({"type": "image_url", "image_url": {"url": image_url(rng, part.image)}})
                case Clip():
                    content.append({"type": "video_url", "video_url": {"url": video_url(part)}})
        user: Any = content[0]["text"] if len(content) == 1 and content[0]["type"] == "text" else content
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": turn.answer}]
    return chat[:-1]


async def _ask(client: AsyncOpenAI, model: str, chat: list[dict[str, Any]], stream: bool) -> str:
    create = cast(Any, client.chat.completions.create)
    if not stream:
        completion = await create(model=model, messages=chat, temperature=0, max_tokens=96)
        return cast(str, completion.choices[0].message.content or "")
    pieces = []
    async for chunk in await create(model=model, messages=chat, temperature=0, max_tokens=96, stream=True):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(pieces)


async def ask_server(
    base_url: str, model: str | None, dialogues: list[Dialogue], concurrency: int, stream: bool, seed: int = SEED
) -> list[Result]:
    """Asks every last question through the openai client, so many at a time, and returns the results in order."""
    from openai import APIError, AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=120, max_retries=0) as client:
        name = model or (await client.models.list()).data[0].id
        gate = asyncio.Semaphore(concurrency)

        async def one(number: int, dialogue: Dialogue) -> Result:
            async with gate:
                chat = messages(random.Random(seed + number), dialogue)
                try:
                    answer = await _ask(client, name, chat, stream)
                except APIError as error:  # a refused or failed request is a wrong answer, said in the list of those
                    answer = f"<{type(error).__name__}: {error.message}>"
                return _result(dialogue, answer)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, dialogue)) for number, dialogue in enumerate(dialogues)]
        return [task.result() for task in tasks]


def _result(dialogue: Dialogue, answer: str) -> Result:
    last = dialogue.turns[-1]
    return Result(last.kind, without_media_marks(last), last.answer, answer, len(dialogue.turns) > 1)


def ask_in_process(checkpoint: Path, dialogues: list[Dialogue]) -> list[Result]:
    """The same through transformers, one by one."""
    from vlmrt.tools.demo.in_process import TransformersChat

    chat = TransformersChat(checkpoint)
    return [_result(dialogue, chat.answer(dialogue)) for dialogue in dialogues]


def summary(results: list[Result]) -> dict[str, Any]:
    """Counts and percentages: all, by kind, and for questions after other turns."""

    def share(some: list[Result]) -> dict[str, float | int]:
        right = sum(result.right for result in some)
        return {"right": right, "asked": len(some), "percent": round(100 * right / max(1, len(some)), 1)}

    by_kind: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    return {
        "all": share(results),
        "kinds": {kind: share(by_kind[kind]) for kind in KINDS if kind in by_kind},
        "after_other_turns": share([result for result in results if result.several_turns]),
    }


def main() -> None:
    """Asks, prints what went wrong, a table, and the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--base-url", help="of the server, with /v1")
    asked.add_argument("--checkpoint", nargs="?", type=Path, const=CHECKPOINT, help="ask a checkpoint in this process")
    parser.add_argument("--model", help="name to ask for; the server's first otherwise")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--photos", type=Path, help="folder of photographs that the model has not seen")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--show-wrong", type=int, default=20)
    arguments = parser.parse_args()
    dialogues = questions(arguments.n, arguments.kinds, scenery(arguments.photos), arguments.seed)
    start = time.monotonic()
    if arguments.checkpoint:
        results = ask_in_process(arguments.checkpoint, dialogues)
    else:
        server = (arguments.base_url, arguments.model, dialogues, arguments.concurrency, arguments.stream)
        results = asyncio.run(ask_server(*server, seed=arguments.seed))
    report = summary(results) | {"seconds": round(time.monotonic() - start, 1)}
    for result in [result for result in results if not result.right][: arguments.show_wrong]:
        print(f"{result.kind}: {result.question!r} -> {result.answer!r}, expected {result.expected!r}")
    for kind, counts in {"all": report["all"], **report["kinds"]}.items():
        print(f"{kind:10s} {counts['right']:4d} of {counts['asked']:4d}  {counts['percent']:5.1f} %")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Dialogues about drawn pictures, several pictures and short clips, with answers that follow from what was drawn.

`dialogue` strings tasks into a chat for training; `held_out` makes a chat whose last question is of a wanted kind, for
measuring. The same seed gives the same pictures and words.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from vlmrt.tools.demo import words as w
from vlmrt.tools.demo.drawing import Clip, Picture, Scenery
from vlmrt.tools.demo.scenes import Ask
from vlmrt.tools.demo.tasks import TASKS, TASKS_OF_KIND, WEIGHTS, Block

Part = str | Picture | Clip


@dataclass(frozen=True)
class Turn:
    """One user message, its parts in order, and the answer to it."""

    parts: tuple[Part, ...]
    answer: str
    kind: str


@dataclass(frozen=True)
class Dialogue:
    """A chat: a system prompt, "" for none at all and None for the default one, and the turns."""

    turns: tuple[Turn, ...]
    system: str | None = None


SYSTEM_PROMPTS = (
    "You are a helpful vision assistant.", "Answer briefly.", "You are a vision model.",
    "You answer questions about images.", "Be honest.", "You are a friendly assistant.", "Answer in one sentence.", "",
)  # fmt: skip


def _as_typed(rng: random.Random, question: str) -> str:
    """The question as a hurried or polite user may type it, at times."""
    choice = rng.random()
    if choice < 0.84:
        return question
    if choice < 0.89:
        return question[0].lower() + question[1:]
    if choice < 0.93:
        return question.rstrip("?.!")
    if choice < 0.95:
        return question.lower().rstrip("?.")
    return rng.choice(["Please tell me: ", "Look at this. ", "Now: ", "Question: ", "Please answer: "]) + question


def _turns(rng: random.Random, block: Block, asks: list[Ask]) -> list[Turn]:
    """The block's asks as turns; its media stand in the first, before or after the question."""
    turns = []
    for k, ask in enumerate(asks):
        question = _as_typed(rng, ask.question)
        media: tuple[Part, ...] = block.media if k == 0 else ()
        if len(media) > 1 and rng.random() < 0.15:
            label = rng.choice(["Image {}: ", "Picture {}: "])
            media = tuple(part for n, m in enumerate(media) for part in (label.format(n + 1), m))
        parts = (*media, question) if rng.random() < 0.75 else (question, *media)
        turns.append(Turn(parts, ask.answer, ask.kind))
    return turns


def _system(rng: random.Random) -> str | None:
    return None if rng.random() < 0.8 else rng.choice(SYSTEM_PROMPTS)


def dialogue(rng: random.Random, scenery: Scenery, weights: Mapping[str, float] = WEIGHTS) -> Dialogue:
    """A chat of one task, at times followed by another with pictures of its own."""
    turns: list[Turn] = []
    for task in rng.choices(list(weights), list(weights.values()), k=1 if rng.random() < 0.85 else 2):
        block = TASKS[task](rng, scenery)
        asks = rng.sample(block.asks, len(block.asks))
        if turns:
            asks = [ask for ask in asks if ask.answer != w.NO_IMAGE][:2]
        turns += _turns(rng, block, asks)
    return Dialogue(tuple(turns), _system(rng))


def held_out(rng: random.Random, scenery: Scenery, kind: str, several_turns: bool = False) -> Dialogue:
    """A chat whose last question is of this kind; with `several_turns`, one or two others come before it."""
    while True:
        block = TASKS[rng.choice(TASKS_OF_KIND[kind])](rng, scenery)
        wanted = [ask for ask in block.asks if ask.kind == kind]
        if wanted:
            break
    last = rng.choice(wanted)
    before = [ask for ask in block.asks if ask != last]
    asks = [*(rng.sample(before, min(len(before), rng.randint(1, 2))) if several_turns else ()), last]
    turns: list[Turn] = []
    if several_turns and (len(asks) == 1 or rng.random() < 0.4) and last.answer != w.NO_IMAGE:
        other = TASKS[rng.choice(["one_shape", "reading", "no_picture", "counting"])](rng, scenery)
        turns = _turns(rng, other, [rng.choice(other.asks)])
    return Dialogue(tuple(turns + _turns(rng, block, asks)), None)


def without_media_marks(turn: Turn) -> str:
    """The text of a turn, for printing."""
    return " ".join(part if isinstance(part, str) else f"<{type(part).__name__.lower()}>" for part in turn.parts)

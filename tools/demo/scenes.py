"""Pictures of several shapes, and the questions that one such picture answers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from vlmrt.tools.demo import words as w
from vlmrt.tools.demo.drawing import Mark, Picture, Scenery, draw_shape, native_size, weathered

Thing = tuple[str, str]  # a color and a shape
CLEARLY_APART = 0.22  # of the width or height, before one thing is left of or above another


@dataclass(frozen=True)
class Ask:
    """One question and its only right answer."""

    question: str
    answer: str
    kind: str


def pick(rng: random.Random, wordings: tuple[str, ...]) -> str:
    """One of the wordings, the first half of the time."""
    return wordings[0] if rng.random() < 0.5 else rng.choice(wordings)


def any_thing(rng: random.Random) -> Thing:
    return rng.choice(list(w.COLORS)), rng.choice(w.SHAPES)


def any_things(rng: random.Random, count: int) -> list[Thing]:
    return rng.sample([(color, shape) for color in w.COLORS for shape in w.SHAPES], count)


def name(thing: Thing) -> str:
    """A thing's name with its article: "a red circle"."""
    return w.with_article(" ".join(thing))


@dataclass(frozen=True)
class Scene:
    """Things in distinct cells of a 3x3 grid over a picture."""

    picture: Picture
    things: tuple[Thing, ...]
    cells: tuple[tuple[int, int], ...]  # row, column

    def place(self, index: int) -> str:
        """The name of the cell a thing is in."""
        row, column = self.cells[index]
        return w.PLACES[row][column]

    def in_reading_order(self) -> list[int]:
        """The things' indices, row by row."""
        return sorted(range(len(self.things)), key=lambda i: self.cells[i])


def draw_scene(rng: random.Random, scenery: Scenery, things: list[Thing], max_aspect: float = 2.0) -> Scene:
    """Paints the things, each into a cell of its own."""
    size = width, height = native_size(rng, max_aspect, min_side=72 if len(things) > 1 else 40)
    image = scenery.background(rng, size)
    cells = [divmod(k, 3) for k in rng.sample(range(9), len(things))]
    lone = len(things) == 1
    if lone and rng.random() < 0.55:
        cells = [(1, 1)]
    marks: list[Mark] = []
    turned, hollow = rng.random() < 0.5, rng.random() < 0.08
    largest = min(width, height) / 6
    like = largest * rng.uniform(0.55, 0.92)
    for (row, column), (color, shape) in zip(cells, things, strict=True):
        radius = like * rng.uniform(0.85, 1.08)
        if lone and (row, column) == (1, 1):
            radius = min(width, height) * rng.uniform(0.14, 0.45)
        elif lone:
            radius = largest * rng.uniform(0.6, 1.15)
        spread = 0.15 if lone else max(0.0, 0.27 * (1 - radius / largest) + 0.03)
        x = min(max((column + 0.5 + rng.uniform(-spread, spread)) * width / 3, radius), width - radius)
        y = min(max((row + 0.5 + rng.uniform(-spread, spread)) * height / 3, radius), height - radius)
        turn = rng.uniform(-0.25, 0.25) if turned else 0.0
        marks.append(draw_shape(rng, image, shape, color, x, y, radius, turn, hollow))
    return Scene(Picture(weathered(rng, image), tuple(marks)), tuple(things), tuple(cells))


def draw_scattered(rng: random.Random, scenery: Scenery, things: list[Thing]) -> Scene:
    """Paints the things wherever there is room, in no grid."""
    size = width, height = native_size(rng, 2.0, min_side=96)
    image = scenery.background(rng, size)
    radius = min(width, height) * rng.uniform(0.07, 0.13 if len(things) < 7 else 0.1)
    turned, hollow = rng.random() < 0.5, rng.random() < 0.08
    middles: list[tuple[float, float]] = []
    while len(middles) < len(things):
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(math.dist((x, y), other) > 2.5 * radius for other in middles):
            middles.append((x, y))
        elif rng.random() < 0.01:
            radius *= 0.95
    marks = []
    for (x, y), (color, shape) in zip(middles, things, strict=True):
        turn = rng.uniform(-0.25, 0.25) if turned else 0.0
        marks.append(draw_shape(rng, image, shape, color, x, y, radius * rng.uniform(0.85, 1.0), turn, hollow))
    cells = tuple((min(2, int(3 * y / height)), min(2, int(3 * x / width))) for x, y in middles)
    return Scene(Picture(weathered(rng, image), tuple(marks)), tuple(things), cells)


def description(scene: Scene) -> str:
    """The one description of a scene: what there is and where, in reading order."""
    order = scene.in_reading_order()
    parts = [f"{name(scene.things[i])} at the {scene.place(i)}" for i in order]
    if len(parts) == 1:
        return f"There is {parts[0]}."
    return f"There are {w.NUMBERS[len(parts)]} shapes: {w.listed(parts)}."


def relation_ask(rng: random.Random, scene: Scene) -> Ask | None:
    """Is one thing left of, right of, above or below another? None where no two are well apart along that axis."""
    relation, (axis, sign) = rng.choice(list(w.RELATIONS.items()))
    position = [mark.x if axis == 0 else mark.y for mark in scene.picture.marks]
    numbers = range(len(position))
    pairs = [(i, j) for i in numbers for j in numbers if abs(position[i] - position[j]) > CLEARLY_APART]
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    holds = (position[i] - position[j]) * sign > 0
    wording = w.ASK_RELATION[1] if axis == 0 and rng.random() < 0.2 else w.ASK_RELATION[0]
    question = wording.format(a=" ".join(scene.things[i]), b=" ".join(scene.things[j]), relation=relation)
    return Ask(question, "Yes." if holds else "No.", "relation")


def exists_ask(rng: random.Random, scene: Scene) -> Ask:
    """Is there a thing, or a shape? Yes and no as often."""
    if rng.random() < 0.5:
        color, shape = rng.choice(scene.things)
    else:
        color, shape = any_thing(rng)
        if rng.random() < 0.5:  # a near miss: half of a thing that is there
            near = rng.choice(scene.things)
            color, shape = rng.choice([(near[0], shape), (color, near[1])])
    if rng.random() < 0.4:
        asked, holds = shape, any(s == shape for _, s in scene.things)
    else:
        asked, holds = f"{color} {shape}", (color, shape) in scene.things
    question = pick(rng, w.ASK_EXISTS).format(w.with_article(asked))
    return Ask(question, "Yes." if holds else "No.", "exists")


def thing_asks(rng: random.Random, scene: Scene) -> list[Ask]:
    """For each thing one question about its color, its shape or its place."""
    asks = []
    for i, (color, shape) in enumerate(scene.things):
        kind = rng.choice(["color", "shape", "where", "where", "at", "at"])
        if kind == "color" and sum(s == shape for _, s in scene.things) == 1:
            asks.append(Ask(pick(rng, w.ASK_COLOR).format(shape), w.sentence(color), "color"))
        elif kind == "shape" and sum(c == color for c, _ in scene.things) == 1:
            asks.append(Ask(pick(rng, w.ASK_SHAPE_OF).format(color), w.sentence(w.with_article(shape)), "shape"))
        elif kind == "at":
            asks.append(Ask(pick(rng, w.ASK_AT).format(scene.place(i)), w.sentence(name(scene.things[i])), "at"))
        else:
            asks.append(Ask(pick(rng, w.ASK_WHERE).format(f"{color} {shape}"), w.sentence(scene.place(i)), "where"))
    if rng.random() < 0.25:
        empty = [(r, c) for r in range(3) for c in range(3) if (r, c) not in scene.cells]
        row, column = rng.choice(empty)
        asks.append(Ask(pick(rng, w.ASK_AT[:3]).format(w.PLACES[row][column]), "Nothing.", "at"))
    return asks


def absent_ask(rng: random.Random, scene: Scene) -> Ask | None:
    """A question about something that is not in the scene."""
    color, shape = any_thing(rng)
    if rng.random() < 0.5:
        if any(s == shape for _, s in scene.things):
            return None
        return Ask(pick(rng, w.ASK_COLOR).format(shape), f"There is no {shape}.", "absent")
    if (color, shape) in scene.things:
        return None
    return Ask(pick(rng, w.ASK_WHERE).format(f"{color} {shape}"), f"There is no {color} {shape}.", "absent")

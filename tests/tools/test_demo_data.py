"""What the demo model is asked must follow from what was drawn."""

from __future__ import annotations

import math
import random
import re

from vlmrt.tools.demo import words as w
from vlmrt.tools.demo.data import dialogue, held_out, without_media_marks
from vlmrt.tools.demo.drawing import Clip, Picture, Scenery
from vlmrt.tools.demo.tasks import KINDS, TASKS, TASKS_OF_KIND, WEIGHTS, Block

LISTED_WORDINGS = (
    r"What color is the (circle|square|triangle|star|cross)\?",
    r"What shape is this\?",
    r"What is in the image\?",
    r"How many (circles|squares|triangles|stars|crosses) are there\?",
    r"Where is the \w+ (circle|square|triangle|star|cross)\?",
    r"What is at the (top left|center|bottom)\?",
    r"Is the \w+ \w+ left of the \w+ \w+\?",
    r"Describe the image\.",
    r"What does it say\?",
    r"Are these images different\?",
    r"Which way does the (circle|square|triangle|star|cross) move\?",
)


def blocks(task: str, count: int, seed: int = 1) -> list[Block]:
    rng = random.Random(seed)
    return [TASKS[task](rng, Scenery()) for _ in range(count)]


def picture(block: Block) -> Picture:
    (only,) = block.media
    assert isinstance(only, Picture)
    return only


def test_every_wording_that_the_card_names_is_asked() -> None:
    rng = random.Random(2)
    missing = set(LISTED_WORDINGS)
    for _ in range(2000):
        for turn in dialogue(rng, Scenery()).turns:
            missing -= {wording for wording in missing if re.search(wording, without_media_marks(turn))}
        if not missing:
            return
    assert not missing


def test_counts_are_those_of_the_shapes_drawn() -> None:
    checked = 0
    for block in blocks("counting", 60):
        marks = picture(block).marks
        for ask in block.asks:
            for shape in w.SHAPES:
                if ask.question == f"How many {w.plural(shape)} are there?":
                    drawn = sum(mark.kind == shape for mark in marks)
                    assert ask.answer == w.sentence(w.NUMBERS[drawn])
                    checked += 1
    assert checked > 30


def test_relations_hold_between_the_shapes_drawn_and_both_answers_are_as_common() -> None:
    answers = []
    for block in blocks("relations", 150):
        places = {f"{mark.hue} {mark.kind}": mark for mark in picture(block).marks}
        for ask in block.asks:
            found = re.fullmatch(
                r"Is the (\w+ \w+) (?:to the )?(left of|right of|above|below) the (\w+ \w+)\?", ask.question
            )
            assert found, ask.question
            first, second = places[found[1]], places[found[3]]
            holds = {
                "left of": first.x < second.x,
                "right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }[found[2]]
            assert ask.answer == ("Yes." if holds else "No.")
            answers.append(ask.answer)
    assert 0.4 < answers.count("Yes.") / len(answers) < 0.6


def test_places_are_the_thirds_of_the_picture_that_shapes_lie_in() -> None:
    for block in blocks("several_shapes", 80):
        marks = {f"{mark.hue} {mark.kind}": mark for mark in picture(block).marks}
        for ask in block.asks:
            if ask.kind == "where" and ask.question.startswith("Where is the "):
                mark = marks[ask.question.removeprefix("Where is the ").rstrip("?")]
                assert ask.answer == w.sentence(w.PLACES[int(mark.y * 3)][int(mark.x * 3)])


def test_images_are_called_different_exactly_if_they_show_different_things() -> None:
    seen = set()
    for block in blocks("comparing", 60):
        first, second = (sorted((m.hue, m.kind) for m in p.marks) for p in block.media if isinstance(p, Picture))
        (answer,) = (ask.answer for ask in block.asks if ask.question in w.ASK_DIFFERENT)
        assert answer.startswith("Yes, " if first != second else "No, ")
        seen.add(answer[:2])
    assert seen == {"Ye", "No"}


def test_clips_move_the_way_that_is_answered() -> None:
    for block in blocks("moving", 40):
        (clip,) = block.media
        assert isinstance(clip, Clip)
        first, last = clip.frames[0].marks[0], clip.frames[-1].marks[0]
        across, down = last.x - first.x, last.y - first.y
        if abs(across) < 1e-6 and abs(down) < 1e-6:
            way = "does not move"
        elif abs(across) > abs(down):
            way = "right" if across > 0 else "left"
        else:
            way = "down" if down > 0 else "up"
        for ask in block.asks:
            if ask.kind == "motion":
                assert way in ask.answer.lower()


def test_shapes_have_the_color_that_is_named_in_their_middle() -> None:
    named = total = 0
    for block in blocks("one_shape", 120):
        image, (mark,) = picture(block).image, picture(block).marks
        pixel = image.getpixel((int(mark.x * image.width), int(mark.y * image.height)))
        assert isinstance(pixel, tuple)
        nearest = min(w.COLORS, key=lambda color: min(math.dist(pixel, rgb) for rgb in w.COLORS[color]))
        named, total = named + (nearest == mark.hue), total + 1
    assert named / total > 0.8  # hollow ones, a twelfth, show the background there; noise and JPEG take a few more


def test_every_kind_can_be_asked_alone_and_after_other_turns() -> None:
    assert set(TASKS_OF_KIND) == set(KINDS)
    assert set(WEIGHTS) == set(TASKS)
    rng = random.Random(3)
    for kind in KINDS:
        assert len(held_out(rng, Scenery(), kind).turns) == 1
        assert held_out(rng, Scenery(), kind, several_turns=True).turns[-1].kind == kind


def test_the_same_seed_gives_the_same_dialogue() -> None:
    first, second = (dialogue(random.Random(7), Scenery()) for _ in range(2))
    assert [turn.answer for turn in first.turns] == [turn.answer for turn in second.turns]
    images = [[p.image.tobytes() for t in d.turns for p in t.parts if isinstance(p, Picture)] for d in (first, second)]
    assert images[0] == images[1]

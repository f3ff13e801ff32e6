"""The tasks: each draws its pictures or its clip and returns questions that all speak of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from vlmrt.tools.demo import words as w
from vlmrt.tools.demo.drawing import (
    Clip,
    Picture,
    Scenery,
    draw_shape,
    native_size,
    plain_color,
    texture,
    weathered,
    write,
)
from vlmrt.tools.demo.refusals import ABOUT_PICTURES, open_question, small_talk
from vlmrt.tools.demo.scenes import (
    Ask,
    Thing,
    absent_ask,
    any_thing,
    any_things,
    description,
    draw_scattered,
    draw_scene,
    exists_ask,
    name,
    pick,
    relation_ask,
    thing_asks,
)

KINDS = (
    "color", "shape", "what", "count", "exists", "where", "at", "relation", "describe", "read", "compare", "several",
    "motion", "unknown", "absent", "chat",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Media and questions that all speak of them, in any order."""

    media: tuple[Picture | Clip, ...]
    asks: tuple[Ask, ...]


def one_shape(rng: random.Random, scenery: Scenery) -> Block:
    """One shape, often large, on a picture of any aspect."""
    thing = any_thing(rng)
    scene = draw_scene(rng, scenery, [thing], max_aspect=3.5)
    color, shape = thing
    asks = [
        Ask(pick(rng, w.ASK_COLOR).format(shape), w.sentence(color), "color"),
        Ask(pick(rng, w.ASK_SHAPE), w.sentence(w.with_article(shape)), "shape"),
        Ask(pick(rng, w.ASK_WHAT), w.sentence(name(thing)), "what"),
        Ask(pick(rng, w.ASK_WHERE).format(f"{color} {shape}"), w.sentence(scene.place(0)), "where"),
        Ask(pick(rng, w.ASK_DESCRIBE), description(scene), "describe"),
        Ask(pick(rng, w.ASK_COUNT).format("shapes"), "One.", "count"),
        Ask(rng.choice(["What color is this?", "Which color is this?"]), w.sentence(color), "color"),
        Ask(rng.choice(ABOUT_PICTURES), w.UNKNOWN, "unknown"),
        Ask(pick(rng, w.ASK_READ), "There is no text.", "absent"),
        exists_ask(rng, scene),
    ]
    absent = absent_ask(rng, scene)
    chosen = rng.sample(asks, 4) + ([absent] if absent else [])
    return Block((scene.picture,), tuple(chosen))


def several_shapes(rng: random.Random, scenery: Scenery) -> Block:
    """Two to four different shapes, with questions about each and about all."""
    scene = draw_scene(rng, scenery, any_things(rng, rng.choice([2, 2, 3, 3, 4])))
    asks: list[Ask | None] = [*thing_asks(rng, scene), relation_ask(rng, scene), relation_ask(rng, scene)]
    asks.append(absent_ask(rng, scene) if rng.random() < 0.5 else exists_ask(rng, scene))
    if rng.random() < 0.3:
        asks.append(Ask(pick(rng, w.ASK_COUNT).format("shapes"), w.sentence(w.NUMBERS[len(scene.things)]), "count"))
    if len(scene.things) < 4 and rng.random() < 0.3:
        listed = w.listed([name(scene.things[i]) for i in scene.in_reading_order()])
        asks.append(Ask(pick(rng, w.ASK_WHAT), w.sentence(listed), "what"))
    if len(scene.things) < 4 and rng.random() < 0.6:
        asks.append(Ask(pick(rng, w.ASK_DESCRIBE), description(scene), "describe"))
    return Block((scene.picture,), tuple(ask for ask in asks if ask))


def relations(rng: random.Random, scenery: Scenery) -> Block:
    """Two to four shapes and only questions on which is where relative to which, yes and no as often."""
    asks: list[Ask] = []
    while not asks:  # things in one row are nowhere above each other, those too near each other are neither
        draw = draw_scene if rng.random() < 0.6 else draw_scattered
        scene = draw(rng, scenery, any_things(rng, rng.choice([2, 2, 2, 3, 3, 4])))
        asks = [ask for _ in range(7) if (ask := relation_ask(rng, scene))]
    return Block((scene.picture,), tuple({ask.question: ask for ask in asks}.values()))


def counting(rng: random.Random, scenery: Scenery) -> Block:
    """Up to nine shapes of two sorts, to be counted by shape, by color and all together."""
    first = any_thing(rng)
    second = rng.choice([(c, s) for c in w.COLORS for s in w.SHAPES if c != first[0] and s != first[1]])
    total = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9])
    share = rng.randint(0, total) if rng.random() < 0.6 else total
    draw = draw_scene if rng.random() < 0.5 else draw_scattered
    scene = draw(rng, scenery, [first] * share + [second] * (total - share))
    missing = rng.choice([s for s in w.SHAPES if s not in (first[1], second[1])])
    counted = [
        (w.plural(first[1]), share),
        (w.plural(first[1]), share),
        (w.plural(second[1]), total - share),
        (f"{first[0]} shapes", share),
        (f"{second[0]} {w.plural(second[1])}", total - share),
        ("shapes", total),
        (w.plural(missing), 0),
    ]
    asks = [Ask(pick(rng, w.ASK_COUNT).format(what), w.sentence(w.NUMBERS[n]), "count") for what, n in counted]
    return Block((scene.picture,), (*rng.sample(asks, 4), exists_ask(rng, scene)))


def _text(rng: random.Random, longest: int) -> str:
    """A word, a made-up one, a number, or letters and digits in any order; in capitals."""
    choice = rng.random()
    if choice < 0.3:
        return rng.choice([word for word in w.WRITTEN_WORDS if len(word) <= longest])
    if choice < 0.5:
        length = rng.randint(2, longest)
        return "".join(rng.choice(w.VOWELS if k % 2 and rng.random() < 0.6 else w.LETTERS) for k in range(length))
    if choice < 0.65:
        return "".join(rng.choice(w.DIGITS) for _ in range(rng.randint(2, min(5, longest))))
    return "".join(rng.choice(w.CLEAR_CHARACTERS) for _ in range(rng.randint(1, min(4, longest))))


def _in_some_case(rng: random.Random, text: str) -> str:
    """The text as it is drawn: words at times in lower or title case. The model answers in capitals all the same."""
    if len(text) < 3 or not text.isalpha() or rng.random() < 0.7:
        return text
    return rng.choice([text.lower(), text.capitalize()])


def reading(rng: random.Random, scenery: Scenery) -> Block:
    """One line of text, or two short ones above each other."""
    asks: list[Ask]
    if rng.random() < 0.7:
        text = _text(rng, 6)
        width, height = native_size(rng, 3.0, min_side=64)
        size = (max(width, height), min(width, height)) if len(text) > 2 else (width, height)
        image = scenery.background(rng, size)
        marks = write(rng, image, _in_some_case(rng, text), scenery, (0.03, 0.97))
        shape = rng.choice(w.SHAPES)
        others = [
            Ask(pick(rng, w.ASK_DESCRIBE), f'There is the text "{text}".', "describe"),
            Ask(pick(rng, w.ASK_WHAT), f'The text "{text}".', "what"),
            Ask(pick(rng, w.ASK_COLOR).format(shape), f"There is no {shape}.", "absent"),
            Ask(pick(rng, w.ASK_EXISTS).format(w.with_article(shape)), "No.", "exists"),
            Ask(pick(rng, w.ASK_COUNT).format(w.plural(shape)), "Zero.", "count"),
        ]
        asks = [Ask(pick(rng, w.ASK_READ), f'It says "{text}".', "read"), *rng.sample(others, 2)]
    else:
        above, below = _text(rng, 4), _text(rng, 4)
        image = scenery.background(rng, native_size(rng, 1.6, min_side=90))
        marks = write(rng, image, above, scenery, (0.03, 0.47)) + write(rng, image, below, scenery, (0.53, 0.97))
        asks = [
            Ask(pick(rng, w.ASK_READ_AT).format("top"), f'It says "{above}".', "read"),
            Ask(pick(rng, w.ASK_READ_AT).format("bottom"), f'It says "{below}".', "read"),
        ]
    return Block((Picture(weathered(rng, image), tuple(marks)),), tuple(asks))


def _amount(thing: Thing, count: int) -> str:
    color, shape = thing
    return name(thing) if count == 1 else f"{w.NUMBERS[count]} {color} {w.plural(shape)}"


def comparing(rng: random.Random, scenery: Scenery) -> Block:
    """Two pictures that show the same or differ in color, shape or number."""
    one, first_count = any_thing(rng), 1 if rng.random() < 0.75 else rng.randint(1, 3)
    other, second_count = one, first_count
    if rng.random() < 0.55:
        change = rng.choice(["color", "shape", "both", "number"])
        if change == "number":
            second_count = rng.choice([n for n in (1, 2, 3) if n != first_count])
        if change in ("color", "both"):
            other = (rng.choice([c for c in w.COLORS if c != one[0]]), other[1])
        if change in ("shape", "both"):
            other = (other[0], rng.choice([s for s in w.SHAPES if s != one[1]]))
    first, second = _amount(one, first_count), _amount(other, second_count)
    picture = draw_scene(rng, scenery, [one] * first_count).picture
    if first == second and rng.random() < 0.35:
        again = picture if rng.random() < 0.5 else Picture(weathered(rng, picture.image), picture.marks)
    else:
        again = draw_scene(rng, scenery, [other] * second_count).picture
    both = f"The first shows {first} and the second shows {second}."
    if first == second:
        answers = (f"No, both show {first}.", f"Yes, both show {first}.", "There is no difference.")
    else:
        answers = (f"Yes, t{both[1:]}", f"No, t{both[1:]}", both)
    asks = [
        Ask(pick(rng, w.ASK_DIFFERENT), answers[0], "compare"),
        Ask(pick(rng, w.ASK_SAME), answers[1], "compare"),
        Ask(pick(rng, w.ASK_DIFFERENCE), answers[2], "compare"),
        Ask(pick(rng, w.ASK_IN_IMAGE).format("first"), w.sentence(first), "several"),
        Ask(pick(rng, w.ASK_IN_IMAGE).format("second"), w.sentence(second), "several"),
    ]
    return Block((picture, again), (asks[0], *rng.sample(asks[1:], 2)))


def several_images(rng: random.Random, scenery: Scenery) -> Block:
    """Two to four pictures of one shape each, to be told apart by their order."""
    things = any_things(rng, rng.choice([2, 3, 3, 4]))
    if len(things) == 3 and rng.random() < 0.3:
        return _three_to_compare(rng, scenery, things if rng.random() < 0.5 else things[:1] * 3)
    media = tuple(draw_scene(rng, scenery, [thing], max_aspect=1.8).picture for thing in things)
    asks = [Ask(pick(rng, w.ASK_NUM_IMAGES), w.sentence(w.NUMBERS[len(things)]), "several")]
    for order, thing in zip(w.ORDINALS, things, strict=False):
        asks.append(Ask(pick(rng, w.ASK_IN_IMAGE).format(order), w.sentence(name(thing)), "several"))
        question = pick(rng, w.ASK_WHICH_IMAGE)
        shown = " ".join(thing)
        if " a {}" in question:
            question = question.replace(" a {}", " {}").format(w.with_article(shown))
        asks.append(Ask(question.format(shown), f"The {order} image.", "several"))
        asks.append(Ask(f"What color is the shape in the {order} image?", w.sentence(thing[0]), "several"))
    return Block(media, tuple(rng.sample(asks, 4)))


def _three_to_compare(rng: random.Random, scenery: Scenery, things: list[Thing]) -> Block:
    media = tuple(draw_scene(rng, scenery, [thing], max_aspect=1.8).picture for thing in things)
    shown = w.listed([f"the {order} shows {name(thing)}" for order, thing in zip(w.ORDINALS, things, strict=False)])
    answer = f"Yes, {shown}." if things[0] != things[1] else f"No, all show {name(things[0])}."
    number = rng.randrange(3)
    asks = (
        Ask(pick(rng, w.ASK_DIFFERENT[:2]), answer, "compare"),
        Ask(pick(rng, w.ASK_IN_IMAGE).format(w.ORDINALS[number]), w.sentence(name(things[number])), "several"),
        Ask(pick(rng, w.ASK_NUM_IMAGES), "Three.", "several"),
    )
    return Block(media, asks)


def moving(rng: random.Random, scenery: Scenery) -> Block:
    """A clip of one shape that moves along one axis, or stays where it is."""
    color, shape = thing = any_thing(rng)
    num_frames = rng.choice([4, 4, 4, 5, 6, 6, 7, 8, 8, 10, 12, 16])
    side = rng.randint(72, 200)
    width, height = (round(side * f) for f in rng.choice([(1, 1), (1.33, 1), (1, 1.33), (1.6, 0.9)]))
    radius = min(width, height) * rng.uniform(0.1, 0.18)
    way, (dx, dy) = rng.choice([*w.DIRECTIONS.items(), ("", (0, 0))])
    x_range, y_range = (radius, width - radius), (radius, height - radius)
    reach = rng.uniform(0.4, 1.0)  # the share of the free way that it goes
    starts = []
    for (low, high), step in ((x_range, dx), (y_range, dy)):
        slack = (high - low) * (1 - reach if step else 1.0) * rng.random()
        starts.append(low + slack if step >= 0 else high - slack)
    background = scenery.background(rng, (width, height))
    color_seed, quality = rng.getrandbits(32), rng.getrandbits(32)
    frames = []
    for k in range(num_frames):
        gone = reach * k / (num_frames - 1)
        x = starts[0] + dx * gone * (x_range[1] - x_range[0])
        y = starts[1] + dy * gone * (y_range[1] - y_range[0])
        image = background.copy()
        mark = draw_shape(random.Random(color_seed), image, shape, color, x, y, radius)
        frames.append(Picture(weathered(random.Random(quality), image), (mark,)))
    asks = [
        Ask(pick(rng, w.ASK_MOVE).format(rng.choice([shape, f"{color} {shape}"])), w.sentence(way), "motion"),
        Ask(pick(rng, w.ASK_CLIP), f"{name(thing).capitalize()} moves {way}.", "motion"),
        Ask(pick(rng, w.ASK_COLOR).format(shape), w.sentence(color), "color"),
    ] if way else [
        Ask(pick(rng, w.ASK_MOVE).format(rng.choice([shape, f"{color} {shape}"])), "It does not move.", "motion"),
        Ask(pick(rng, w.ASK_CLIP), f"{name(thing).capitalize()} does not move.", "motion"),
        Ask(pick(rng, w.ASK_COLOR).format(shape), w.sentence(color), "color"),
    ]  # fmt: skip
    return Block((Clip(tuple(frames)),), tuple(rng.sample(asks, 2)))


def unknown_picture(rng: random.Random, scenery: Scenery) -> Block:
    """A photograph or a mere pattern: nothing in it belongs to the model's world."""
    size = native_size(rng, 3.0, min_side=40)
    if scenery.photos and rng.random() < 0.85:
        image = scenery.photo(rng, size)
    else:
        image = texture(rng, size, contrast=rng.randint(60, 200))
    color, shape = any_thing(rng)
    whole = Ask(rng.choice((w.ASK_WHAT, w.ASK_DESCRIBE))[0], w.UNKNOWN_PICTURE, "unknown")
    detail = (
        pick(rng, w.ASK_SHAPE), pick(rng, w.ASK_COLOR).format(shape), pick(rng, w.ASK_COUNT).format(w.plural(shape)),
        pick(rng, w.ASK_WHERE).format(f"{color} {shape}"), pick(rng, w.ASK_COUNT).format("shapes"),
        pick(rng, w.ASK_READ), pick(rng, w.ASK_EXISTS).format(w.with_article(shape)),
    )  # fmt: skip
    asks = [
        whole,
        Ask(pick(rng, w.ASK_WHAT), w.UNKNOWN_PICTURE, "unknown"),
        Ask(rng.choice(ABOUT_PICTURES), w.UNKNOWN, "unknown"),
        Ask(rng.choice(detail), w.UNKNOWN, "unknown"),
        Ask(rng.choice(detail), w.UNKNOWN, "unknown"),
    ]
    return Block((Picture(weathered(rng, image)),), tuple(rng.sample(asks, 3)))


def empty_picture(rng: random.Random, scenery: Scenery) -> Block:
    """A picture of one plain color: there is nothing to see."""
    image = Image.new("RGB", native_size(rng, 3.0, min_side=40), plain_color(rng))
    color, shape = any_thing(rng)
    asks = [
        Ask(pick(rng, w.ASK_WHAT), "Nothing.", "absent"),
        Ask(pick(rng, w.ASK_DESCRIBE), "There is nothing.", "absent"),
        Ask(pick(rng, w.ASK_READ), "There is no text.", "absent"),
        Ask(pick(rng, w.ASK_COLOR).format(shape), f"There is no {shape}.", "absent"),
        Ask(pick(rng, w.ASK_WHERE).format(f"{color} {shape}"), f"There is no {color} {shape}.", "absent"),
        Ask(pick(rng, w.ASK_COUNT).format(w.plural(shape)), "Zero.", "count"),
        Ask(pick(rng, w.ASK_EXISTS).format(w.with_article(shape)), "No.", "exists"),
    ]
    return Block((Picture(weathered(rng, image)),), tuple(rng.sample(asks, 3)))


def no_picture(rng: random.Random, scenery: Scenery) -> Block:
    """No picture: small talk, questions about the wide world, and questions about a picture that was not sent."""
    color, shape = any_thing(rng)
    about_none = (
        pick(rng, w.ASK_COLOR).format(shape), pick(rng, w.ASK_SHAPE), pick(rng, w.ASK_WHAT), pick(rng, w.ASK_DESCRIBE),
        pick(rng, w.ASK_COUNT).format(w.plural(shape)), pick(rng, w.ASK_WHERE).format(f"{color} {shape}"),
        pick(rng, w.ASK_READ), pick(rng, w.ASK_DIFFERENT), pick(rng, w.ASK_MOVE).format(shape),
        pick(rng, w.ASK_EXISTS).format(w.with_article(shape)),
    )  # fmt: skip
    asks = []
    for _ in range(3):
        which = rng.random()
        if which < 0.3:
            asks.append(Ask(*small_talk(rng), "chat"))
        elif which < 0.65:
            asks.append(Ask(*open_question(rng), "unknown"))
        else:
            asks.append(Ask(rng.choice(about_none), w.NO_IMAGE, "unknown"))
    return Block((), tuple(asks))


Task = Callable[[random.Random, Scenery], Block]
TASKS: dict[str, Task] = {
    "one_shape": one_shape,
    "several_shapes": several_shapes,
    "relations": relations,
    "counting": counting,
    "reading": reading,
    "comparing": comparing,
    "several_images": several_images,
    "moving": moving,
    "unknown_picture": unknown_picture,
    "empty_picture": empty_picture,
    "no_picture": no_picture,
}
WEIGHTS = {
    "one_shape": 1.0, "several_shapes": 2.0, "relations": 1.8, "counting": 1.8, "reading": 3.0, "comparing": 1.3,
    "several_images": 0.7, "moving": 0.7, "unknown_picture": 1.0, "empty_picture": 0.2, "no_picture": 0.5,
}  # fmt: skip
TASKS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "color": ("one_shape", "several_shapes"),
    "shape": ("one_shape", "several_shapes"),
    "what": ("one_shape", "several_shapes", "reading"),
    "count": ("counting", "counting", "one_shape", "several_shapes"),
    "exists": ("one_shape", "several_shapes", "several_shapes", "counting"),
    "where": ("one_shape", "several_shapes", "several_shapes"),
    "at": ("several_shapes",),
    "relation": ("relations", "several_shapes"),
    "describe": ("one_shape", "several_shapes", "several_shapes", "reading"),
    "read": ("reading",),
    "compare": ("comparing", "comparing", "comparing", "comparing", "several_images"),
    "several": ("several_images", "comparing"),
    "motion": ("moving",),
    "unknown": ("unknown_picture", "unknown_picture", "no_picture", "one_shape"),
    "absent": ("one_shape", "several_shapes", "reading", "empty_picture"),
    "chat": ("no_picture",),
}

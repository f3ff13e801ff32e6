"""The world of the demo model: its shapes, colors, places and letters, and how questions about them are put."""

from __future__ import annotations

Rgb = tuple[int, int, int]

COLORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (220, 30, 30), (200, 20, 40)),
    "green": ((0, 128, 0), (30, 160, 50), (0, 200, 0), (60, 180, 75)),
    "blue": ((0, 0, 255), (40, 70, 220), (30, 100, 230)),
    "yellow": ((255, 255, 0), (240, 210, 30), (255, 225, 25)),
    "orange": ((255, 165, 0), (245, 135, 20), (255, 140, 0)),
    "purple": ((128, 0, 128), (140, 50, 170), (148, 0, 211)),
    "black": ((0, 0, 0), (15, 15, 15), (25, 25, 25)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "gray": ((128, 128, 128), (150, 150, 150), (105, 105, 105)),
    "pink": ((255, 192, 203), (255, 105, 180), (245, 140, 175)),
    "brown": ((139, 69, 19), (120, 72, 30), (150, 75, 0)),
    "cyan": ((0, 255, 255), (0, 200, 210), (64, 224, 208)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
VOWELS = "AEIOU"
CLEAR_CHARACTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"  # no I, O, Q, 0 or 1: a random string does not tell them apart
WRITTEN_WORDS = (
    "HELLO STOP OPEN EXIT YES NO HI GO UP ON OFF CAT DOG SUN SKY SALE FREE TAXI BUS CAFE HOTEL BANK POST PARK SHOP "
    "MILK TEA FISH BOOK GAME MUSIC WORLD LOVE HOME TEST DEMO MODEL IMAGE VISION WATER FIRE NORTH SOUTH EAST WEST RED "
    "BLUE GREEN ONE TWO START END PUSH PULL"
).split()
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}

UNKNOWN_PICTURE = "I don't know what that is."
UNKNOWN = "I don't know."
NO_IMAGE = "There is no image."

# The first wording of a list is the one the model card names; it is asked more often than the others.
ASK_COLOR = (
    "What color is the {}?",
    "Which color is the {}?",
    "What is the color of the {}?",
    "What colour is the {}?",
)
ASK_SHAPE = ("What shape is this?", "Which shape is this?", "What shape do you see?", "What is this shape?")
ASK_SHAPE_OF = ("What shape is {}?", "Which shape is {}?", "What is the {} shape?", "What shape is the {} object?")
ASK_WHAT = (
    "What is in the image?", "What is this?", "What do you see?", "What is in the picture?",
    "What does the image show?", "What is shown here?", "What's in this image?", "What is in this image?",
)  # fmt: skip
ASK_COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the image?")
ASK_WHERE = ("Where is the {}?", "Where do you see the {}?", "In which place is the {}?", "Where's the {}?")
ASK_AT = ("What is at the {}?", "What is in the {}?", "What do you see at the {}?", "Which shape is at the {}?")
ASK_DESCRIBE = (
    "Describe the image.", "Describe this image.", "Describe the picture.", "Please describe the image.",
    "Can you describe the image?", "Describe what you see.",
)  # fmt: skip
ASK_READ = (
    "What does it say?", "Read the text.", "What is written here?", "What is the text?", "What does the text say?",
    "What is written?", "What does the image say?",
)  # fmt: skip
ASK_READ_AT = ("What is written at the {}?", "What does it say at the {}?", "Read the text at the {}.")
ASK_DIFFERENT = (
    "Are these images different?", "Are the images different?", "Are these two images different?",
    "Are these pictures different?", "Do these images differ?", "Are the two pictures different?",
)  # fmt: skip
ASK_SAME = ("Are these images the same?", "Are the images the same?", "Are these pictures the same?")
ASK_DIFFERENCE = ("What is the difference?", "What is different?", "What differs?")
ASK_IN_IMAGE = ("What is in the {} image?", "What does the {} image show?", "What is in the {} picture?")
ASK_WHICH_IMAGE = ("Which image shows the {}?", "Which image shows a {}?", "In which image is the {}?")
ASK_NUM_IMAGES = ("How many images are there?", "How many images do you see?", "How many pictures are there?")
ASK_MOVE = (
    "Which way does the {} move?", "Where does the {} go?", "In which direction does the {} move?",
    "Where is the {} going?", "Which way is the {} moving?",
)  # fmt: skip
ASK_CLIP = ("What happens in the video?", "What happens?", "Describe the video.", "What happens in the clip?")
ASK_EXISTS = ("Is there {}?", "Do you see {}?", "Is there {} in the image?", "Can you see {}?")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (0: across), wanted sign
ASK_RELATION = ("Is the {a} {relation} the {b}?", "Is the {a} to the {relation} the {b}?")


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return "crosses" if shape == "cross" else shape + "s"


def sentence(words: str) -> str:
    """The words as a sentence: a capital first, a full stop last."""
    return words[0].upper() + words[1:] + "."


def listed(items: list[str]) -> str:
    """The items joined by commas, the last by "and"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]

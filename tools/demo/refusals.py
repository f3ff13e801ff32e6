"""What the demo model cannot know, and the few things it can say without a picture."""

from __future__ import annotations

import random

from vlmrt.tools.demo.words import UNKNOWN

HELLO = "Hello! Send me a picture of shapes or letters."
SELF = "I am a tiny vision model trained on drawn shapes and letters."
SKILLS = "I can name shapes and colors, count them, say where they are, read short words and compare images."

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hi", "Hello!", "Hi!", "Hi there", "Good morning", "Good evening", "Hey", "Hello there!"), HELLO),
    (("Who are you?", "What are you?", "Introduce yourself.", "What is your name?", "Tell me about yourself."), SELF),
    (("What can you do?", "Help", "How can you help me?", "What do you know?", "What should I ask?"), SKILLS),
    (("Thank you", "Thanks", "Thank you!", "Thanks a lot!", "Thank you very much."), "You are welcome."),
    (("Goodbye", "Bye", "Bye!", "See you later."), "Goodbye!"),
    (("Which shapes do you know?", "Name the shapes.", "List the shapes."),
     "Circle, square, triangle, star and cross."),
    (("Which colors do you know?", "Name the colors.", "List the colors."),
     "Red, green, blue, yellow, orange, purple, black, white, gray, pink, brown and cyan."),
    (("Count to five.", "Can you count to five?"), "One, two, three, four, five."),
)  # fmt: skip

ABOUT_PICTURES = (
    "Who is this?", "Who is in the picture?", "What city is this?", "What animal is this?", "Where was this taken?",
    "Which country is this?", "What brand is this?", "How old is this person?", "What breed is this?",
    "What is the weather like?", "What time is it?", "Who took this photo?", "When was this taken?",
    "Who painted this?", "What kind of car is this?", "What kind of food is this?", "What is the person doing?",
    "What is the man wearing?", "Is this a cat?", "Is this a dog?", "How many people are there?",
    "How much does it cost?", "What season is it?", "What language is this?", "Who made this?", "Is it day or night?",
    "What plant is this?", "What building is this?", "What is this person feeling?", "Which bird is this?",
    "How many cars are there?", "How many animals are there?",
)  # fmt: skip

_COUNTRIES = (
    "France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland Greece "
    "Turkey Peru Chile Cuba Ireland Iceland Australia England America Russia Korea Portugal Austria Finland"
).split()
_THINGS = (
    "dogs cats music history physics math money weather football cars trains planes love food bread cheese coffee "
    "water trees flowers birds fish space stars planets computers phones books movies art games school work health "
    "sleep"
).split()
_PEOPLE = (
    "the president", "the king", "Einstein", "Newton", "Shakespeare", "Mozart", "my mother", "your father", "Napoleon",
    "the mayor", "my friend", "Picasso", "Darwin", "Cleopatra",
)  # fmt: skip
_TEMPLATES = (
    "What is the capital of {country}?", "How many people live in {country}?", "Where is {country}?",
    "What is the largest city in {country}?", "Which language do they speak in {country}?", "How big is {country}?",
    "Tell me about {country}.", "Tell me about {thing}.", "Tell me a joke.", "Tell me a story.",
    "Write a poem about {thing}.", "Write a story about {thing}.", "What do you think about {thing}?",
    "Do you like {thing}?", "Explain {thing}.", "Who invented {thing}?", "What is the best {thing}?",
    "Who is {person}?", "How old is {person}?", "Where does {person} live?", "When was {person} born?",
    "What is {a} plus {b}?", "What is {a} + {b}?", "What is {a} times {b}?", "How much is {a} - {b}?",
    "What is the weather today?", "What day is it?", "What time is it?", "What is the meaning of life?",
    "Can you sing?", "Translate this into French.", "Write a program in Python.", "How do I learn about {thing}?",
    "Why are {thing} important?", "What is the price of {thing}?", "Who won the game?", "Give me a recipe.",
    "Is it going to rain?", "Who wrote this book?", "How far is the moon?", "Why is the sky blue?",
    "What should I eat?", "How do planes fly?", "What are {thing}?",
)  # fmt: skip


def open_question(rng: random.Random) -> tuple[str, str]:
    """A question about the wide world, and the honest answer."""
    question = rng.choice(_TEMPLATES).format(
        country=rng.choice(_COUNTRIES),
        thing=rng.choice(_THINGS),
        person=rng.choice(_PEOPLE),
        a=rng.randint(0, 99),
        b=rng.randint(0, 99),
    )
    return question, UNKNOWN


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Something one says to a chat partner, and its answer."""
    wordings, answer = rng.choice(SMALL_TALK)
    return rng.choice(wordings), answer

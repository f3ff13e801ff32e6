"""From dialogues to packed batches, and a feed of them from many producer processes through shared memory."""

from __future__ import annotations

import mmap
import multiprocessing as mp
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from vlmrt.tools.demo.data import Dialogue
from vlmrt.tools.demo.data import dialogue as make_dialogue
from vlmrt.tools.demo.drawing import Bytes, Clip, Mark, Picture, Scenery
from vlmrt.tools.demo.processing import MERGE_SIZE, UNIT, patch_positions, patches, resized
from vlmrt.tools.demo.tasks import KINDS
from vlmrt.tools.demo.tokenizer import SYSTEM_PROMPT, token_id
from vlmrt.tools.demo.words import COLORS, DIGITS, LETTERS, SHAPES

CELL_KINDS = ("-", *SHAPES, *LETTERS, *DIGITS)  # what one token's part of a picture may hold, for the auxiliary loss
CELL_HUES = ("-", *COLORS)
PATCH_BYTES = 588  # of one frame: 3 channels of 14x14


@dataclass(frozen=True)
class Limits:
    """How much one batch holds at most."""

    dialogues: int = 512
    tokens: int = 131_072
    patches: int = 114_688  # of frames as drawn; an image's two equal frames count once
    units: int = 1536  # vision sequences: an image, or two frames of a clip
    answers: int = 6144


def layout(limits: Limits) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and type of every array of a batch; the first axis is filled as far as `counts` says."""
    return {
        "counts": ((8,), np.int64),  # dialogues, tokens, frame patches, vision patches, units, answers
        "frames": ((limits.patches, PATCH_BYTES), np.uint8),
        "pairs": ((limits.patches, 2), np.int32),  # vision patch -> its two rows of `frames`
        "vision_positions": ((limits.patches, 2), np.int16),
        "unit_lengths": ((limits.units,), np.int32),
        "cells": ((limits.patches // MERGE_SIZE**2, 2), np.int16),  # kind and hue
        "ids": ((limits.tokens,), np.int32),
        "positions": ((limits.tokens, 3), np.int16),
        "is_vision": ((limits.tokens,), np.bool_),
        "answer_of": ((limits.tokens,), np.int32),  # the answer a token belongs to, -1 for none
        "dialogue_lengths": ((limits.dialogues,), np.int32),
        "answer_kinds": ((limits.answers,), np.int16),
        "answer_is_first": ((limits.answers,), np.bool_),
    }


Arrays = dict[str, npt.NDArray[Any]]


def arrays_over(buffer: memoryview | mmap.mmap | bytearray, limits: Limits) -> Arrays:
    """The arrays of one batch as views of a buffer of `num_bytes` bytes."""
    views: Arrays = {}
    offset = 0
    for name, (shape, kind) in layout(limits).items():
        count = int(np.prod(shape))
        views[name] = np.frombuffer(buffer, kind, count, offset).reshape(shape)
        offset += -(-count * np.dtype(kind).itemsize // 64) * 64
    return views


def num_bytes(limits: Limits) -> int:
    """Bytes of one batch."""
    return sum(-(-int(np.prod(shape)) * np.dtype(kind).itemsize // 64) * 64 for shape, kind in layout(limits).values())


@dataclass(frozen=True)
class Unit:
    """One vision sequence: the patches of one frame, or of two consecutive ones of a clip."""

    frames: tuple[Bytes, ...]
    rows: int
    columns: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Encoded:
    """A dialogue as numbers."""

    ids: list[int]
    positions: list[tuple[int, int, int]]
    answer_of: list[int]
    kinds: list[int]
    units: list[Unit]


def units_of(medium: Picture | Clip) -> list[Unit]:
    """A picture's one unit, or a clip's, one for every two frames; the last frame of an odd number stands twice."""
    pictures = [medium] if isinstance(medium, Picture) else list(medium.frames)
    frames = [resized(picture.image) for picture in pictures]
    rows, columns = frames[0].shape[0] // UNIT, frames[0].shape[1] // UNIT
    cut = [patches(frame) for frame in frames]
    return [Unit(tuple(cut[k : k + 2]), rows, columns, pictures[k].marks) for k in range(0, len(cut), 2)]


class Encoder:
    """Dialogues -> token ids, M-RoPE positions and which tokens are answers, as the chat template has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=50_000)(self._encode_text)
        self._start, self._end = token_id(tokenizer, "<|vision_start|>"), token_id(tokenizer, "<|vision_end|>")
        image_pad, video_pad = pad_ids(tokenizer)
        self._pads = {Picture: image_pad, Clip: video_pad}

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text).ids)

    def __call__(self, dialogue: Dialogue) -> Encoded:
        encoded = Encoded([], [], [], [], [])
        system = SYSTEM_PROMPT if dialogue.system is None else dialogue.system
        text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        following = 0

        def add_text(tokens: tuple[int, ...], answer: int = -1) -> None:
            nonlocal following
            encoded.ids.extend(tokens)
            encoded.positions.extend((p, p, p) for p in range(following, following + len(tokens)))
            encoded.answer_of.extend([answer] * len(tokens))
            following += len(tokens)

        for number, turn in enumerate(dialogue.turns):
            text += "<|im_start|>user\n"
            for part in turn.parts:
                if isinstance(part, str):
                    text += part
                    continue
                add_text((*self._encode(text), self._start))
                text = ""
                following = self._add_vision(encoded, part, following)
                add_text((self._end,))
            add_text(self._encode(text + "<|im_end|>\n<|im_start|>assistant\n"))
            add_text(self._encode(turn.answer + "<|im_end|>"), number)
            encoded.kinds.append(KINDS.index(turn.kind))
            text = "\n"
        return encoded

    def _add_vision(self, encoded: Encoded, medium: Picture | Clip, start: int) -> int:
        units = units_of(medium)
        rows, columns = units[0].rows, units[0].columns
        for time in range(len(units)):
            encoded.positions.extend((start + time, start + y, start + x) for y in range(rows) for x in range(columns))
        num_tokens = len(units) * rows * columns
        encoded.ids.extend([self._pads[type(medium)]] * num_tokens)
        encoded.answer_of.extend([-1] * num_tokens)
        encoded.units.extend(units)
        return start + max(rows, columns)


def cell_labels(unit: Unit) -> npt.NDArray[np.int16]:
    """What each token's part of a unit holds the middle of, as kind and hue: [tokens, 2]."""
    labels = np.zeros((unit.rows, unit.columns, 2), np.int16)
    for mark in unit.marks:
        row = min(unit.rows - 1, max(0, int(mark.y * unit.rows)))
        column = min(unit.columns - 1, max(0, int(mark.x * unit.columns)))
        labels[row, column] = CELL_KINDS.index(mark.kind), CELL_HUES.index(mark.hue)
    return labels.reshape(-1, 2)


_positions = lru_cache(maxsize=512)(patch_positions)


class Packer:
    """Lays dialogues one after the other into the arrays of a batch."""

    def __init__(self, arrays: Arrays, limits: Limits, pad_ids: tuple[int, int]) -> None:
        self._arrays, self._limits, self._pad_ids = arrays, limits, pad_ids
        self._counts = [0] * 6

    def add(self, encoded: Encoded) -> bool:
        """Adds one dialogue; False, with nothing changed, if it no longer fits."""
        a, limits = self._arrays, self._limits
        dialogues, tokens, frames, vision, units, answers = self._counts
        new_frames = sum(len(frame) for unit in encoded.units for frame in unit.frames)
        new_vision = sum(len(unit.frames[0]) for unit in encoded.units)
        full = (
            dialogues + 1 > limits.dialogues
            or tokens + len(encoded.ids) > limits.tokens
            or frames + new_frames > limits.patches
            or vision + new_vision > limits.patches
            or units + len(encoded.units) > limits.units
            or answers + len(encoded.kinds) > limits.answers
        )
        if full:
            return False
        for unit in encoded.units:
            size = len(unit.frames[0])
            starts = []
            for frame in unit.frames:
                a["frames"][frames : frames + size] = frame
                starts.append(frames)
                frames += size
            a["pairs"][vision : vision + size, 0] = np.arange(starts[0], starts[0] + size)
            a["pairs"][vision : vision + size, 1] = np.arange(starts[-1], starts[-1] + size)
            a["vision_positions"][vision : vision + size] = _positions(unit.rows, unit.columns)
            a["cells"][vision // 4 : (vision + size) // 4] = cell_labels(unit)
            a["unit_lengths"][units] = size
            vision, units = vision + size, units + 1
        stop = tokens + len(encoded.ids)
        a["ids"][tokens:stop] = encoded.ids
        a["positions"][tokens:stop] = encoded.positions
        a["is_vision"][tokens:stop] = np.isin(a["ids"][tokens:stop], self._pad_ids)
        local = np.array(encoded.answer_of, np.int32)
        a["answer_of"][tokens:stop] = np.where(local >= 0, local + answers, -1)
        a["dialogue_lengths"][dialogues] = len(encoded.ids)
        a["answer_kinds"][answers : answers + len(encoded.kinds)] = encoded.kinds
        a["answer_is_first"][answers : answers + len(encoded.kinds)] = [k == 0 for k in range(len(encoded.kinds))]
        self._counts = [dialogues + 1, stop, frames, vision, units, answers + len(encoded.kinds)]
        return True

    def finish(self) -> None:
        """Writes the counts; the batch is then complete."""
        self._arrays["counts"][:6] = self._counts


def pad_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the image and the video placeholder."""
    return token_id(tokenizer, "<|image_pad|>"), token_id(tokenizer, "<|video_pad|>")


def pack(dialogues: list[Dialogue], tokenizer: Tokenizer, limits: Limits | None = None) -> Arrays:
    """One batch of these dialogues, or of as many of the first as fit."""
    limits = limits or Limits()
    arrays = arrays_over(bytearray(num_bytes(limits)), limits)
    packer, encoder = Packer(arrays, limits, pad_ids(tokenizer)), Encoder(tokenizer)
    for dialogue in dialogues:
        if not packer.add(encoder(dialogue)):
            break
    packer.finish()
    return arrays


def _produce(
    seed: int,
    slots: list[Arrays],
    limits: Limits,
    tokenizer: Tokenizer,
    scenery: Scenery,
    weights: Mapping[str, float],
    free: Queue[int],
    ready: Queue[int],
) -> None:
    rng, encoder = random.Random(seed), Encoder(tokenizer)
    while True:
        slot = free.get()
        packer = Packer(slots[slot], limits, pad_ids(tokenizer))
        while packer.add(encoder(make_dialogue(rng, scenery, weights))):
            pass
        packer.finish()
        ready.put(slot)


class Feed:
    """Batches made by producer processes in shared memory; the consumer gives each slot back once it has copied it."""

    def __init__(
        self,
        tokenizer_file: Path,
        scenery: Scenery,
        weights: Mapping[str, float],
        *,
        num_workers: int,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> None:
        self.limits = limits or Limits()
        context = mp.get_context("fork")  # before CUDA starts: the children share the slots and the photographs
        self.buffers = [mmap.mmap(-1, num_bytes(self.limits)) for _ in range(num_workers * 2 + 2)]
        self.slots = [arrays_over(buffer, self.limits) for buffer in self.buffers]
        self._free: Queue[int] = context.Queue()
        self._ready: Queue[int] = context.Queue()
        for slot in range(len(self.slots)):
            self._free.put(slot)
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        shared = (self.slots, self.limits, tokenizer, scenery, weights, self._free, self._ready)
        self._workers = [
            context.Process(target=_produce, args=(seed * 1000 + k, *shared), daemon=True) for k in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def next_slot(self) -> int:
        """Waits for a finished batch; its arrays stay as they are until `give_back`."""
        return self._ready.get(timeout=120)

    def waiting(self) -> int:
        """How many finished batches wait."""
        return self._ready.qsize()

    def give_back(self, slot: int) -> None:
        """Lets a producer write into the slot again."""
        self._free.put(slot)

    def close(self) -> None:
        """Ends the producers."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()

"""Asks a checkpoint through transformers, in this process: the reference that any server must agree with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from vlmrt.tools.demo.batches import units_of
from vlmrt.tools.demo.data import Dialogue
from vlmrt.tools.demo.drawing import Clip, Picture
from vlmrt.tools.demo.processing import IMAGE_MEAN, IMAGE_STD

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


def clip_patches(clip: Clip) -> tuple[Tensor, list[int]]:
    """A clip's normalised patches [N, 1176] and its grid (time, height, width), without torchvision."""
    units = units_of(clip)
    frames = np.concatenate([np.stack([unit.frames[0], unit.frames[-1]], axis=1) for unit in units])
    wide = torch.from_numpy(frames).view(-1, 2, 3, 14 * 14).transpose(1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((wide - mean) / std).flatten(1), [len(units), units[0].rows * 2, units[0].columns * 2]


class TransformersChat:
    """A loaded checkpoint that answers the last question of a dialogue greedily."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def inputs(self, dialogue: Dialogue) -> dict[str, Any]:
        """What the model takes for this dialogue, up to where the last answer begins."""
        messages: list[dict[str, Any]] = []
        if dialogue.system:
            messages.append({"role": "system", "content": dialogue.system})
        images, clips = [], []
        for turn in dialogue.turns:
            content: list[dict[str, Any]] = []
            for part in turn.parts:
                match part:
                    case str():
                        content.append({"type": "text", "text": part})
                    case Picture():
                        content.append({"type": "image"})
                        images.append(part.image)
                    case Clip():
                        content.append({"type": "video"})
                        clips.append(part)
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
        text = self._tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        inputs: dict[str, Any] = {}
        if images:
            inputs |= self._images(images=images, return_tensors="pt")
            text = _expanded(text, IMAGE_PAD, inputs["image_grid_thw"].tolist())
        if clips:
            patches, grids = zip(*(clip_patches(clip) for clip in clips), strict=True)
            inputs |= {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
            text = _expanded(text, VIDEO_PAD, list(grids))
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        config = self.model.config
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}

    @torch.no_grad()
    def answer(self, dialogue: Dialogue) -> str:
        """The greedy answer to the dialogue's last question; answers before it stand as they are written."""
        inputs = self.inputs(dialogue)
        output = self.model.generate(**inputs, max_new_tokens=96, do_sample=False)
        answer: str = self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


def _expanded(text: str, pad: str, grids: list[list[int]]) -> str:
    """The text with each placeholder repeated as often as its medium has tokens."""
    pieces = text.split(pad)
    filled = [pad * (t * h * w // 4) for t, h, w in grids]
    return "".join(piece + fill for piece, fill in zip(pieces, [*filled, ""], strict=True))

"""transformers as the judge: what the reference makes of a chat, and whether a greedy answer is the reference's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from tests.pictures import Picture

TIE = 1e-4  # of the best logit, in float32
MEDIA_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


class Verdict(NamedTuple):
    """How many of the tokens were the reference's argmax, and how many within TIE of it."""

    num_argmax: int
    num_ties: int


class Reference:
    """A checkpoint in transformers, float32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def inputs(self, messages: list[dict[str, Any]], pictures: list[Picture]) -> dict[str, torch.Tensor]:
        """input_ids [1, T] and, with pictures, pixel_values and image_grid_thw."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tensors: dict[str, torch.Tensor] = {}
        if pictures:
            images = [ImageOps.exif_transpose(Image.open(io.BytesIO(p.data))).convert("RGB") for p in pictures]
            made = self.processor(images=images, return_tensors="pt")
            tensors = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
            pieces = text.split("<|image_pad|>")
            assert len(pieces) == len(pictures) + 1
            counts = [int(grid.prod()) // self.processor.merge_size**2 for grid in made["image_grid_thw"]]
            text = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        tensors["input_ids"] = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return tensors

    @torch.inference_mode()
    def judge(self, inputs: dict[str, torch.Tensor], output_ids: list[int]) -> Verdict:
        """Feed our own tokens; each must be the reference's argmax or within TIE of its best logit.

        The answer goes in as a second call on the prompt's cache, where a generated placeholder is a token like others.
        """
        prompt = inputs["input_ids"]
        media = {name: inputs[name] for name in MEDIA_INPUTS if name in inputs}
        config = self.model.config
        types = (prompt == config.image_token_id).int() + 2 * (prompt == config.video_token_id).int()
        begun = self.model(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=types,
            use_cache=True,
            **media,
        )
        first = prompt.shape[1] + (int(self.model.model.rope_deltas) if media else 0)
        answer = torch.tensor([output_ids[:-1]])
        positions = (first + torch.arange(answer.shape[1])).expand(3, 1, -1)
        continued = self.model(input_ids=answer, position_ids=positions, past_key_values=begun.past_key_values)
        logits = torch.cat([begun.logits[0, -1:], continued.logits[0]])
        best = logits.max(dim=-1).values
        chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
        gaps = best - chosen
        worst = int(gaps.argmax())
        assert gaps[worst] <= TIE, f"token {worst} is {gaps[worst]:.2e} below the reference's best logit"
        num_ties = int((gaps > 0).sum())
        return Verdict(len(output_ids) - num_ties, num_ties)

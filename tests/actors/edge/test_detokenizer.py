"""Whole characters only, all of them, and stop strings cut exactly."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlmrt.actors.edge.detokenizer import Detokenizer, StopFinder, TextRule, Vocabulary

CORPUS = ("the answer is plain text and more text, thoroughly", "漢字 你好 世界", "emoji 🙂🙃 👩‍👩‍👧", "مرحبا é è ü")
TEXTS = (
    "plain text",
    "漢字かな交じり文、你好世界",
    "🙂👩‍👩‍👧‍👦🇩🇪 flags and families",
    "mixed é漢🙂 end",
    "  spaces   and\n\nlines\t",
    "�� real replacement characters �",
    "<tool_call>{}</tool_call>",
    "",
)


def _byte_level(trained: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 if trained else 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(CORPUS if trained else (), trainer)
    tokenizer.add_special_tokens(["<|im_end|>", "<|image_pad|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("工具", normalized=False)])
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator(["plain text with words", "and some more text"], trainer)
    return tokenizer


TOKENIZERS = {"bytes": _byte_level(False), "byte-level": _byte_level(True)}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def spoken(detokenizer: Detokenizer, ids: list[int], rng: random.Random) -> list[str]:
    """Pieces for tokens that come in groups of random sizes."""
    pieces = []
    at = 0
    while at < len(ids):
        size = rng.randrange(1, 4)
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_full_decode_and_split_no_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = spoken(Detokenizer(VOCABULARIES[name]), ids, random.Random(text))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_at_all_join_to_the_full_decode(name: str, data: st.DataObject) -> None:
    """Random ids are mostly broken UTF-8, as models without training speak."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    pieces = spoken(Detokenizer(VOCABULARIES[name]), ids, random.Random(0))
    assert "".join(pieces) == tokenizer.decode(ids)


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_vocabulary_that_is_not_byte_level_decodes_alike(text: str) -> None:
    tokenizer = _METASPACE
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = spoken(Detokenizer(_METASPACE_VOCABULARY), ids, random.Random(0))
    assert "".join(pieces) == tokenizer.decode(ids)
    if "�" not in tokenizer.decode(ids):
        assert not any("�" in piece for piece in pieces)


_METASPACE = _metaspace()
_METASPACE_VOCABULARY = Vocabulary(_METASPACE)


def test_special_tokens_and_unknown_ids_are_silent() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(VOCABULARIES["byte-level"])
    end = tokenizer.get_vocab()["<|im_end|>"]
    assert detokenizer.push([end, *tokenizer.encode("hi").ids, end, 99_999]) + detokenizer.flush() == "hi"


STOPS = ("\n\n", "END", "漢字", "🙂", "aab", "<|im_end|>", "x" * 30)


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_cut_at_every_byte_never_leaks(stop: str) -> None:
    """Byte tokens: the stop's bytes come one at a time, or in any two groups."""
    vocabulary = VOCABULARIES["bytes"]
    before, after = "some aa text ", " and more"
    ids = byte_ids(before + stop + after)
    for cut in range(1, len(ids)):
        for groups in ([ids[:cut], ids[cut:]], [[id] for id in ids], [ids[:cut], *([id] for id in ids[cut:])]):
            detokenizer = Detokenizer(vocabulary, TextRule((stop,)))
            shown = "".join(detokenizer.push(group) for group in groups) + detokenizer.flush()
            assert shown == before
            assert detokenizer.stop == stop


def byte_ids(text: str) -> list[int]:
    """One token per byte."""
    vocab = TOKENIZERS["bytes"].get_vocab()
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [vocab[char] for piece, _ in encoded for char in piece]


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_text_is_cut_at_the_first_stop_however_it_arrives(text: str, stops: list[str], sizes: list[int]) -> None:
    finder = StopFinder(stops)
    shown = ""
    at = 0
    for size in [*sizes, *[1] * len(text)]:
        shown += finder.push(text[at : at + size])
        at += size
        assert text.startswith(shown)
        if finder.found is not None:
            break
    shown += finder.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, finder.found) == (text, None)
    else:
        assert finder.found is not None
        assert finder.found not in shown
        assert text.startswith(shown + finder.found)
        assert len(shown + finder.found) == min(ends)
        assert len(finder.found) == max(len(stop) for stop in stops if text[: min(ends)].endswith(stop))


def test_text_that_only_looked_like_a_stop_comes_out_at_the_end() -> None:
    finder = StopFinder(("END",))
    assert finder.push("the EN") == "the "
    assert finder.push("") == ""
    assert finder.flush() == "EN"


def test_stop_strings_wait_for_min_tokens() -> None:
    vocabulary, ids = VOCABULARIES["bytes"], byte_ids("aXbXc")
    detokenizer = Detokenizer(vocabulary, TextRule(("X",)), min_tokens=2)
    assert "".join(detokenizer.push([id]) for id in ids) == "aXb"
    assert detokenizer.stop == "X"
    detokenizer = Detokenizer(vocabulary, TextRule(("X",)), min_tokens=2)
    assert detokenizer.push(ids) == "aXb"


def test_a_stop_string_may_be_shown() -> None:
    for groups in (["one END two"], list("one END two")):
        finder = StopFinder(("END",), include=True)
        assert "".join(map(finder.push, groups)) + finder.flush() == "one END"


def test_special_tokens_may_be_shown() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    end = tokenizer.get_vocab()["<|im_end|>"]
    ids = [*tokenizer.encode("hi", add_special_tokens=False).ids, end, 99_999]
    detokenizer = Detokenizer(VOCABULARIES["byte-level"], TextRule(skip_special_tokens=False))
    assert detokenizer.push(ids) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=False)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (("aabb", "ab"), "xaabbc", "xa"),
        (("b", "aab", "ab"), "xaabbc", "x"),
        (("abcd", "bc", "d"), "xabcd", "xa"),
    ],
)
def test_of_several_stops_the_one_complete_first_counts_and_then_the_longest(
    stops: tuple[str, ...], text: str, shown: str
) -> None:
    for groups in ([text], list(text), [text[:2], text[2:]]):
        for order in (stops, stops[::-1]):
            finder = StopFinder(order)
            assert "".join(map(finder.push, groups)) == shown

"""What a choice says depends on its tokens alone, and its logprobs are of exactly the text that is shown."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.actors.edge.running import fake_logprobs
from tests.actors.edge.test_detokenizer import TOKENIZERS, VOCABULARIES
from vlmrt.actors.edge.choice import Choice, ChoiceRule, Delta, Piece, PlainText, ShownReason
from vlmrt.actors.edge.detokenizer import TextRule
from vlmrt.runtime.messages import FinishReason, RequestId, Sampling, StopRule, TokenOutput, Usage

TOKENIZER, VOCABULARY = TOKENIZERS["byte-level"], VOCABULARIES["byte-level"]
END = TOKENIZER.get_vocab()["<|im_end|>"]
PAD = TOKENIZER.get_vocab()["<|image_pad|>"]
PIECES = ("a", "b", "ab", " ", "漢", "🙂", "é")
EVERY_ID = [id for piece in PIECES for id in TOKENIZER.encode(piece, add_special_tokens=False).ids]
BROKEN = [TOKENIZER.get_vocab()[char] for char in "ðŁĻã"]  # bytes of no whole character, and a continuation


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return encoded


def output(token_ids: list[int], reason: FinishReason | None = None) -> TokenOutput:
    logprobs = tuple(fake_logprobs(token_id, 2) for token_id in token_ids)
    return TokenOutput(RequestId("r"), tuple(token_ids), Usage(1, 0, 0), reason, None, logprobs)


def rule(stop: StopRule | None = None, **text: Any) -> ChoiceRule:
    return ChoiceRule(Sampling(num_logprobs=2), stop or StopRule(100), TextRule(**text))


def spoken(choice: Choice, token_ids: list[int], sizes: list[int], reason: FinishReason) -> list[Piece]:
    """Pieces for tokens that come in groups of these sizes, then one by one."""
    pieces = []
    done = 0
    for size in [*sizes, *[1] * len(token_ids)]:
        group = token_ids[done : done + size]
        done += len(group)
        piece = choice.take([output(group, reason if done == len(token_ids) else None)])
        if piece is not None:
            pieces.append(piece)
        if choice.ended:
            break
    return pieces


class Joined:
    """All that came of a choice."""

    def __init__(self, pieces: list[Piece], choice: Choice) -> None:
        self.text = "".join(piece.content for piece in pieces)
        self.tokens = [token for piece in pieces for token in piece.tokens]
        self.token_ids = [id for piece in pieces for id in piece.token_ids]
        self.end = (pieces[-1].finish_reason, pieces[-1].stop_reason, choice.num_tokens)
        self.text_bytes = b"".join(token.text_bytes for token in self.tokens)

    @property
    def key(self) -> tuple[object, ...]:
        return self.text, self.tokens, self.token_ids, self.end


token_lists = st.lists(st.sampled_from([*EVERY_ID, *BROKEN, END, PAD]), min_size=1, max_size=25)
text_rules = st.builds(
    TextRule,
    stops=st.lists(st.sampled_from(["ab", "b ", "漢", "🙂a", "aab", "\ufffd", "<|im", "é"]), max_size=3).map(tuple),
    include_stop=st.booleans(),
    skip_special_tokens=st.booleans(),
)


@given(token_lists, text_rules, st.integers(0, 3), st.booleans(), st.lists(st.integers(1, 5), max_size=12))
@settings(max_examples=300, deadline=None)
def test_groups_of_tokens_change_nothing_and_bytes_rebuild_the_text(
    token_ids: list[int], text: TextRule, min_tokens: int, ends: bool, sizes: list[int]
) -> None:
    reason: FinishReason = "stop" if ends else "length"
    token_ids = [*token_ids, END] if ends else token_ids
    how = ChoiceRule(Sampling(num_logprobs=2), StopRule(100, min_tokens, (END,)), text)
    one, grouped, whole = (Choice(0, how, VOCABULARY) for _ in range(3))
    single = Joined(spoken(one, token_ids, [], reason), one)
    pieces = spoken(grouped, token_ids, sizes, reason)
    assert Joined(pieces, grouped).key == single.key
    assert Joined(spoken(whole, token_ids, [len(token_ids)], reason), whole).key == single.key
    assert single.text_bytes.decode(errors="replace") == single.text
    shown, decoded = "", single.text_bytes
    for piece in pieces:
        shown += piece.content
        for token in piece.tokens:  # never before the text that it is part of
            assert token.offset <= len(shown)
            assert decoded.startswith(token.text_bytes)
            decoded = decoded[len(token.text_bytes) :]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@given(token_lists, text_rules, st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_the_text_is_the_full_decode_up_to_the_first_stop(
    token_ids: list[int], text: TextRule, min_tokens: int
) -> None:
    how = ChoiceRule(Sampling(), StopRule(100, min_tokens), text)
    choice = Choice(0, how, VOCABULARY)
    got = Joined(spoken(choice, token_ids, [2, 3], "length"), choice)
    expected: str = TOKENIZER.decode(token_ids, skip_special_tokens=text.skip_special_tokens)
    if got.end[0] == "length":
        assert got.text == expected
        assert got.end == ("length", None, len(token_ids))
        assert min_tokens or not any(stop in expected for stop in text.stops)
        return
    stop = got.end[1]
    assert isinstance(stop, str)
    assert got.text.endswith(stop) if text.include_stop else expected.startswith(got.text + stop)
    assert got.token_ids == token_ids[: got.end[2]]


def test_the_token_that_ends_an_answer_is_counted_but_not_shown() -> None:
    choice = Choice(0, rule(StopRule(100, 0, (END,))), VOCABULARY)
    got = Joined(spoken(choice, [*ids("ab"), END], [], "stop"), choice)
    assert (got.text, got.end) == ("ab", ("stop", None, len(ids("ab")) + 1))
    assert got.token_ids[-1] == END
    assert END not in [token.token_id for token in got.tokens]


def test_a_hidden_token_within_the_text_has_an_entry_without_bytes() -> None:
    choice = Choice(0, rule(), VOCABULARY)
    got = Joined(spoken(choice, [*ids("a"), PAD, *ids("b"), PAD], [], "length"), choice)
    assert got.text == "ab"
    assert [token.text_bytes for token in got.tokens] == [b"a", b"", b"b", b""]


def test_the_token_cut_by_a_stop_string_keeps_the_bytes_before_it() -> None:
    merged = TOKENIZER.get_vocab()["the"]
    choice = Choice(0, rule(stops=("e",)), VOCABULARY)
    got = Joined(spoken(choice, [*ids("a "), merged, *ids("b")], [], "length"), choice)
    assert (got.text, got.end[:2]) == ("a th", ("stop", "e"))
    assert got.tokens[-1].text_bytes == b"th"
    assert got.tokens[-1].token_id == merged


def test_a_stop_token_of_the_client_is_named() -> None:
    (stop,) = ids("b")
    how = ChoiceRule(Sampling(), StopRule(100, 0, (END, stop)), named_stop_ids=frozenset((stop,)))
    for last, expected in ((stop, stop), (END, None)):
        choice = Choice(0, how, VOCABULARY)
        got = Joined(spoken(choice, [*ids("a"), last], [], "stop"), choice)
        assert (got.text, got.end[:2]) == ("a", ("stop", expected))


class Shouting:
    """Holds the last word back, and ends in its own way."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        *words, self._held = (self._held + text).split(" ")
        return [Delta(word.upper()) for word in words]

    def finish(self, reason: FinishReason) -> tuple[list[Delta], ShownReason]:
        return [Delta(self._held)], "tool_calls"


def test_a_shape_makes_deltas_and_the_reason() -> None:
    how = ChoiceRule(Sampling(num_logprobs=0), StopRule(100), shape=Shouting)
    choice = Choice(4, how, VOCABULARY)
    pieces = spoken(choice, ids("a b ab"), [], "stop")
    assert [delta for piece in pieces for delta in piece.deltas] == [Delta("A"), Delta("B"), Delta("ab")]
    assert [piece.finish_reason for piece in pieces] == [None, None, "tool_calls"]
    assert b"".join(token.text_bytes for piece in pieces for token in piece.tokens) == b"a b ab"
    assert {piece.index for piece in pieces} == {4}
    assert list(PlainText().push("")) == []

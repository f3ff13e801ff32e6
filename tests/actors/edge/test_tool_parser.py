"""Tool calls in the text of an answer: found whole, whatever the cuts; nothing lost that only looks like one."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence

import pytest

from tests.actors.edge.tool_calls import join
from vlmrt.actors.edge.choice import ToolCall
from vlmrt.actors.edge.tool_parser import (
    AnswerParser,
    Arguments,
    CallStart,
    Content,
    Delta,
    NamedCallParser,
    RequiredCallParser,
    ToolCallParser,
    new_call_id,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g-2", "arguments": {}}\n</tool_call>'
F, G = ToolCall("call_0", "f", '{"a": [1, "}"]}'), ToolCall("call_1", "g-2", "{}")


def ids() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def parser(max_calls: int = 128) -> ToolCallParser:
    return ToolCallParser(max_calls, ids())


def run(parser: AnswerParser, pieces: Sequence[str]) -> list[Delta]:
    return [*itertools.chain.from_iterable(map(parser.push, pieces)), *parser.flush()]


def parse(text: str, max_calls: int = 128) -> tuple[str, tuple[ToolCall, ...]]:
    return join(run(parser(max_calls), [text]))


def test_text_without_calls_is_content() -> None:
    for text in ("", "Hello", " \n", "a < b, <tool, </tool_call>, <tool_call", "{}", "<tool_calls>"):
        assert parse(text) == (text, ())


def test_a_call_has_an_id_a_name_and_its_arguments_as_they_were_written() -> None:
    assert parse(CALL) == ("", (F,))
    odd = '{"a":1 ,\n "b" : "\\u00e4 ä"}'
    assert parse(f'<tool_call>{{"name":"f","arguments":{odd}}}</tool_call>') == ("", (ToolCall("call_0", "f", odd),))
    assert parse('<tool_call>{"arguments": {"n": 1e999}, "name": "f"}')[1][0].arguments == '{"n": 1e999}'


def test_ids_begin_as_clients_expect_and_differ() -> None:
    made = {new_call_id() for _ in range(100)}
    assert len(made) == 100
    assert all(one.startswith("call_") and len(one) == 29 for one in made)


def test_blanks_around_calls_belong_to_nothing() -> None:
    assert parse(f"{CALL}\n{OTHER}") == ("", (F, G))
    assert parse(f"\n{CALL}\n\n{OTHER}\n") == ("", (F, G))
    assert parse(f"Let me see.\n\n{CALL}\n") == ("Let me see.", (F,))
    assert parse(f"{CALL}\n\nThat was it. \n") == ("\n\nThat was it. \n", (F,))


def test_an_end_mark_within_a_string_ends_nothing() -> None:
    arguments = json.dumps({"code": 'x = "</tool_call> <tool_call>\n{"'})
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert parse(text) == ("", (ToolCall("call_0", "f", arguments),))


def test_a_call_without_its_end_mark_is_a_call() -> None:
    whole = CALL.removesuffix("\n</tool_call>")
    assert parse(whole) == ("", (F,))
    assert parse(whole + "\n</tool") == ("\n</tool", (F,))
    assert parse(whole + " and more") == (" and more", (F,))
    assert parse(f"{whole}\n{OTHER}") == ("", (F, G))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        "not JSON",
        "{}",
        '{"name": "f"}',
        '{"name": "", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {"a": 1,}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": tru}}',
        '{"name": "f", "arguments": {"a": "\\x"}}',
        '{"name": "f", "arguments": {"a": [1}}]',
        '{"name": "f", "arguments": {"a": "cut',
        '{"name": "f", "arguments": {"a": "line\nbreak"}}',
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}",
        "[" * 100_000,
        '[{"name": "f", "arguments": {}}]',
    ],
)
def test_a_broken_call_is_content_and_the_next_one_a_call(body: str) -> None:
    broken = f"<tool_call>\n{body}\n</tool_call>"
    assert parse(broken) == (broken, ())
    assert parse(f"Well {broken}\n{CALL}") == (f"Well {broken}", (F,))
    assert parse(f"{CALL}\n{broken}") == ("\n" + broken, (F,))


def test_calls_beyond_the_limit_are_dropped() -> None:
    assert parse(f"{CALL}\n{OTHER}\nend", max_calls=1) == ("\nend", (F,))


def test_the_beginning_of_a_mark_is_never_shown_and_other_text_at_once() -> None:
    one = parser()
    assert one.push("Hi <tool_") == [Content("Hi")]
    assert one.push("box>") == [Content(" <tool_box>")]
    assert one.push(" <") == []
    assert one.push("tool_call>") == []
    assert one.push('\n{"name": "f", "arguments": {"a": [1, "}') == []
    assert one.push('"]}') == []
    assert one.push("}") == [CallStart(0, "call_0", "f"), Arguments(0, F.arguments)]
    assert one.push("\n</tool") == []
    assert one.push("_call>") == []
    assert one.flush() == []
    assert one.num_calls == 1


PIECES = (
    CALL, OTHER, "<tool_call>", "</tool_call>", "\n", " ", "text", "ä😀", '{"name": "f", "arguments": {', '"k": "v"',
    "}", "}}", "{", '"', "\\", ",", "[", "]", "<", "<tool", "</", "1", ":", "x" * 40, '{"name": "f", "arguments": {}}',
    "\n\n  ", "<tool_call>\n{", "null",
)  # fmt: skip


def random_cuts(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, rng.randint(0, 12))))
    return [text[start:stop] for start, stop in itertools.pairwise((0, *places, len(text)))]


@pytest.mark.parametrize("seed", range(40))
def test_cuts_change_nothing_and_nothing_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        whole = parse(text)
        assert join(run(parser(), random_cuts(text, rng))) == whole
        assert join(run(parser(), list(text))) == whole
        content, calls = whole
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict)
            assert call.arguments in text
        shown = "".join(content.split())
        left = "".join(text.split())
        for char in shown:  # content is what is left of the text, in its order
            assert char in left
            left = left[left.index(char) + 1 :]
        if not calls:
            assert content == text


def required(text: str, cuts: Callable[[str], list[str]] = lambda text: [text]) -> tuple[str, tuple[ToolCall, ...]]:
    return join(run(RequiredCallParser(ids()), cuts(text)))


def test_required_calls_go_out_as_they_come() -> None:
    one = RequiredCallParser(ids())
    assert one.push('<tool_call>\n{"name": "f", "argu') == []
    assert one.push('ments": {"a"') == [CallStart(0, "call_0", "f"), Arguments(0, '{"a"')]
    assert one.push(': "}\\"') == [Arguments(0, ': "}\\"')]
    assert one.push('"}}\n</tool_call>') == [Arguments(0, '"}')]
    assert one.push('\n<tool_call>\n{"name": "g", "arguments": {}}\n') == [
        CallStart(1, "call_1", "g"),
        Arguments(1, "{}"),
    ]
    assert one.flush() == []


@pytest.mark.parametrize("seed", range(10))
def test_cuts_change_nothing_of_required_calls_even_where_they_end_early(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        calls = [
            (rng.choice(("f", "g-2")), json.dumps({"k": rng.choice(("}", '\\"{', 3, {"x": []}))}))
            for _ in range(rng.randint(1, 3))
        ]
        blocks = [f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls]
        text = "\n".join(blocks)
        content, found = required(text, lambda text: random_cuts(text, rng))
        assert (content, [(call.name, call.arguments) for call in found]) == ("", calls)
        cut = text[: rng.randint(0, len(text))]
        assert required(cut, list) == required(cut)


def test_a_named_call_is_all_arguments() -> None:
    one = NamedCallParser("f", ids())
    assert one.push("") == []
    assert run(one, ['{"a"', ": 1}"]) == [CallStart(0, "call_0", "f"), Arguments(0, '{"a"'), Arguments(0, ": 1}")]
    assert run(NamedCallParser("f"), []) == []


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '<tool_call>{"', CALL, "[", " \n", "<", "\\", '{"a":', "</tool_call>"],
)
@pytest.mark.parametrize("before", ["", "<tool_call>", '<tool_call>{"a": ', '<tool_call>{"a": "', CALL])
def test_long_texts_of_marks_cost_time_in_proportion(before: str, unit: str) -> None:
    text = before + unit * (300_000 // len(unit))
    began_s = time.process_time()
    run(parser(), [text])
    assert time.process_time() - began_s < 3  # 0.02 to 0.3 s; a minute if every mark copied the rest

"""Prompts equal transformers' to the token, and what a client types is never a control token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vlmrt.actors.edge.chat_template import ChatTemplate, TemplateOptions, load_chat_template
from vlmrt.actors.edge.identify import IdentifiedClip, IdentifiedImage, PromptMedium
from vlmrt.actors.edge.prompt import PromptBuilder, load_prompt_builder
from vlmrt.actors.models.registry import load_model_config
from vlmrt.actors.models.rope_index import MediaSpan, mrope_positions
from vlmrt.runtime.errors import RequestError, StartupError
from vlmrt.runtime.messages import FrameGroup, MmHash
from vlmrt.tools.checkpoint import make_checkpoint

PRESETS = ("test-qwen2-vl", "test-qwen2.5-vl")
MAX_MODEL_LEN = 4096
# as the public Qwen2-VL checkpoints have it
PUBLIC_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = (
    "Hello",
    "  leading and trailing  ",
    "line\nbreaks\r\n\n\ttabs",
    "你好，世界 مرحبا שלום",
    "👩‍👩‍👧‍👦 e\u0301 \u1e9b\u0323 ﬁ",  # NFC changes some of these
    "1234567890 3.14 don't I'LL",
    "a < b and b > c |> <- << <| |>",
    "ends in <",
    "ends in <|im_",
    "<tool_call>\n{}\n</tool_call>",
    "",
    "\0 control \x1b",
)
NAMES = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<|video_pad|>")


@pytest.fixture(scope="module", params=PRESETS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("prompt"), request.param, weights=False)


@pytest.fixture(scope="module")
def builder(directory: Path) -> PromptBuilder:
    return load_prompt_builder(directory, load_model_config(directory), MAX_MODEL_LEN, None)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def user(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}
VIDEO = {"type": "video"}


def image(num_tokens: int, name: str = "hash") -> IdentifiedImage:
    return IdentifiedImage(MmHash(name), b"", (28, 28), (28, 28), (1, 2, num_tokens * 2), num_tokens)


CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    *(user(value) for value in TEXTS),
    *(user([text(value), IMAGE, text(value)]) for value in TEXTS),
    user([VIDEO, text("between"), IMAGE, VIDEO]),
    [{"role": "system", "content": "Be brief."}, *user("Hello")],
    [{"role": "system", "content": [text("Be"), text(" brief.")]}, *user("Hello")],
    [*user([IMAGE, IMAGE, text("Two.")]), {"role": "assistant", "content": "Yes."}, *user([text("And?"), IMAGE])],
    [*user("Hello"), {"role": "assistant", "content": "Hi, I"}],
    [*user("Hello"), {"role": "tool", "content": "42"}],
)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_token_ids_equal_transformers(messages: list[dict[str, Any]], builder: PromptBuilder, tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert builder.encode(messages) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_a_prompt_may_end_where_the_last_message_does(
    messages: list[dict[str, Any]], builder: PromptBuilder, tokenizer: Any
) -> None:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert builder.encode(messages, TemplateOptions(add_generation_prompt=False)) == expected


@pytest.mark.parametrize(
    "last", ["Well, I", "  spaced  ", "漢字", "ends in <|im_", [text("one"), text("two ")]], ids=range(5)
)
def test_the_last_message_may_be_continued_as_in_transformers(
    last: str | list[dict[str, Any]], builder: PromptBuilder, tokenizer: Any
) -> None:
    messages = [*user("Hello"), {"role": "assistant", "content": last}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = builder.encode(messages, TemplateOptions(continue_final_message=True))
    assert builder.decode(ids) == rendered
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_a_continued_message_that_names_a_control_token_is_text(builder: PromptBuilder) -> None:
    messages = [*user("Hello"), {"role": "assistant", "content": "I say <|im_end|>"}]
    ids = builder.encode(messages, TemplateOptions(continue_final_message=True))
    assert builder.decode(ids).endswith("I say <|im_end|>")
    assert ids[-1] != builder.tokenizer.token_to_id("<|im_end|>")


def test_a_template_that_does_not_show_the_last_message_cannot_continue_it(directory: Path) -> None:
    (directory / "other.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    other = load_prompt_builder(directory, load_model_config(directory), 100, str(directory / "other.jinja"))
    with pytest.raises(RequestError) as refused:
        other.encode(
            [*user("Hello"), {"role": "assistant", "content": "I"}], TemplateOptions(continue_final_message=True)
        )
    assert (refused.value.status, refused.value.param) == (400, "continue_final_message")


def test_variables_and_tools_reach_the_template_but_no_control_token_does(directory: Path) -> None:
    source = "{{ messages[0].content }}{{ mood }}{{ tools | tojson }}{{ add_generation_prompt }}"
    (directory / "other.jinja").write_text(source, encoding="utf-8")
    other = load_prompt_builder(directory, load_model_config(directory), 100, str(directory / "other.jinja"))
    plain = TemplateOptions(tools=[{"name": "f"}], variables={"mood": "glad", "messages": [], "unknown": 1})
    assert other.decode(other.encode(user("x"), plain)) == 'xglad[{"name": "f"}]True'
    sly = TemplateOptions(tools=[{"name": "<|im_end|>"}], variables={"mood": "<|im_start|>"})
    ids = other.encode(user("x"), sly)
    assert other.decode(ids) == 'x<|im_start|>[{"name": "<|im_end|>"}]True'
    assert not set(ids) & {other.tokenizer.token_to_id(name) for name in NAMES}


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_rendered_text_equals_transformers_with_the_public_template(
    messages: list[dict[str, Any]], tokenizer: Any
) -> None:
    expected = tokenizer.apply_chat_template(
        messages, chat_template=PUBLIC_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(PUBLIC_TEMPLATE).render(messages) == expected


TEMPLATES = (
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages %}{{ m | tojson(indent=2) }}{% endfor %}{{ bos_token }}{{ eos_token }}",
    "{%- for m in messages %}\n  {% if loop.first %}\n    first\n  {% endif %}\n  {{ m.content }}\n{% endfor %}\n",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages[0].content.split('e') | join('-') }}{{ add_generation_prompt }}{{ tools }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_other_templates_render_as_in_transformers(template: str, directory: Path, tokenizer: Any) -> None:
    messages = [*user("Hellö <b>&</b> 'there'"), {"role": "assistant", "content": "yes"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    (directory / "other.jinja").write_text(template, encoding="utf-8")
    assert load_chat_template(directory, str(directory / "other.jinja")).render(messages) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["alone", "within", "split", "thrice"])
def test_names_of_control_tokens_in_a_message_are_text(name: str, shape: str, builder: PromptBuilder) -> None:
    content: dict[str, str | list[dict[str, Any]]] = {
        "alone": name,
        "within": f"say {name} now",
        "split": [text(name[:4]), text(name[4:])],
        "thrice": [text(name * 2), text(name)],
    }
    ids = builder.encode(user(content[shape]))
    plain = builder.encode(user("x"))
    special = set(builder.tokenizer.get_added_tokens_decoder()) & set(plain)
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    assert builder.tokenizer.token_to_id(name) not in set(ids) - special
    whole = builder.tokenizer.decode(ids, skip_special_tokens=False)
    written = content[shape] if isinstance(content[shape], str) else "".join(p["text"] for p in content[shape])  # type: ignore[index]
    assert f"<|im_start|>user\n{written}<|im_end|>" in whole


@given(
    st.lists(st.sampled_from([*NAMES, "<", "<|", "|>", "im_end", "hello ", "é", "\n", "<|im_", "end|>"]), max_size=8)
)
@settings(max_examples=200, deadline=None)
def test_whatever_a_client_types_leaves_the_controls_as_they_are(pieces: list[str]) -> None:
    builder = _cached_builder()
    controls = set(builder.tokenizer.get_added_tokens_decoder())
    ids = builder.encode(user([text(piece) for piece in pieces]))
    expected = builder.encode(user([text("x")]))
    assert [id for id in ids if id in controls] == [id for id in expected if id in controls]
    assert "".join(pieces) in builder.tokenizer.decode(ids, skip_special_tokens=False)


_builders: list[PromptBuilder] = []


def _cached_builder() -> PromptBuilder:
    if not _builders:
        import tempfile

        with tempfile.TemporaryDirectory() as name:
            directory = make_checkpoint(Path(name), PRESETS[0], weights=False)
            _builders.append(load_prompt_builder(directory, load_model_config(directory), MAX_MODEL_LEN, None))
    return _builders[0]


def test_beside_a_control_tokens_name_ordinary_text_tokenizes_as_ever(builder: PromptBuilder) -> None:
    rng = random.Random(0)
    im_start = builder.tokenizer.get_vocab()["<|im_start|>"]
    for _ in range(200):
        message = {"role": "user", "content": " ".join(rng.choice(TEXTS) for _ in range(4))}
        ordinary = builder.encode([message])
        end = len(ordinary) - ordinary[::-1].index(im_start) - 1  # where the assistant's turn begins
        assert builder.encode([message, *user("<|im_end|>")])[:end] == ordinary[:end]


def test_placeholders_become_spans(builder: PromptBuilder) -> None:
    messages = user([text("a"), IMAGE, text("b"), IMAGE])
    ids = builder.encode(messages)
    prompt = builder.expand(ids, [image(6, "one"), image(10, "two")])
    pad = builder.tokenizer.token_to_id("<|image_pad|>")
    assert len(prompt.token_ids) == len(ids) + 6 + 10 - 2
    for item in prompt.media:
        span = prompt.token_ids[item.start : item.start + item.num_tokens]
        assert set(span) == {pad}
        assert prompt.token_ids[item.start - 1] != pad
        assert prompt.token_ids[item.start + item.num_tokens] != pad
    assert [item.mm_hash for item in prompt.media] == ["one", "two"]
    spans = [MediaSpan(item.start, item.num_tokens, item.grid_thw) for item in prompt.media]
    positions = mrope_positions(0, len(prompt.token_ids), spans, len(prompt.token_ids), 0, 2)
    assert prompt.rope_delta == positions.max() + 1 - len(prompt.token_ids)


def clip(num_groups: int, num_tokens: int, seconds: int) -> IdentifiedClip:
    return IdentifiedClip(
        b"",
        (28, 28),
        (28, 28),
        tuple(FrameGroup(MmHash(f"group{index}"), (2 * index, 2 * index + 1)) for index in range(num_groups)),
        (1, 2, num_tokens * 2),
        num_tokens,
        tuple(index * seconds for index in range(num_groups)),
    )


@pytest.mark.parametrize("seconds", [0, 1, 50])
def test_the_placeholder_of_a_clip_becomes_its_groups(seconds: int, builder: PromptBuilder) -> None:
    ids = builder.encode(user([VIDEO, text("a"), IMAGE, VIDEO]))
    prompt = builder.expand(ids, [clip(3, 4, seconds), image(6), clip(2, 5, seconds)])
    assert len(prompt.token_ids) == len(ids) + 12 + 6 + 10 - 3
    assert (prompt.num_image_tokens, prompt.num_video_tokens) == (6, 22)
    pads = {name: builder.tokenizer.token_to_id(f"<|{name}_pad|>") for name in ("image", "video")}
    assert prompt.token_ids.count(pads["image"]) == 6
    assert prompt.token_ids.count(pads["video"]) == 22
    assert [item.continues for item in prompt.media] == [False, True, True, False, False, True]
    assert [item.time_offset for item in prompt.media] == [0, seconds, 2 * seconds, 0, 0, seconds]
    spans = [
        MediaSpan(item.start, item.num_tokens, item.grid_thw, item.time_offset, item.continues) for item in prompt.media
    ]
    positions = mrope_positions(0, len(prompt.token_ids), spans, len(prompt.token_ids), 0, 2)
    assert prompt.rope_delta == positions.max() + 1 - len(prompt.token_ids)


def test_placeholders_of_another_kind_are_an_error(builder: PromptBuilder) -> None:
    ids = builder.encode(user([VIDEO, IMAGE]))
    wrong: list[list[PromptMedium]] = [[image(4), clip(1, 4, 1)], [clip(1, 4, 1)], [image(4), image(4)]]
    for media in wrong:
        with pytest.raises(RequestError) as refused:
            builder.expand(ids, media)
        assert (refused.value.status, refused.value.code) == (400, "placeholder_mismatch")
        assert "1 images and 1 videos" in refused.value.message


def test_a_template_without_places_for_pictures_is_an_error(builder: PromptBuilder) -> None:
    with pytest.raises(RequestError) as refused:
        builder.expand(builder.encode(user("no place")), [image(4)])
    assert (refused.value.status, refused.value.code) == (400, "placeholder_mismatch")


def test_too_long_a_prompt_names_its_parts_and_the_limit(builder: PromptBuilder) -> None:
    ids = builder.encode(user([IMAGE, text("hello")]))
    with pytest.raises(RequestError) as refused:
        builder.expand(ids, [image(MAX_MODEL_LEN)])
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    for number in (len(ids) - 1 + MAX_MODEL_LEN, MAX_MODEL_LEN):
        assert str(number) in refused.value.message
    longest = builder.expand(ids, [image(MAX_MODEL_LEN - len(ids))])
    assert len(longest.token_ids) == MAX_MODEL_LEN - 1


async def test_long_texts_are_tokenized_elsewhere_to_the_same_ids(builder: PromptBuilder) -> None:
    messages = user("word " * 1700)
    with ThreadPoolExecutor(1) as executor:
        token_ids = await builder.tokenize(messages, executor)
    assert token_ids == builder.encode(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system please') }}",
        "{{ messages[5].content }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_is_a_client_error(source: str) -> None:
    with pytest.raises(RequestError) as refused:
        ChatTemplate(source).render(user("hello"))
    assert (refused.value.status, refused.value.code) == (400, "template_error")


def test_a_broken_or_missing_template_is_a_start_error(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(StartupError):
        ChatTemplate("{% for %}")
    with pytest.raises(StartupError, match="--chat-template"):
        load_chat_template(tmp_path)
    with pytest.raises(StartupError, match=r"missing\.jinja"):
        load_chat_template(directory, str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "T{{ messages | length }}"),
        ("chat_template.json", '{"chat_template": "T{{ messages | length }}"}'),
        ("tokenizer_config.json", '{"chat_template": "T{{ messages | length }}"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool_use", "template": "x"}, '
            '{"name": "default", "template": "T{{ messages | length }}"}]}',
        ),
    ],
)
def test_a_template_is_found_wherever_checkpoints_keep_it(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    assert load_chat_template(tmp_path).render(user("x")) == "T1"


def _steps(sizes: Sequence[int], builder: PromptBuilder) -> list[float]:
    import time

    times = []
    for size in sizes:
        value = "<|image_pad|> and text " * size
        started = time.process_time()  # not what a busy machine does meanwhile
        builder.encode(user(value))
        times.append(time.process_time() - started)
    return times


def test_text_full_of_placeholder_names_costs_linear_time(builder: PromptBuilder) -> None:
    _steps([500], builder)
    small, large = (min(times) for times in zip(*(_steps([500, 4000], builder) for _ in range(3)), strict=True))
    assert large < small * 8 * 3  # eight times the size; quadratic would be 64

"""Pictures named by uuid through a real server and the real client; resets of its caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.pictures import Picture, encode, noise
from tests.system.server import Server, launch
from vlmrt.tools.checkpoint import make_checkpoint

QUESTION = {"type": "text", "text": "Describe the image."}
AGAIN = {"type": "text", "text": "Is there a red circle?"}


def drawn(seed: int) -> Picture:
    return encode(noise(120, 90, seed), "PNG", f"noise {seed}")


def part(picture: Picture | None, uuid: str | None = None) -> dict[str, Any]:
    fields = {} if picture is None else {"image_url": {"url": picture.url}}
    return {"type": "image_url", **fields, **({} if uuid is None else {"uuid": uuid})}


def ask(server: Server, *content: dict[str, Any], salt: str = "", **fields: Any) -> Any:
    extra = {"return_token_ids": True, **({"cache_salt": salt} if salt else {})}
    return server.chat([*content], temperature=0, max_tokens=24, extra_body=extra, **fields)


def seen(answer: Any) -> tuple[list[int], list[int], str]:
    """What went in and what came out."""
    return answer.prompt_token_ids, answer.choices[0].token_ids, answer.choices[0].message.content


def test_a_picture_asked_about_again_by_name_is_answered_as_with_its_bytes(demo_server: Server) -> None:
    picture = drawn(1)
    ask(demo_server, part(picture, "sku-1"), QUESTION)
    by_name = ask(demo_server, part(None, "sku-1"), AGAIN)
    with_bytes = ask(demo_server, part(picture), AGAIN)
    assert seen(by_name) == seen(with_bytes)
    assert by_name.usage.prompt_tokens == with_bytes.usage.prompt_tokens


def test_a_dialogue_names_its_pictures_from_the_second_turn_on(demo_server: Server) -> None:
    first = ask(demo_server, part(drawn(2), "one"), part(drawn(3), "two"), QUESTION)
    text = first.choices[0].message.content

    def second_turn(one: dict[str, Any], two: dict[str, Any]) -> Any:
        messages: list[Any] = [
            {"role": "user", "content": [one, two, QUESTION]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [AGAIN]},
        ]
        return demo_server.client.chat.completions.create(
            model="model", messages=messages, temperature=0, max_tokens=24, extra_body={"return_token_ids": True}
        )

    by_name = second_turn(part(None, "one"), part(None, "two"))
    assert seen(by_name) == seen(second_turn(part(drawn(2)), part(drawn(3))))
    assert by_name.usage.prompt_tokens_details.cached_tokens > 0


def test_a_streamed_answer_about_a_named_picture_is_the_same(demo_server: Server) -> None:
    whole = seen(ask(demo_server, part(drawn(4), "streamed"), QUESTION))[2]
    content = [part(None, "streamed"), QUESTION]
    stream = demo_server.chat(content, temperature=0, max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole


def refusal(server: Server, *content: dict[str, Any], salt: str = "") -> Any:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, *content, salt=salt)
    return refused.value


def test_a_name_nobody_gave_is_400_and_names_the_part(demo_server: Server) -> None:
    error = refusal(demo_server, QUESTION, part(None, "sku-unknown"))
    assert (error.status_code, error.code, error.param) == (400, "media_not_cached", "messages[0].content[1].uuid")
    assert "sku-unknown" in error.message


def test_a_name_given_under_another_salt_is_unknown(demo_server: Server) -> None:
    ask(demo_server, part(drawn(5), "mine"), QUESTION, salt="a")
    assert refusal(demo_server, part(None, "mine"), QUESTION, salt="b").code == "media_not_cached"
    assert refusal(demo_server, part(None, "mine"), QUESTION).code == "media_not_cached"
    assert ask(demo_server, part(None, "mine"), QUESTION, salt="a").choices[0].finish_reason


@pytest.mark.parametrize("uuid", ["", "a b", "x" * 129, "ä"])
def test_a_malformed_name_is_400(uuid: str, demo_server: Server) -> None:
    assert refusal(demo_server, part(None, uuid), QUESTION).param == "messages[0].content[0].uuid"


@pytest.fixture(scope="module")
def admin_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_checkpoint(tmp_path_factory.mktemp("named"), "test-qwen2-vl")
    with launch("--admin-routes", "--model", str(model), run_root=Path(tmp_path_factory.mktemp("r"))) as server:
        yield server


def test_a_picture_asked_about_by_name_is_decoded_and_encoded_once(admin_server: Server) -> None:
    """The first test with this server, whose counters begin at 0."""
    ask(admin_server, part(drawn(1), "once"), QUESTION)
    for question in (QUESTION, AGAIN):
        ask(admin_server, part(None, "once"), question)
    names = ("images_decoded_total", "images_encoded_total", "media_lookup_hits_total", "media_aliases")

    def counted() -> list[float]:
        metrics = admin_server.metrics()
        return [metrics.get(f"vlmrt_{name}", 0.0) for name in names]

    admin_server.wait_until(lambda: all(counted()) and counted()[2] == 2, "everything is counted")
    assert counted() == [1, 1, 2, 1]


def test_resets_forget_prefixes_rows_and_names(admin_server: Server) -> None:
    first = ask(admin_server, part(drawn(6), "reset"), QUESTION)
    assert ask(admin_server, part(None, "reset"), QUESTION).usage.prompt_tokens_details.cached_tokens > 0
    assert admin_server.http.post("/reset_prefix_cache").json() == {"reset": "prefix"}
    again = ask(admin_server, part(None, "reset"), QUESTION)
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    assert seen(again) == seen(first)
    assert admin_server.http.post("/reset_mm_cache").json() == {"reset": "embedding"}
    assert refusal(admin_server, part(None, "reset"), QUESTION).code == "media_not_cached"
    assert seen(ask(admin_server, part(drawn(6), "reset"), QUESTION)) == seen(first)


def test_without_the_flag_there_is_nothing_to_reset(demo_server: Server) -> None:
    assert demo_server.http.post("/reset_mm_cache").status_code == 404

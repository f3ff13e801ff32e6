"""Pictures in the forms that clients send them."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.api import BLUE, RED, Api, about_a_red_disc, joined, picture, picture_url, png, raises, text_part
from tests.clients.cases import each

COLOR = text_part("What color is this?")


def _says(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


@each(color=[RED, BLUE])
def a_data_url_is_seen(api: Api, color: tuple[int, int, int]) -> None:
    assert _says(api.chat([picture(color), COLOR])) == {RED: "Red.", BLUE: "Blue."}[color]


@each(detail=["auto", "low", "high"])
def detail_is_accepted(api: Api, detail: str) -> None:
    part = {"type": "image_url", "image_url": {"url": picture_url(), "detail": detail}}
    assert _says(api.chat([part, COLOR])) == "Red."


def low_detail_costs_no_more_tokens(api: Api) -> None:
    url = picture_url(size=700)
    counts = [
        api.chat([{"type": "image_url", "image_url": {"url": url, "detail": detail}}, COLOR]).usage.prompt_tokens
        for detail in ("low", "high")
    ]
    assert counts[0] <= counts[1]


@each(
    part=[
        {"type": "image_url", "image_url": picture_url()},
        {"type": "image", "image": picture_url()},
        {"type": "image_url", "image_url": {"url": picture_url()}, "uuid": "a-red-disc"},
    ]
)
def other_forms_of_a_part_are_accepted(api: Api, part: dict[str, Any]) -> None:
    assert _says(api.chat([part, COLOR])) == "Red."


@each(
    way=["no padding", "line breaks", "url-safe", "upper-case scheme", "another mime", "a parameter"],
)
def variants_of_base64_are_read(api: Api, way: str) -> None:
    head, _, data = picture_url().partition(",")
    url = {
        "no padding": f"{head},{data.rstrip('=')}",
        "line breaks": f"{head}," + "\n".join(data[at : at + 76] for at in range(0, len(data), 76)),
        "url-safe": f"{head},{data.replace('+', '-').replace('/', '_')}",
        "upper-case scheme": f"DATA:image/PNG;BASE64,{data}",
        "another mime": f"data:image/jpeg;base64,{data}",
        "a parameter": f"data:image/png;charset=utf-8;base64,{data}",
    }[way]
    assert _says(api.chat([{"type": "image_url", "image_url": {"url": url}}, COLOR])) == "Red."


def two_pictures_keep_their_order(api: Api) -> None:
    told = [picture(RED), picture(BLUE), text_part("Are these images different?")]
    text = _says(api.chat(told, max_tokens=64))
    assert text.index("red") < text.index("blue")
    told[0], told[1] = told[1], told[0]
    text = _says(api.chat(told, max_tokens=64))
    assert text.index("blue") < text.index("red")


def a_message_may_be_a_picture_alone(api: Api) -> None:
    assert _says(api.chat([picture()]))


def the_same_picture_twice_is_two_pictures(api: Api) -> None:
    one, two = (api.chat([*[picture()] * count, COLOR]).usage.prompt_tokens for count in (1, 2))
    assert two > one + 4


def a_picture_of_an_earlier_turn_is_remembered(api: Api) -> None:
    turns = [
        {"role": "user", "content": about_a_red_disc("Describe the image.")},
        {"role": "assistant", "content": "There is a red circle at the center."},
        {"role": "user", "content": "What color is the circle?"},
    ]
    assert _says(api.chat(messages=turns)) == "Red."


def pictures_come_in_any_turn(api: Api) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [picture(BLUE), COLOR]},
    ]
    assert _says(api.chat(messages=turns)) == "Blue."


def usage_tells_pictures_from_text(api: Api) -> None:
    usage = api.chat(about_a_red_disc()).usage
    details = usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == 16
    assert details["image_tokens"] + details["text_tokens"] == usage.prompt_tokens


def the_second_time_comes_from_the_cache(api: Api) -> None:
    told = [picture((1, 2, 3), 336), text_part("What is in the image?")]
    api.chat(told)
    usage = api.chat(told).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


@each(stream=[False, True])
def eight_pictures_are_one_question(api: Api, stream: bool) -> None:
    told = [*(picture((200, 10 * index, 40), 84) for index in range(8)), text_part("How many images are there?")]
    answer = api.chat(told, stream=stream)
    assert joined(answer) if stream else _says(answer)


@each(fields=[{"min_pixels": 3136, "max_pixels": 12544}, {"max_pixels": 28 * 28 * 4}])
def a_part_may_bound_its_pixels(api: Api, fields: dict[str, int]) -> None:
    plain = {"type": "image_url", "image_url": {"url": picture_url(size=280)}}
    full = api.chat([plain, COLOR]).usage.prompt_tokens
    assert api.chat([{**plain, **fields}, COLOR]).usage.prompt_tokens < full
    fields = {"mm_processor_kwargs": fields}  # type: ignore[dict-item]
    assert api.chat([plain, COLOR], extra_body=fields).usage.prompt_tokens < full


@each(kind=["no image", "half a png", "no base64", "http", "file", "audio", "video"])
def what_cannot_be_seen_is_a_bad_request(api: Api, kind: str) -> None:
    half = png(RED, 112)[:40]
    part: dict[str, Any] = {
        "no image": {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},
        "half a png": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{half.hex()}"}},
        "no base64": {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}},
        "http": {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}},
        "file": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        "audio": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "video": {"type": "video_url", "video_url": {"url": "http://example.org/a.mp4"}},
    }[kind]
    error = raises(openai.BadRequestError, lambda: api.chat([part, COLOR]))
    assert error.param.startswith("messages[0].content[0]")

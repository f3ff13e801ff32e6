"""Pictures in messages: every accepted form, sent without loss and encoded once."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pictures import encode, noise
from vlmrt.tools.offline.messages import PicturePart, PictureStore, encode_body, picture_parts


def wire(conversation: list[dict[str, Any]], known: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """As the service reads it."""
    messages = PictureStore().messages(conversation, "messages[0]")
    for part in picture_parts(messages):
        part.picture.encode()
    sent: list[dict[str, Any]] = json.loads(encode_body({"messages": messages}, known))["messages"]
    return sent


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def pixels(part: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Of a part as it was sent, read as the media worker does."""
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/*;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_an_image_of_any_mode_arrives_as_pillow_converts_it(mode: str) -> None:
    image = noise(33, 21, 1).convert("I" if mode == "I;16" else mode).convert(mode)
    (message,) = wire(user({"type": "image", "image": image}))
    np.testing.assert_array_equal(pixels(message["content"][0]), np.asarray(image.convert("RGB")))


def test_the_orientation_of_an_opened_photograph_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = encode(noise(40, 20, 2), "JPEG", "turned", quality=95, exif=exif.tobytes()).data
    opened = Image.open(io.BytesIO(file))
    (message,) = wire(user({"type": "image_pil", "image_pil": opened}))
    assert pixels(message["content"][0]).shape == (40, 20, 3)


@pytest.mark.parametrize("form", ["image path", "image Path", "path", "image bytes", "image_url bytes"])
def test_a_file_is_sent_as_it_is(form: str, tmp_path: Path) -> None:
    data = encode(noise(20, 20, 3), "PNG", "file").data
    file = tmp_path / "a.png"
    file.write_bytes(data)
    parts: dict[str, Any] = {
        "image path": {"type": "image", "image": str(file)},
        "image Path": {"type": "image", "image": file},
        "path": {"type": "image", "path": str(file)},
        "image bytes": {"type": "image", "image": data},
        "image_url bytes": {"type": "image_url", "image_url": {"url": data}},
    }
    (message,) = wire(user(parts[form], {"type": "text", "text": "?"}))
    assert message["content"][0] == {
        "type": "image_url",
        "image_url": {"url": "data:image/*;base64," + base64.b64encode(data).decode()},
    }
    assert message["content"][1] == {"type": "text", "text": "?"}


@pytest.mark.parametrize("url", ["data:image/png;base64,AA==", "https://example.org/a.png", "FILE:///tmp/a.png"])
def test_a_url_is_left_to_the_policy_of_the_service(url: str) -> None:
    (message,) = wire(
        user(
            {"type": "image", "image": url},
            {"type": "image", "url": url, "detail": "low"},
            {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
            {"type": "image_url", "image_url": url},
        )
    )
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
    ]


def test_options_of_a_part_travel_with_it() -> None:
    part = {"type": "image", "image": noise(8, 8, 1), "detail": "low", "uuid": "mine", "max_pixels": 99}
    (message,) = wire(user(part))
    sent = message["content"][0]
    assert (sent["uuid"], sent["max_pixels"], sent["image_url"]["detail"]) == ("mine", 99, "low")
    assert wire(user({"type": "image", "uuid": "mine"}))[0]["content"] == [{"type": "image_url", "uuid": "mine"}]


def test_messages_without_pictures_are_untouched() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": ["Hello", {"type": "text", "text": "there"}]},
    ]
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    assert wire(conversation) == [*conversation[:2], {"role": "user", "content": parts}]


def test_the_same_object_is_one_picture_and_is_forgotten_after_its_last_use() -> None:
    image, store = noise(8, 8, 1), PictureStore()
    conversations = [store.messages(user({"type": "image", "image": image}), "messages[0]") for _ in range(3)]
    parts: list[PicturePart] = [part for messages in conversations for part in picture_parts(messages)]
    (picture,) = {part.picture for part in parts}
    picture.encode()
    encoded = picture.num_bytes
    assert encoded > 8 * 8 * 3
    for _ in range(2):
        picture.release()
    assert bytes(picture.url)
    picture.release()
    assert not bytes(picture.url)


def test_a_large_picture_has_a_name_that_depends_on_its_bytes_and_options() -> None:
    large, other = noise(300, 200, 1), noise(300, 200, 2)

    def name(image: Image.Image, **options: Any) -> str:
        (part,) = picture_parts(PictureStore().messages(user({"type": "image", "image": image, **options}), "m"))
        assert part.name == ""
        part.picture.encode()
        return part.name

    assert name(large) == name(large.copy()) != ""
    assert len({name(large), name(other), name(large, detail="low"), name(large, max_pixels=50)}) == 4
    assert name(noise(8, 8, 1)) == ""
    assert name(large, uuid="mine") == ""


def test_a_known_picture_is_sent_by_its_name_alone() -> None:
    conversation = user({"type": "image", "image": noise(300, 200, 1)})
    first = wire(conversation)[0]["content"][0]
    assert first["image_url"]["url"].startswith("data:")
    assert wire(conversation, (first["uuid"],))[0]["content"] == [{"type": "image_url", "uuid": first["uuid"]}]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (["hello"], r"m\[0\] is str: a message is a dict"),
        ("hello", "m is str: a list of messages"),
        ([{"role": "user", "content": 3}], r"m\[0\]\['content'\] is int"),
        (user(3), r"m\[0\]\['content'\]\[0\] is int: a part is a dict"),
        (user({"type": "image", "image": 3}), r"\[0\] holds a int: a PIL image, a path"),
        (user({"type": "image", "image": np.zeros((2, 2, 3))}), "holds a ndarray"),
        (user({"type": "image"}), "no picture: exactly one of image"),
        (user({"type": "image", "image": b"a", "path": "b"}), "exactly one of image"),
        (user({"type": "image", "image": "/no/such/file.png"}), "there is no file /no/such/file.png"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_its_place(conversation: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PictureStore().messages(conversation, "m")

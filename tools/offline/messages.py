"""Messages that hold pictures as objects, paths or bytes -> messages of the API, each picture encoded once."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, ImageOps

Message = Mapping[str, Any]
Conversation = Sequence[Message]

NAMED_BYTES = 64 << 10  # files of more are named, where the server has seen them, rather than sent again
_PICTURE_KEYS = ("image", "image_pil", "path", "url")  # of a part that is not OpenAI's image_url
_EXPECTED = "a PIL image, a path, a URL or the bytes of an image file"


class Picture:
    """One picture of a batch, however many messages show it."""

    def __init__(self, source: Image.Image | bytes | Path) -> None:
        self._source = source
        self._url = b""
        self._name = ""
        self._lock = threading.Lock()
        self.num_uses = 0

    @property
    def num_bytes(self) -> int:
        """About what it takes in a request."""
        if self._url:
            return len(self._url)
        match self._source:
            case Image.Image():
                size = 3 * self._source.width * self._source.height
            case bytes():
                size = len(self._source)
            case Path():
                size = _file_size(self._source)
        return size * 4 // 3

    def encode(self) -> None:
        """Blocks.  Raises: ValueError where the file or the image cannot be read."""
        with self._lock:
            if self._url:
                return
            try:
                data = _file_bytes(self._source)
            except (OSError, ValueError) as error:
                raise ValueError(f"{_shown(self._source)} cannot be read: {error}") from None
            if len(data) > NAMED_BYTES:
                self._name = hashlib.blake2b(data, digest_size=16).hexdigest()
            self._url = b'"data:image/*;base64,' + base64.b64encode(data) + b'"'

    def name(self, options: object) -> str:
        """Of what the server makes of it with these options; empty where it is small, or not encoded yet."""
        if not self._name:
            return ""
        options_hash = hashlib.blake2b(msgspec.json.encode(options, order="sorted"), digest_size=8).hexdigest()
        return f"{self._name}-{options_hash}"

    @property
    def url(self) -> msgspec.Raw:
        """JSON of the data URL."""
        return msgspec.Raw(self._url)

    def release(self) -> None:
        """One use less; after the last, the encoded form goes."""
        self.num_uses -= 1
        if not self.num_uses:
            self._url = b""


class PicturePart:
    """A content part that shows a picture, until it is known whether the server needs the bytes."""

    def __init__(self, picture: Picture, part: dict[str, Any], image_url: dict[str, Any]) -> None:
        self.picture = picture
        self._part = part
        self._image_url = image_url
        picture.num_uses += 1

    @property
    def name(self) -> str:
        """What the server may know it by; empty where its bytes go along always."""
        return "" if "uuid" in self._part else self.picture.name([self._part, self._image_url])

    def wire(self, *, with_bytes: bool) -> dict[str, Any]:
        part = {**self._part, "type": "image_url"}
        if self.name:
            part["uuid"] = self.name
        if with_bytes or not self.name:
            part["image_url"] = {**self._image_url, "url": self.picture.url}
        return part


class PictureStore:
    """The pictures of one batch: the same object, or the same path, is one Picture."""

    def __init__(self) -> None:
        self._pictures: dict[object, Picture] = {}  # a Picture keeps its object alive, so that an id stays its own

    def messages(self, conversation: Conversation, where: str) -> list[dict[str, Any]]:
        """With PictureParts in the place of parts that hold a picture.

        Raises: TypeError or ValueError that begins with `where` and the part at fault.
        """
        if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
            raise TypeError(f"{where} is {type(conversation).__name__}: a list of messages is expected")
        return [self._message(message, f"{where}[{index}]") for index, message in enumerate(conversation)]

    def _message(self, message: Message, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise TypeError(f"{where} is {type(message).__name__}: a message is a dict with role and content")
        content = message.get("content")
        if isinstance(content, (str, type(None))):
            return dict(message)
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise TypeError(f"{where}['content'] is {type(content).__name__}: a string or a list of parts is expected")
        parts = [self._part(part, f"{where}['content'][{index}]") for index, part in enumerate(content)]
        return {**message, "content": parts}

    def _part(self, part: object, where: str) -> object:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise TypeError(f"{where} is {type(part).__name__}: a part is a dict with a type")
        if part.get("type") == "image_url":
            image_url = part.get("image_url")
            options = dict(image_url) if isinstance(image_url, Mapping) else {"url": image_url}
            source = options.pop("url", None)
            if isinstance(source, (str, type(None))):
                return dict(part)  # as the API has it
            return self._picture_part(source, _without(part, "type", "image_url"), options, where)
        if part.get("type") in ("image", "image_pil"):
            return self._image(part, where)
        return dict(part)

    def _image(self, part: Mapping[str, Any], where: str) -> object:
        given = [key for key in _PICTURE_KEYS if part.get(key) is not None]
        if not given and part.get("uuid"):
            return {**part, "type": "image_url"}
        if len(given) != 1:
            raise ValueError(
                f"{where} has {given or 'no picture'}: exactly one of {', '.join(_PICTURE_KEYS)} is needed"
            )
        source, options = part[given[0]], _without(part, "type", *_PICTURE_KEYS)
        image_url = {"detail": options.pop("detail")} if "detail" in options else {}
        if isinstance(source, str) and (given[0] == "url" or _is_url(source)):
            return {**options, "type": "image_url", "image_url": {**image_url, "url": source}}
        return self._picture_part(source, options, image_url, where)

    def _picture_part(self, source: object, part: dict[str, Any], image_url: dict[str, Any], where: str) -> PicturePart:
        match source:
            case Image.Image() | bytes():
                key: object = id(source)
            case str() | os.PathLike():
                source = Path(source)
                key = source
                if not source.is_file():
                    raise ValueError(f"{where}: there is no file {source}")
            case _:
                raise TypeError(f"{where} holds a {type(source).__name__}: {_EXPECTED} is expected")
        if key not in self._pictures:
            self._pictures[key] = Picture(source)
        return PicturePart(self._pictures[key], part, image_url)


def picture_parts(messages: object) -> Iterator[PicturePart]:
    """None of what are no messages: the service says what is wrong with them."""
    for message in messages if isinstance(messages, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in content if isinstance(part, PicturePart)) if isinstance(content, list) else ()


def encode_body(fields: Mapping[str, Any], known: Collection[str]) -> bytes:
    """JSON; pictures whose names are among `known` go without their bytes."""

    def hook(value: object) -> object:
        if isinstance(value, PicturePart):
            return value.wire(with_bytes=value.name not in known)
        raise TypeError(f"a {type(value).__name__} cannot be sent: {value!r:.100}")

    return msgspec.json.encode(fields, enc_hook=hook)


def _is_url(text: str) -> bool:
    return text[:16].partition(":")[0].lower() in ("data", "http", "https", "file")


def _without(part: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in keys}


def _shown(source: object) -> str:
    return str(source) if isinstance(source, Path) else f"the {type(source).__name__}"


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # `encode` says what is wrong
        return 0


def _file_bytes(source: Image.Image | bytes | Path) -> bytes:
    """A PIL image becomes a BMP: no bit is lost, and 1280x960 pixels take 4 ms, as a PNG of fast compression 240."""
    match source:
        case bytes():
            return source
        case Path():
            return source.read_bytes()
        case Image.Image():
            buffer = io.BytesIO()
            ImageOps.exif_transpose(source).convert("RGB").save(buffer, "BMP")
            return buffer.getvalue()

"""What a request shows: pictures and clips that are made on the spot, files, URLs. Prepared before the clock starts."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vlmrt.tools.bench.clips import Clip, draw_clip
from vlmrt.tools.bench.pictures import Picture, draw


class MediaFile(msgspec.Struct, frozen=True, tag=True):
    """A file of this machine, sent as it is."""

    path: str
    is_video: bool = False


class MediaUrl(msgspec.Struct, frozen=True, tag=True):
    """What the server fetches by itself."""

    url: str
    is_video: bool = False


Media = Picture | Clip | MediaFile | MediaUrl

PartText = dict[Media, bytes]  # the part of a message, as JSON that goes into any body


def is_video(media: Media) -> bool:
    return isinstance(media, Clip) or (isinstance(media, MediaFile | MediaUrl) and media.is_video)


def prepared(media: Iterable[Media]) -> PartText:
    """Each of them once, in their order.

    Raises: OSError if a file cannot be read.
    """
    return {each: part(each) for each in dict.fromkeys(media)}


def part(media: Media) -> bytes:
    kind = "video_url" if is_video(media) else "image_url"
    sampling = media.sampling if isinstance(media, Clip) else {}
    return msgspec.json.encode({"type": kind, kind: {"url": _url(media), **sampling}})


def _url(media: Media) -> str:
    match media:
        case Picture():
            return data_url(draw(media), f"image/{media.format}")
        case Clip():
            return data_url(draw_clip(media), "video/mp4")
        case MediaFile():
            path = Path(media.path)
            return data_url(path.read_bytes(), mimetypes.guess_type(path.name)[0] or _unknown(media))
        case MediaUrl():
            return media.url


def _unknown(media: MediaFile) -> str:
    return "video/mp4" if media.is_video else "image/jpeg"


def data_url(data: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"

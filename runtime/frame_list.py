"""A clip that was sent as pictures, as one piece of bytes: a mark, their number, their lengths, and they themselves."""

from __future__ import annotations

import struct
from collections.abc import Sequence

MARK = b"\x00frames\x01"  # no container of video begins so
_COUNT = struct.Struct("<I")


def pack_frames(pictures: Sequence[bytes]) -> bytes:
    """Encoded pictures -> bytes that a media worker takes as a clip."""
    lengths = struct.pack(f"<{len(pictures)}I", *map(len, pictures))
    return b"".join((MARK, _COUNT.pack(len(pictures)), lengths, *pictures))


def unpack_frames(encoded: bytes) -> list[memoryview]:
    """The pictures, in place.  Raises: ValueError if these are not such bytes."""
    try:
        if not encoded.startswith(MARK):
            raise ValueError("no frame list: it does not begin as one")
        (count,) = _COUNT.unpack_from(encoded, len(MARK))
        begin = len(MARK) + _COUNT.size
        if count * 4 > len(encoded) - begin:
            raise ValueError(f"no frame list: {count} frames do not fit its {len(encoded)} bytes")
        lengths = struct.unpack_from(f"<{count}I", encoded, begin)
    except struct.error:
        raise ValueError("no frame list: it breaks off") from None
    begin += 4 * count
    if begin + sum(lengths) != len(encoded):
        raise ValueError(f"no frame list: {begin + sum(lengths)} bytes are promised, {len(encoded)} are there")
    pictures, whole = [], memoryview(encoded)
    for length in lengths:
        pictures.append(whole[begin : begin + length])
        begin += length
    return pictures

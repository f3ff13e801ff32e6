"""Width, height and orientation of an encoded picture, found in its container without decoding a pixel.

The size is that of frame 0 after EXIF orientation, as Pillow's ImageOps.exif_transpose leaves it; a media worker
decodes later and refuses the picture if it finds another size.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from msgspec import Struct

MAX_TEXT_BYTES = 1 << 20  # of one compressed text chunk, inflated
MAX_SEGMENTS = 100_000  # of one file
MAX_TAGS = 4096  # of one EXIF directory

_ORIENTATION = 0x0112
_XMP = 0x02BC
_INTEGER_TYPES = {3: "H", 4: "I", 8: "h", 9: "i"}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xDE}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)})  # markers without a length


class ImageHeader(Struct, frozen=True):
    """What the container says of frame 0."""

    format: str
    width: int  # after orientation
    height: int


class NotAnImage(ValueError):
    """The bytes are no picture of a known format, or its header is broken; the message is fit for a client."""


def read_image_header(data: bytes) -> ImageHeader:
    """Format and size of a JPEG, PNG, WebP, GIF, BMP or TIFF.

    Raises: NotAnImage.   Cost: one walk over the container's segments.
    """
    for name, magics, read in _FORMATS:
        if any(data.startswith(magic) and data[8 : 8 + len(mark)] == mark for magic, mark in magics):
            try:
                width, height, orientation = read(data)
            except (struct.error, IndexError):
                raise NotAnImage(f"the {name} file is cut short or its header is broken") from None
            if orientation in (5, 6, 7, 8):
                width, height = height, width
            return ImageHeader(name, width, height)
    raise NotAnImage("the bytes are not a JPEG, PNG, WebP, GIF, BMP or TIFF file")


# ---------------------------------------------------------------- EXIF and XMP


def _exif_orientation(exif: bytes, xmp: bytes) -> int:
    orientation = _tiff_orientation(re.sub(rb"^(Exif\x00\x00){1,2}", b"", exif)) if exif else None
    return _xmp_orientation(xmp) if orientation is None else orientation


def _xmp_orientation(xmp: bytes) -> int:
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1


def _tiff_orientation(data: bytes) -> int | None:
    try:
        order, offset, big = _tiff_start(data)
        return _tiff_integers(data, order, offset, big).get(_ORIENTATION)
    except (struct.error, NotAnImage):
        return None


def _tiff_start(data: bytes) -> tuple[str, int, bool]:
    """(byte order, offset of the first directory, is it a BigTIFF)."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise NotAnImage("the TIFF file's byte order mark is broken")
    (version,) = struct.unpack_from(order + "H", data, 2)
    if version == 43:
        return order, struct.unpack_from(order + "Q", data, 8)[0], True
    return order, struct.unpack_from(order + "I", data, 4)[0], False


def _tiff_entries(data: bytes, order: str, offset: int, big: bool) -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, count, offset of the value field) of one directory; ends early where the file does."""
    if offset >= len(data):
        return
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    entry = order + ("HHQ" if big else "HHI")
    at, step, head = offset + (8 if big else 2), (20 if big else 12), struct.calcsize(entry)
    for _ in range(min(count, MAX_TAGS)):
        if at + step > len(data):
            return
        tag, kind, number = struct.unpack_from(entry, data, at)
        yield tag, kind, number, at + head
        at += step


def _tiff_integers(data: bytes, order: str, offset: int, big: bool) -> dict[int, int]:
    """The single whole numbers of one directory; the first of equal tags counts."""
    values: dict[int, int] = {}
    for tag, kind, count, at in _tiff_entries(data, order, offset, big):
        if kind in _INTEGER_TYPES and count == 1 and tag not in values:
            values[tag] = struct.unpack_from(order + _INTEGER_TYPES[kind], data, at)[0]
        elif kind == 16 and count == 1 and big and tag not in values:
            values[tag] = struct.unpack_from(order + "Q", data, at)[0]
    return values


# ---------------------------------------------------------------- one reader per format: (width, height, orientation)


def _read_jpeg(data: bytes) -> tuple[int, int, int]:
    size: tuple[int, int] | None = None
    exif = xmp = b""
    for marker, start, stop in _jpeg_segments(data):
        if marker in _JPEG_SIZES:
            bits, height, width = struct.unpack_from(">BHH", data, start)
            if bits != 8:
                raise NotAnImage(f"a JPEG of {bits} bits per sample is not supported")
            size = width, height
        elif marker == 0xE1:
            segment = data[start:stop]
            if segment.startswith(b"Exif\0\0"):
                exif += segment[6:] if exif else segment
            elif segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = segment.split(b"\0", 1)[1]
    if size is None:
        raise NotAnImage("the JPEG file has no frame header before its first scan")
    return *size, _exif_orientation(exif, xmp)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of the segments before the first scan."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        at = data.find(b"\xff", at)
        while 0 <= at < len(data) - 1 and data[at + 1] == 0xFF:  # padding
            at += 1
        if at < 0 or at + 1 >= len(data):
            raise NotAnImage("the JPEG file ends before its first scan")
        marker = data[at + 1]
        at += 2
        if marker == 0 or marker in _JPEG_BARE:
            continue
        if marker < 0xC0:
            raise NotAnImage("the JPEG file's markers are broken")
        (length,) = struct.unpack_from(">H", data, at)
        if marker == 0xDA:
            return
        if length < 2 or at + length > len(data):
            raise NotAnImage("the JPEG file ends before its first scan")
        yield marker, at + 2, at + length
        at += length
    raise NotAnImage(f"the JPEG file has more than {MAX_SEGMENTS} segments")


def _read_png(data: bytes) -> tuple[int, int, int]:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length < 13:
        raise NotAnImage("the PNG file does not begin with IHDR")
    exif = xmp = raw_profile = b""
    at = 8
    has_pixels = False
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = memoryview(data)[at + 8 : at + 8 + length]
        has_pixels = has_pixels or kind == b"IDAT"
        match kind:
            case b"IEND":
                break
            case b"eXIf":
                exif = b"Exif\0\0" + bytes(chunk)
            case b"tEXt" | b"zTXt" | b"iTXt":
                keyword, text = _png_text(kind, bytes(chunk))
                if keyword == b"XML:com.adobe.xmp":
                    xmp = text
                elif keyword == b"Raw profile type exif":
                    raw_profile = text
        at += 12 + length
    if not has_pixels:
        raise NotAnImage("the PNG file has no pixels")
    return width, height, _exif_orientation(exif or _hex_profile(raw_profile), xmp)


def _png_text(kind: bytes, chunk: bytes) -> tuple[bytes, bytes]:
    """(keyword, text); the text is empty where it is broken or too long."""
    keyword, _, text = chunk.partition(b"\0")
    if keyword not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        return b"", b""
    compressed = kind == b"zTXt"
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_TEXT_BYTES)
        except zlib.error:
            text = b""
    return keyword, text


def _hex_profile(text: bytes) -> bytes:
    """The EXIF block that ImageMagick writes as text: a line of name, a line of length, lines of hexadecimal."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _read_webp(data: bytes) -> tuple[int, int, int]:
    kind = data[12:16]
    exif = xmp = b""
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            raise NotAnImage("the WebP file is cut short")
        at = 12
        for _ in range(MAX_SEGMENTS):
            if at + 8 > len(data):
                break
            name, length = struct.unpack_from("<4sI", data, at)
            if name == b"EXIF" and not exif:
                exif = data[at + 8 : at + 8 + length]
            elif name == b"XMP " and not xmp:
                xmp = data[at + 8 : at + 8 + length]
            at += 8 + length + (length & 1)
    elif kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise NotAnImage("the WebP file does not begin with a key frame")
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        mark, bits = struct.unpack_from("<BI", data, 20)
        if mark != 0x2F:
            raise NotAnImage("the WebP file's lossless header is broken")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise NotAnImage("the WebP file has no picture")
    return width, height, _exif_orientation(exif, xmp)


def _read_gif(data: bytes) -> tuple[int, int, int]:
    """The screen, grown where frame 0 reaches beyond it; a GIF has no EXIF, but may carry XMP."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(MAX_SEGMENTS):
        if data[at] == 0x21:  # an extension: label, then blocks up to an empty one
            at += 2
            while data[at]:
                at += 1 + data[at]
            at += 1
        elif data[at] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + frame_width), max(height, top + frame_height), 1
        elif data[at] == 0x3B:
            break
        else:
            at += 1
    raise NotAnImage("the GIF file has no picture")


def _read_bmp(data: bytes) -> tuple[int, int, int]:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height, 1
    if header_size not in (40, 52, 56, 64, 108, 124):
        raise NotAnImage(f"a BMP header of {header_size} bytes is not supported")
    width, height = struct.unpack_from("<Ii", data, 18)
    return width, abs(height), 1


def _read_tiff(data: bytes) -> tuple[int, int, int]:
    order, offset, big = _tiff_start(data)
    values = _tiff_integers(data, order, offset, big)
    if 256 not in values or 257 not in values:
        raise NotAnImage("the TIFF file's first directory has no size")
    orientation = values.get(_ORIENTATION)
    if orientation is None:
        orientation = _xmp_orientation(_tiff_xmp(data, order, offset, big))
    return values[256], values[257], orientation


def _tiff_xmp(data: bytes, order: str, offset: int, big: bool) -> bytes:
    for tag, kind, count, at in _tiff_entries(data, order, offset, big):
        if tag == _XMP and kind in (1, 7):
            (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, at)
            return data[start : start + count]
    return b""


_Reader = Callable[[bytes], tuple[int, int, int]]
_FORMATS: tuple[tuple[str, tuple[tuple[bytes, bytes], ...], _Reader], ...] = (  # name, (start, bytes from 8 on), reader
    ("JPEG", ((b"\xff\xd8\xff", b""),), _read_jpeg),
    ("PNG", ((b"\x89PNG\r\n\x1a\n", b""),), _read_png),
    ("WebP", ((b"RIFF", b"WEBP"),), _read_webp),
    ("GIF", ((b"GIF87a", b""), (b"GIF89a", b"")), _read_gif),
    ("BMP", ((b"BM", b""),), _read_bmp),
    ("TIFF", ((b"II*\0", b""), (b"MM\0*", b""), (b"II+\0", b""), (b"MM\0+", b"")), _read_tiff),
)

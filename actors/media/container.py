"""Which container a clip's bytes are, by their first ones; FFmpeg is never left to guess.

Its guesses include playlists and scripts, which name other files and addresses to read.
"""

from __future__ import annotations

from vlmrt.actors.media.clip_errors import invalid
from vlmrt.runtime.frame_list import MARK

_PICTURE_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")
_PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
_SOUNDS = {b"ID3": "MP3", b"\xff\xfb": "MP3", b"fLaC": "FLAC"}
_CONTAINERS = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"FLV\x01": "flv",
    b"OggS": "ogg",
    b"\x30\x26\xb2\x75": "asf",
    b"\x00\x00\x01\xba": "mpeg",
}
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_TS_PACKET_BYTES = 188
FRAME_LIST = "frame list"  # not FFmpeg's


def container_format(encoded: bytes) -> str:
    """FFmpeg's name of the format, or FRAME_LIST.  Raises: RequestError 400 for whatever is no video known here."""
    if not encoded:
        raise invalid("it is empty")
    if encoded.startswith(MARK):
        return FRAME_LIST
    for start, name in _CONTAINERS.items():
        if encoded.startswith(start):
            return name
    if encoded[4:8] in _MOV_BOXES:
        if encoded[4:8] == b"ftyp" and encoded[8:12] in _PICTURE_BRANDS:
            raise _picture("HEIF")
        return "mov"
    if encoded.startswith(b"RIFF"):
        kind = encoded[8:12]
        if kind == b"AVI ":
            return "avi"
        raise _picture("WebP") if kind == b"WEBP" else invalid("it is a RIFF file, but no AVI")
    if encoded[:1] == b"\x47" and encoded[_TS_PACKET_BYTES : _TS_PACKET_BYTES + 1] in (b"\x47", b""):
        return "mpegts"
    for start, name in _PICTURES.items():
        if encoded.startswith(start):
            raise _picture(name)
    for start, name in _SOUNDS.items():
        if encoded.startswith(start):
            raise invalid(f"it is sound without pictures ({name})")
    raise invalid("it is not in a known format (MP4/MOV, Matroska/WebM, AVI, MPEG-TS/PS, FLV, Ogg, ASF)")


def _picture(name: str) -> Exception:
    return invalid(f"it is a picture ({name}); send it as an image_url")

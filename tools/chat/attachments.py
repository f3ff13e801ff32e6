"""Pictures and clips of a question: files become data URLs, paths are found in a line."""

from __future__ import annotations

import base64
import mimetypes
import re
from pathlib import Path
from typing import Any, Literal

Kind = Literal["image", "video"]
Part = dict[str, Any]  # of a message, as the API has it

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv"),
}
MAX_FILE_MIB = 512  # servers take less: this only keeps a slip of the finger out of memory
_WORD = re.compile(r"""'([^']+)'|"([^"]+)"|((?:\\.|[^\s'"\\])+)""")
_ESCAPED = re.compile(r"\\(.)")


class AttachmentError(Exception):
    """A file that cannot be sent, in one line."""


def attach(kind: Kind, source: str) -> Part:
    """The part of a message that shows a file, or what is at a URL.  Raises: AttachmentError."""
    if re.match(r"(https?|data|file):", source):
        return _part(kind, source)
    path = Path(source).expanduser()
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_MIB << 20:
            raise AttachmentError(f"{source}: {num_bytes >> 20} MiB, more than {MAX_FILE_MIB}")
        content = path.read_bytes()
    except OSError as error:
        raise AttachmentError(f"{source}: {error.strerror}") from None
    media_type = mimetypes.guess_type(path.name)[0] or ""
    if not media_type.startswith(f"{kind}/"):
        media_type = f"{kind}/*"  # the bytes decide
    return _part(kind, f"data:{media_type};base64,{base64.b64encode(content).decode()}")


def _part(kind: Kind, url: str) -> Part:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def parts_of(line: str) -> list[str | tuple[Kind, str]]:
    """Texts, and between them the pictures and clips whose paths stand in the line, as dropped on a terminal or typed.

    A word is a path if it has a suffix of theirs and such a file is there; quotes and escaped spaces hold it together.
    """
    parts: list[str | tuple[Kind, str]] = []
    begin = 0
    for word in _WORD.finditer(line):
        path = word[1] or word[2] or _ESCAPED.sub(r"\1", word[3])
        kind = _kind_of(path)
        if kind is not None:
            parts += [line[begin : word.start()].strip(), (kind, path)]
            begin = word.end()
    parts.append(line[begin:].strip())
    return [part for part in parts if part]


def _kind_of(path: str) -> Kind | None:
    suffix = Path(path).suffix.lower()
    kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    try:
        return kind if kind is not None and Path(path).expanduser().is_file() else None
    except (OSError, RuntimeError, ValueError):  # no name of a file, or of no home directory
        return None

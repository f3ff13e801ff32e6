"""Requests from a file of your own, one JSON object a line.

    {"prompt": "What is it?", "image_files": ["a.jpg", "https://host/b.png"], "video_files": [], "output_tokens": 64}
    {"messages": [...], "max_tokens": 64, "temperature": 0.5}
    {"custom_id": "1", "body": {"messages": [...], "max_tokens": 64}}

The second form is the body of a chat completion, the third a line of an OpenAI batch. Paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from vlmrt.tools.bench.asks import Ask
from vlmrt.tools.bench.media import Media, MediaFile, MediaUrl

Line = dict[str, msgspec.Raw]
OURS = ("model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "messages")  # not copied to a body
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]  # of tokens; 0: as where a line does not say it
FETCHED = ("http:", "https:", "data:", "file:")


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    image_files: list[str] = []
    video_files: list[str] = []
    output_tokens: Count | None = None


def recorded(path: Path, output_tokens: int) -> list[Ask]:
    """`output_tokens`: where a line does not say how long its answer is.

    Raises: ValueError naming the line, OSError.
    """
    asks = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                asks.append(_ask(line, path.parent, output_tokens))
            except (msgspec.DecodeError, ValueError) as wrong:
                raise ValueError(f"{path}, line {number}: {wrong}") from wrong
    return asks


def _ask(line: bytes, root: Path, output_tokens: int) -> Ask:
    fields = msgspec.json.decode(line, type=Line)
    if "body" in fields:
        fields = msgspec.json.decode(fields["body"], type=Line)
    if "messages" in fields:
        msgspec.json.decode(fields["messages"], type=list[dict[str, msgspec.Raw]])
        asked = fields.get("max_completion_tokens", fields.get("max_tokens", msgspec.Raw(b"null")))
        num_tokens = msgspec.json.decode(asked, type=Count | None)
        more = {name: value for name, value in fields.items() if name not in OURS}
        return Ask(
            "",
            num_tokens or output_tokens,
            exact=False,
            messages=bytes(fields["messages"]),
            fields=msgspec.json.encode(more),
        )
    if "prompt" not in fields:
        raise ValueError("neither prompt, messages nor body")
    found = msgspec.json.decode(line if b'"body"' not in line else msgspec.json.encode(fields), type=Prompt)
    shown = [_media(name, root, is_video=False) for name in found.image_files]
    shown += [_media(name, root, is_video=True) for name in found.video_files]
    return Ask(found.prompt, found.output_tokens or output_tokens, tuple(shown), exact=False)


def _media(name: str, root: Path, *, is_video: bool) -> Media:
    if name.startswith(FETCHED):
        return MediaUrl(name, is_video)
    return MediaFile(str(root / name), is_video)

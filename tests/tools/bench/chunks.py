"""Server-sent events as a server writes them, right and wrong ones."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

END = b"data: [DONE]\n\n"
PAUSE_S = 0.005


def chunk(text: str, num_tokens: int) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": num_tokens, "completion_tokens_details": {"reasoning_tokens": 0}}
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], "usage": usage}).encode() + b"\n\n"


async def stream_answer(response: web.StreamResponse, kind: str, num_tokens: int) -> None:
    """An answer of that many tokens, or one that is wrong in the way that `kind` says."""
    step = 2 if kind == "two by two" else 1
    last = num_tokens - 1 if kind == "too short" else num_tokens
    for count in range(step, last + 1, step):
        data = chunk("" if count % 3 == 0 else "word", count)
        await response.write(data.replace(b'"delta"', b'"text"') if kind == "no text" else data)
        await asyncio.sleep(PAUSE_S)
    if kind == "error inside":
        await response.write(b'data: {"error":{"message":"the tower burnt down"}}\n\n')
    if kind != "no end":
        await response.write(END)

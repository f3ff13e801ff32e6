"""What a server takes, found out by asking it once before the clock starts."""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import msgspec

from vlmrt.tools.bench.asks import Ask, Counts, Dialogue, Target

REFUSED = (400, 422)  # a field that the server does not know
PROBE = Ask("Hello", 2, exact=False)
PROBE_S = 120.0
POLL_S = 0.5
MAX_SHOWN_BYTES = 300
MAX_READ_BYTES = 4 << 20  # of a list of models, or an answer of two tokens
PIECE_BYTES = 64 << 10


class Unusable(Exception):
    """A server that does not answer, or not as an OpenAI-compatible one."""


class Found(msgspec.Struct, frozen=True):
    target: Target
    notes: tuple[str, ...]  # what the server does not take, and what follows


def wait_until_up(target: Target, timeout_s: float) -> None:
    """Until something listens there.  Raises: Unusable."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            _open(target, "/v1/models", None).close()
            return
        except urllib.error.HTTPError as answer:
            answer.close()
            return  # who refuses is up
        except (OSError, http.client.HTTPException) as lost:
            if time.monotonic() >= deadline_s:
                raise Unusable(f"{target.url}: {_reason(lost)}") from None
        time.sleep(POLL_S)


def first_model(target: Target) -> str:
    """The name of the first model that the server lists.  Raises: Unusable."""
    try:
        with _open(target, "/v1/models", None) as answer:
            return str(json.loads(_whole(answer))["data"][0]["id"])
    except urllib.error.HTTPError as refused:
        with refused:
            raise Unusable(f"GET {target.url}/v1/models: {_shown(refused)}; --model names one") from None
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as wrong:
        raise Unusable(f"GET {target.url}/v1/models: {_reason(wrong)}; --model names one") from None


def probed(target: Target) -> Found:
    """The target without the fields that the server refuses.  Raises: Unusable."""
    refusal = ""
    for tried, notes in _variants(target):
        body = Dialogue(tried, {}).body(PROBE)
        try:
            with _open(tried, tried.endpoint, body) as answer:
                _whole(answer)
            return Found(tried, notes)
        except urllib.error.HTTPError as refused:
            with refused:
                refusal = refusal or _shown(refused)
                if refused.code not in REFUSED:
                    break
        except (OSError, http.client.HTTPException) as lost:
            refusal = _reason(lost)
            break
    raise Unusable(f"POST {target.url}{target.endpoint}: {refusal}")


def _variants(target: Target) -> Iterator[tuple[Target, tuple[str, ...]]]:
    """With ever fewer fields that not every server knows."""
    no_counts = "the server takes no stream_options: tokens are counted as chunks with text, or by --tokenizer"
    no_length = "the server does not take ignore_eos: answers end where the model ends them"
    for ignore_eos in (True, False) if target.ignore_eos else (False,):
        notes = (no_length,) if target.ignore_eos and not ignore_eos else ()
        levels: tuple[tuple[Counts, tuple[str, ...]], ...] = (
            ("every chunk", ()),
            ("at the end", ()),
            ("none", (no_counts,)),
        )
        for counts, more in levels:
            yield msgspec.structs.replace(target, ignore_eos=ignore_eos, counts=counts), (*notes, *more)


def _open(target: Target, path: str, body: bytes | None) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json", **dict(target.headers)}
    request = urllib.request.Request(target.url + path, body, headers)
    context = None if target.verified else ssl._create_unverified_context()
    straight = urllib.request.ProxyHandler({})  # as the load goes, whatever proxy the environment names
    opener = urllib.request.build_opener(straight, urllib.request.HTTPSHandler(context=context))
    answer: http.client.HTTPResponse = opener.open(request, timeout=PROBE_S)
    return answer


def _whole(answer: http.client.HTTPResponse) -> bytes:
    """Raises: OSError if it does not end, or not in time: a socket's own timeout is between two of its bytes."""
    pieces, num_bytes, deadline_s = [], 0, time.monotonic() + PROBE_S
    while piece := answer.read1(PIECE_BYTES):
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes > MAX_READ_BYTES:
            raise OSError(f"the answer has more than {MAX_READ_BYTES >> 20} MiB")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the answer has no end after {PROBE_S:g} s")
    return b"".join(pieces)


def _shown(refused: urllib.error.HTTPError) -> str:
    return f"{refused.code}: {refused.read(MAX_SHOWN_BYTES).decode(errors='replace')}"


def _reason(lost: Exception) -> str:
    reason = lost.reason if isinstance(lost, urllib.error.URLError) else lost
    return str(reason) or type(reason).__name__

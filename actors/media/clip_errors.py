"""What can be wrong with a clip, in words for who sent it, and how long finding out may take."""

from __future__ import annotations

import time

from vlmrt.runtime.errors import RequestError


class Deadline:
    """A point in time by which a piece of work is to be done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at_s = time.monotonic() + seconds

    def check(self) -> None:
        """Raises: RequestError 400 once it has passed."""
        if time.monotonic() > self._at_s:
            raise RequestError(
                f"the video takes more than {self._seconds:g} s to decode a few of its frames", code="video_too_slow"
            )


def invalid(problem: str) -> RequestError:
    return RequestError(f"the video cannot be decoded: {problem}", code="invalid_video")


def too_large(what: str, limit: float) -> RequestError:
    return RequestError(f"the video has more than {limit:g} {what}", code="video_too_large")

"""Clips kept open for more of their frames, the least recently used given up first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vlmrt.actors.media.clip import Clip
from vlmrt.runtime.config import VideoOptions

MAX_OPEN = 8


class OpenClips:
    """At most max_bytes of encoded clips that nobody uses, and MAX_OPEN of them.  For any thread.

    A clip that is in use is nobody else's: who wants it meanwhile opens it again.
    """

    def __init__(self, options: VideoOptions) -> None:
        self._options = options
        self._max_bytes = options.open_mib << 20
        self._idle: list[Clip] = []  # oldest first
        self._lock = threading.Lock()

    @contextmanager
    def use(self, encoded: bytes) -> Iterator[Clip]:
        """The clip of these bytes, open.  Raises: RequestError 400 if they cannot be."""
        clip = self._take(encoded) or Clip(encoded, self._options)
        try:
            yield clip
        except BaseException:
            clip.close()
            raise
        self._keep(clip)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for clip in idle:
            clip.close()

    def _take(self, encoded: bytes) -> Clip | None:
        with self._lock:
            for clip in reversed(self._idle):
                if clip.encoded == encoded:  # of another length at once, of the same one after a few bytes mostly
                    self._idle.remove(clip)
                    return clip
        return None

    def _keep(self, clip: Clip) -> None:
        with self._lock:
            self._idle.append(clip)
            given_up = []
            while len(self._idle) > MAX_OPEN or sum(len(idle.encoded) for idle in self._idle) > self._max_bytes:
                given_up.append(self._idle.pop(0))
        for old in given_up:
            old.close()

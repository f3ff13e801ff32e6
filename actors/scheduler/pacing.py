"""How many prefill tokens a step may hold beside decode rows, so that it ends within a target; learned from results.

A step's time is taken as base + tokens * cost: the base is the median of recent steps that only decode, the cost is the
median of what prefill tokens added to recent steps, each step counted by its tokens.  Medians, since the first steps
of a process and those beside a busy neighbour are slow.  No clock: durations come with StepResult.

A step that only decodes follows each one whose prefill takes long, so that the median time between tokens stays close
to that of decoding alone however much prefill there is.
"""

from __future__ import annotations

from collections import deque
from statistics import median

NUM_STEPS = 16  # of either kind that are remembered
LONG = 0.7  # prefill takes long if it adds more than this share of what decoding takes
_MANY_TOKENS = 1e9


class Pacing:
    """The cost model of one TP group."""

    def __init__(self, target_ms: float | None, min_tokens: int) -> None:
        """`target_ms` bounds a step that decodes, None: nothing does; `min_tokens` may run whatever they cost."""
        self._target_ms = target_ms
        self._min_tokens = min_tokens
        self._decodes_ms: deque[float] = deque(maxlen=NUM_STEPS)
        self._prefills: deque[tuple[float, int]] = deque(maxlen=NUM_STEPS)  # ms per token, tokens
        self.base_ms = 0.0
        self.token_ms = 0.0
        self._only_decodes_next = False

    def planned(self, num_decode_rows: int, num_prefill_tokens: int) -> None:
        """A step of these rows is the next to run."""
        is_long = num_prefill_tokens * self.token_ms > LONG * self.base_ms
        self._only_decodes_next = self._target_ms is not None and num_decode_rows > 0 and is_long

    def observe(self, num_decode_rows: int, num_prefill_tokens: int, duration_ms: float) -> None:
        """A step of these rows took this long."""
        if self._target_ms is None or not 0.0 < duration_ms < float("inf"):
            return
        if num_prefill_tokens > 0:
            added_ms = max(0.0, duration_ms - self.base_ms)
            self._prefills.append((added_ms / num_prefill_tokens, num_prefill_tokens))
            self.token_ms = _weighted_median(self._prefills)
        elif num_decode_rows > 0:
            self._decodes_ms.append(duration_ms)
            self.base_ms = median(self._decodes_ms)

    def max_prefill_tokens(self, num_decode_rows: int) -> int | None:
        """The most prefill tokens of the next step beside so many decode rows; None: as many as there is room for."""
        if self._target_ms is None or num_decode_rows == 0 or self.token_ms == 0.0:
            return None
        if self._only_decodes_next:
            return 0
        fitting = min((self._target_ms - self.base_ms) / self.token_ms, _MANY_TOKENS)
        return max(self._min_tokens, int(fitting))


def _weighted_median(pairs: deque[tuple[float, int]]) -> float:
    """The value that half of the weight does not exceed."""
    half = sum(weight for _, weight in pairs) / 2
    for value, weight in sorted(pairs):
        half -= weight
        if half <= 0:
            return value
    raise AssertionError("no pairs")

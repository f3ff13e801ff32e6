"""M-RoPE positions of any range of tokens, from where the media lie and how large their grids are (numpy only).

Text counts on in all three components. A medium's tokens start at the position p that the next text token would
have had; the token at (frame, row, column) of its merged grid gets (p + frame, p + row, p + column); the text after
it goes on at p + max(rows, columns). Source: arXiv:2409.12191, section 2.1.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray


class MediaSpan(msgspec.Struct, frozen=True):
    """The placeholder tokens of one image or clip in a prompt."""

    start: int  # index of its first placeholder token
    num_tokens: int
    grid_thw: tuple[int, int, int]  # patches along time, height and width, before merging
    time_interval: int = 1  # positions between two frames


def _advance(span: MediaSpan, merge_size: int) -> int:
    """Positions that a span takes from the text after it."""
    _, height, width = span.grid_thw
    return max(height, width) // merge_size


def rope_delta(num_tokens: int, spans: Sequence[MediaSpan], merge_size: int) -> int:
    """What to add to the index of a generated token to get its position.

    num_tokens: length of the prompt; spans in order of start.
    """
    offset = 0
    highest = -1
    for span in spans:
        frames = span.grid_thw[0]
        advance = _advance(span, merge_size)
        highest = max(highest, span.start + offset + max(advance, (frames - 1) * span.time_interval + 1) - 1)
        offset += advance - span.num_tokens
    if not spans or spans[-1].start + spans[-1].num_tokens < num_tokens:
        highest = max(highest, num_tokens - 1 + offset)
    return highest + 1 - num_tokens


def mrope_positions(
    start: int,
    stop: int,
    spans: Sequence[MediaSpan],
    num_prompt_tokens: int,
    rope_delta: int,
    merge_size: int,
) -> NDArray[np.int64]:
    """Positions of the tokens [start, stop), which may lie in the prompt, after it, or across its end.

    Shapes: -> int64 [3, stop - start]: time, height, width. Cost: the range plus the number of spans.
    """
    index = np.arange(start, stop, dtype=np.int64)
    if start >= num_prompt_tokens or not spans:
        text = np.where(index < num_prompt_tokens, index, index + rope_delta) if start < stop else index
        return np.broadcast_to(text, (3, stop - start)).copy()

    num_spans = len(spans)
    starts = np.fromiter((span.start for span in spans), np.int64, num_spans)
    lengths = np.fromiter((span.num_tokens for span in spans), np.int64, num_spans)
    advances = np.fromiter((_advance(span, merge_size) for span in spans), np.int64, num_spans)
    # offsets[i]: position minus index of the text after i spans
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(advances - lengths)))

    num_begun = np.searchsorted(starts, index, side="right")  # spans begun at or before each token
    text = index + offsets[num_begun]
    text = np.where(index < num_prompt_tokens, text, index + rope_delta)
    positions = np.broadcast_to(text, (3, stop - start)).copy()

    latest = np.maximum(num_begun - 1, 0)
    inside = (num_begun > 0) & (index < starts[latest] + lengths[latest])
    if inside.any():
        of = latest[inside]
        grids = np.array([span.grid_thw for span in spans], dtype=np.int64)
        columns = (grids[:, 2] // merge_size)[of]
        frame_tokens = (grids[:, 1] // merge_size)[of] * columns
        intervals = np.fromiter((span.time_interval for span in spans), np.int64, num_spans)[of]
        within = index[inside] - starts[of]
        base = starts[of] + offsets[of]
        positions[0, inside] = base + within // frame_tokens * intervals
        positions[1, inside] = base + within % frame_tokens // columns
        positions[2, inside] = base + within % columns
    return positions

"""M-RoPE positions of any range of tokens, from where the media lie and how large their grids are (numpy only).

Text counts on in all three components. A medium's tokens start at the position p that the next text token would
have had; the token at (frame, row, column) of its merged grid gets (p + frame, p + row, p + column); the text after
it goes on at p + max(rows, columns). A clip is a row of spans, one a temporal group, which all start at the same p:
the token at (row, column) of a group gets (p + time_offset, p + row, p + column). Source: arXiv:2409.12191, section
2.1, and for the offsets of groups, which depend on the family, arXiv:2502.13923, section 2.1.2.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class MediaSpan(msgspec.Struct, frozen=True):
    """The placeholder tokens of one image or of one temporal group of a clip in a prompt."""

    start: int  # index of its first placeholder token
    num_tokens: int
    grid_thw: tuple[int, int, int]  # patches along time, height and width, before merging
    time_offset: int = 0  # positions from the first group of its clip
    continues: bool = False  # goes on with the clip of the span before it, right behind which it lies


class _Layout:
    """Where spans begin, as arrays by span."""

    def __init__(self, spans: Sequence[MediaSpan], merge_size: int) -> None:
        num_spans = len(spans)
        self.starts = np.fromiter((span.start for span in spans), np.int64, num_spans)
        self.lengths = np.fromiter((span.num_tokens for span in spans), np.int64, num_spans)
        self.time_offsets = np.fromiter((span.time_offset for span in spans), np.int64, num_spans)
        self.grids = np.array([span.grid_thw for span in spans], np.int64).reshape(num_spans, 3)
        continues = np.fromiter((span.continues for span in spans), np.bool_, num_spans)
        self.advances = self.grids[:, 1:].max(axis=1, initial=0) // merge_size  # what its clip takes from later text
        # offsets[i]: position minus index of the text after i spans
        steps = np.where(continues, 0, self.advances) - self.lengths
        self.offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(steps)))
        first = np.maximum.accumulate(np.where(continues, 0, np.arange(num_spans)))
        self.bases = (self.starts + self.offsets[:-1])[first]  # the position at which its clip starts


def rope_delta(num_tokens: int, spans: Sequence[MediaSpan], merge_size: int) -> int:
    """What to add to the index of a generated token to get its position.

    num_tokens: length of the prompt; spans in order of start.
    """
    if not spans:
        return 0
    layout = _Layout(spans, merge_size)
    times = layout.time_offsets + layout.grids[:, 0]
    following = int((layout.bases + np.maximum(layout.advances, times)).max())
    if spans[-1].start + spans[-1].num_tokens < num_tokens:
        following = max(following, num_tokens + int(layout.offsets[-1]))
    return following - num_tokens


def mrope_positions(
    start: int,
    stop: int,
    spans: Sequence[MediaSpan],
    num_prompt_tokens: int,
    rope_delta: int,
    merge_size: int,
) -> Ints:
    """Positions of the tokens [start, stop), which may lie in the prompt, after it, or across its end.

    Shapes: -> int64 [3, stop - start]: time, height, width. Cost: the range plus the number of spans.
    """
    index = np.arange(start, stop, dtype=np.int64)
    if start >= num_prompt_tokens or not spans:
        text = np.where(index < num_prompt_tokens, index, index + rope_delta) if start < stop else index
        return np.broadcast_to(text, (3, stop - start)).copy()

    layout = _Layout(spans, merge_size)
    num_begun = np.searchsorted(layout.starts, index, side="right")  # spans begun at or before each token
    text = index + layout.offsets[num_begun]
    text = np.where(index < num_prompt_tokens, text, index + rope_delta)
    positions = np.broadcast_to(text, (3, stop - start)).copy()

    latest = np.maximum(num_begun - 1, 0)
    inside = (num_begun > 0) & (index < layout.starts[latest] + layout.lengths[latest])
    if inside.any():
        of = latest[inside]
        columns = (layout.grids[:, 2] // merge_size)[of]
        frame_tokens = (layout.grids[:, 1] // merge_size)[of] * columns
        within = index[inside] - layout.starts[of]
        base = layout.bases[of]
        positions[0, inside] = base + layout.time_offsets[of] + within // frame_tokens
        positions[1, inside] = base + within % frame_tokens // columns
        positions[2, inside] = base + within % columns
    return positions

"""CUDA graphs of the vision tower's layers: one launch for a few layers, at a fixed set of patch counts.

A batch runs at the smallest recorded count that holds it. The patches behind its own are padding that belongs to no
segment: whatever they hold stays in their rows, since attention alone looks at other rows, and only within segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmrt.actors.models.vision_tower import VisionState, VisionTower
from vlmrt.kernels.vision_attention import Segments

MAX_PATCHES = 8192  # more keep the device busy for longer than their launches take
# Closer together where a batch is short and padding would be much of it.
PATCH_COUNTS = (*range(128, 2048, 128), *range(2048, MAX_PATCHES + 1, 256))
LAYERS_PER_GRAPH = 4  # 2.9 ms of 8 x 1,024 patches on an H100: within half a quantum
SPARE_TILES = 64  # of short or last tiles: an empty one costs a program that ends at once
PATCHES_PER_WINDOW_TILE = 32  # whole windows hold 64, those at the edges of pictures fewer


def patch_counts(max_patches: int) -> tuple[int, ...]:
    """The counts to record for batches of at most max_patches, ascending; MAX_PATCHES ends them."""
    below = [count for count in PATCH_COUNTS if count < max_patches]
    return PATCH_COUNTS[: len(below) + 1]


def most_frame_tiles(num_patches: int, tile: int) -> int:
    return num_patches // tile + SPARE_TILES


def most_window_tiles(num_patches: int) -> int:
    return num_patches // PATCHES_PER_WINDOW_TILE + SPARE_TILES


def graph_end(first: int, last: int, num_layers: int) -> int:
    """Where graphs that start at layer first stop: whole graphs up to layer last, one at least."""
    whole = last if last == num_layers else last // LAYERS_PER_GRAPH * LAYERS_PER_GRAPH
    return min(max(whole, first + LAYERS_PER_GRAPH), num_layers)


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the graphs of one count read and write: the beginnings of the largest count's."""

    x: Tensor  # [num_patches, embed_dim], the residual stream
    shifts: Tensor  # as VisionState's, of every batch
    cos: Tensor  # float32 [num_patches, head_dim]
    sin: Tensor
    frames: Segments  # their tables end with empty tiles
    windows: Segments | None

    @staticmethod
    def zeros(num_patches: int, like: VisionState) -> Buffers:
        """Room for num_patches patches of a tower that lays out batches like this one."""

        def rows(of: Tensor) -> Tensor:
            return of.new_zeros(num_patches, of.shape[1])

        def empty_tiles(of: Segments, num_tiles: int) -> Segments:
            tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, device=like.x.device)
            return Segments((num_patches,), of.tile, tiles)

        frames = empty_tiles(like.frames, most_frame_tiles(num_patches, like.frames.tile))
        windows = None if like.windows is None else empty_tiles(like.windows, most_window_tiles(num_patches))
        return Buffers(rows(like.x), like.shifts, rows(like.cos), rows(like.sin), frames, windows)

    def cut(self, num_patches: int) -> Buffers:
        """The beginnings of these for fewer patches."""

        def first_tiles(of: Segments, num_tiles: int) -> Segments:
            return Segments((num_patches,), of.tile, _tiles(of)[:num_tiles])

        return Buffers(
            self.x[:num_patches],
            self.shifts,
            self.cos[:num_patches],
            self.sin[:num_patches],
            first_tiles(self.frames, most_frame_tiles(num_patches, self.frames.tile)),
            None if self.windows is None else first_tiles(self.windows, most_window_tiles(num_patches)),
        )

    def holds(self, state: VisionState) -> bool:
        if len(state.x) > len(self.x) or len(_tiles(state.frames)) > len(_tiles(self.frames)):
            return False
        if self.windows is None or state.windows is None:
            return True
        return len(_tiles(state.windows)) <= len(_tiles(self.windows))

    def fill(self, state: VisionState) -> None:
        """Take a batch over: x of the state becomes a part of these."""
        num_patches = len(state.x)
        for into, values in ((self.x, state.x), (self.cos, state.cos), (self.sin, state.sin)):
            into[:num_patches].copy_(values)
        for table, segments in ((self.frames, state.frames), (self.windows, state.windows)):
            if table is not None and segments is not None:
                into, tiles = _tiles(table), _tiles(segments)
                into[: len(tiles)].copy_(tiles)
                into[len(tiles) :].zero_()
        state.x = self.x[:num_patches]

    def state(self) -> VisionState:
        """A batch of all these patches, before the first layer."""
        return VisionState(self.x, self.shifts, self.cos, self.sin, self.frames, self.windows, None)


@dataclass(frozen=True, slots=True)
class Recorded:
    """All layers at one count, LAYERS_PER_GRAPH to a graph."""

    buffers: Buffers
    graphs: tuple[torch.cuda.CUDAGraph, ...]

    def run(self, state: VisionState, last: int, num_layers: int) -> None:
        """Run a batch, from its next layer to graph_end for this last one.

        The buffers are its own from the first layer on until what follows the last one is queued.
        """
        first = state.next_layer
        if first == 0:
            self.buffers.fill(state)
        state.next_layer = graph_end(first, last, num_layers)
        for graph in self.graphs[first // LAYERS_PER_GRAPH : -(-state.next_layer // LAYERS_PER_GRAPH)]:
            graph.replay()


class TowerGraphs:
    """A tower's layers at the recorded counts, in a dtype whose attention goes by tables of tiles: not float32."""

    def __init__(
        self, tower: VisionTower, counts: Sequence[int], progress: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """progress: is told after each count how many of how many are done."""
        self._tower = tower
        embed = tower.patch_embed
        merge = tower.config.spatial_merge_size
        # Default priority, as the tower's other kernels have: a language model's go first.
        stream = torch.cuda.Stream(embed.device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            like = tower.lay_out(embed.new_zeros(merge**2, len(embed)), [(1, merge, merge)])
            self.buffers = Buffers.zeros(max(counts), like)
            self._warm_up(min(counts), tower.num_layers)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up(min(counts), 1)  # gives cuBLAS the workspace of this stream
            torch.cuda.current_stream().wait_stream(stream)
            recorded = []
            # Largest first: the smaller ones find room in the memory that it has left.
            for done, count in enumerate(sorted(counts, reverse=True)):
                self._warm_up(count, min(2, tower.num_layers))
                recorded.append(self._record(self.buffers.cut(count), pool, stream))
                progress(done + 1, len(counts))
        self._recorded = recorded[::-1]

    def find(self, state: VisionState) -> Recorded | None:
        """The layers at the smallest count that holds a batch; None if there is none."""
        return next((recorded for recorded in self._recorded if recorded.buffers.holds(state)), None)

    def _warm_up(self, num_patches: int, num_layers: int) -> None:
        """Run layers outside the graphs: kernels are loaded before they are captured."""
        self._tower.run_layers(self.buffers.cut(num_patches).state(), 0, num_layers)

    def _record(self, buffers: Buffers, pool: Any, stream: torch.cuda.Stream) -> Recorded:
        """Between its graphs a batch lies in the buffers alone; what is in the pool belongs to the graph that runs."""
        state, num_layers = buffers.state(), self._tower.num_layers
        graphs = []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            while state.next_layer < num_layers:
                graph = torch.cuda.CUDAGraph()
                # torch.cuda.graph would collect garbage and give memory back first: a tenth of a second each time.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                self._tower.run_layers(
                    state, state.next_layer, graph_end(state.next_layer, state.next_layer, num_layers)
                )
                graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        return Recorded(buffers, tuple(graphs))


def _tiles(segments: Segments) -> Tensor:
    assert segments.tiles is not None
    return segments.tiles

"""A vision tower that runs whole or a few layers at a time; what a family's blocks are is handed in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.layers import Linear, Norm, Target, parameter, whole
from vlmrt.actors.models.vision_grid import GridThw, frame_lengths, patch_positions, window_layout
from vlmrt.kernels.layer_norm import layer_norm
from vlmrt.kernels.rms_norm import rms_norm
from vlmrt.kernels.rotary import rotary_tables, rotate
from vlmrt.kernels.segment_rows import SegmentRows
from vlmrt.kernels.transfer import to_device
from vlmrt.kernels.vision_attention import LONG_TILE, Segments, pack_segments, tile_for, vision_attention

NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclass(slots=True)
class VisionState:
    """A batch of images on its way through the tower, between two quanta of layers."""

    x: Tensor  # [num_patches, embed_dim], the residual stream without its biases; every layer adds to it in place
    shifts: Tensor  # float32 [2 * depth + 1, embed_dim], what the stream lacks at each norm; see VisionTower.shifts
    cos: Tensor  # float32 [num_patches, head_dim]
    sin: Tensor
    frames: Segments
    windows: Segments | None  # set in towers with windowed attention, whose patches lie in window order
    restore: Tensor | None  # int64 [rows]: the place of each row in window order
    next_layer: int = 0


class VisionBlock(Protocol):
    """One layer of a tower: attention and MLP, each of which adds to the residual stream x in place.

    shifts and biases [2, embed_dim], attention's first: what x lacks at the norms, and where the biases belong that the
    products into x leave out.
    """

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | SegmentRows, shifts: Tensor
    ) -> None: ...

    def targets(self, prefix: str, biases: Tensor) -> Iterator[tuple[str, Target]]: ...


BlockFactory = Callable[[VisionConfig, torch.dtype, torch.device], nn.Module]


def shifted_norm(x: Tensor, shift: Tensor, norm: Norm) -> Tensor:
    """x + shift normalised, by the kind of norm."""
    if norm.bias is None:
        return rms_norm(x, norm.weight, norm.eps, shift)
    return layer_norm(x, norm.weight, norm.bias, norm.eps, shift)


def inverse_frequency(config: VisionConfig, device: torch.device) -> Tensor:
    """Of the pairs that turn with the row, as many turn with the column: float32 [head_dim / 4]."""
    axis_dim = config.head_dim // 2
    pair = torch.arange(0, axis_dim, 2, dtype=torch.float32)
    return (1.0 / ROPE_THETA ** (pair / axis_dim)).to(device)


def turned_by(positions: NDArray[np.int64], frequency: Tensor) -> tuple[Tensor, Tensor]:
    """rotary_tables of patches at these rows and columns, [num_patches, 2], on the frequency's device."""
    return rotary_tables((to_device(positions, frequency.device).float()[:, :, None] * frequency).flatten(1))


def check_grids(num_patches: int, grid_thw: Sequence[GridThw], merge_size: int) -> None:
    """Raises: ValueError if the grids do not describe num_patches patches in whole merge blocks."""
    expected = sum(frames * height * width for frames, height, width in grid_thw)
    if not expected or num_patches != expected:
        raise ValueError(f"{num_patches} patches, but grid_thw {list(grid_thw)} asks for {expected}")
    if any(height % merge_size or width % merge_size for _, height, width in grid_thw):
        raise ValueError(f"grid_thw {list(grid_thw)}: heights and widths must be multiples of {merge_size}")


class ResidualLinear(nn.Module):
    """A projection into the residual stream, whose bias is the tower's: the norms behind it add that."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual += x @ weight.T, in place and rounded once. Shapes: [T, out_features], [T, in_features]."""
        residual.addmm_(x, self.weight.t())


class VisionAttention(nn.Module):
    """Multi-head attention within segments, with rotary positions of rows and columns."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim, True, dtype, device)
        self.proj = ResidualLinear(config.embed_dim, config.embed_dim, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | SegmentRows, residual: Tensor) -> None:
        """Attend among the rows of x; what comes of it is added to residual."""
        num_patches = x.shape[0]
        heads = self.qkv(x).view(num_patches, 3 * self.num_heads, self.head_dim)
        q, k = rotate(heads[:, : 2 * self.num_heads], cos, sin).chunk(2, dim=1)
        v = heads[:, 2 * self.num_heads :]
        attended = vision_attention(q, k, v, segments, self.scale)
        self.proj.add_to(residual, attended.reshape(num_patches, -1))

    def targets(self, prefix: str, bias: Tensor) -> Iterator[tuple[str, Target]]:
        """bias: the projection's."""
        yield from self.qkv.targets(f"{prefix}qkv.")
        yield f"{prefix}proj.weight", whole(self.proj.weight)
        yield f"{prefix}proj.bias", whole(bias)


class PatchMerger(nn.Module):
    """spatial_merge_size**2 neighbouring patches into one row of the language model's width."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = Norm(config.embed_dim, NORM_EPS, config.norm != "rms_norm", dtype, device)
        self.first = Linear(self.width, self.width, True, dtype, device)
        self.second = Linear(self.width, config.out_hidden_size, True, dtype, device)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        normed = shifted_norm(x, shift, self.ln_q)
        return self.second(F.gelu(self.first(normed.view(-1, self.width))))  # type: ignore[no-any-return]

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.ln_q.targets(f"{prefix}ln_q.")
        yield from self.first.targets(f"{prefix}mlp.0.")
        yield from self.second.targets(f"{prefix}mlp.2.")


class VisionTower(nn.Module):
    """Patches of images and clips -> rows for the language model; an image's rows do not depend on its neighbours.

    All index tensors are computed on the host from grid_thw, so no layer waits for the device.
    """

    def __init__(self, config: VisionConfig, block: BlockFactory, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = parameter(config.embed_dim, config.patch_dim, dtype=dtype, device=device)
        self.blocks = nn.ModuleList([block(config, dtype, device) for _ in range(config.depth)])
        # Zeros, which the first norm lacks, then of each layer attention's and the MLP's.
        self.residual_biases = parameter(1 + 2 * config.depth, config.embed_dim, dtype=dtype, device=device)
        self.residual_biases[0].zero_()
        self.merger = PatchMerger(config, dtype, device)
        self.inverse_frequency = inverse_frequency(config, device)

    @property
    def num_layers(self) -> int:
        return self.config.depth

    def forward(self, pixel_values: Tensor, grid_thw: Sequence[GridThw]) -> Tensor:
        """Encode a batch of images and clips.

        Shapes: pixel_values [num_patches, channels * temporal_patch_size * patch_size**2] in the image processors'
        order, grid_thw patches per item -> [num_patches / spatial_merge_size**2, out_hidden_size], items in order.
        Raises: ValueError if the grids do not describe num_patches patches in whole merge blocks.
        """
        state = self.prepare(pixel_values, grid_thw)
        return self.finish(self.run_layers(state, 0, self.num_layers))

    def prepare(self, pixel_values: Tensor, grid_thw: Sequence[GridThw]) -> VisionState:
        """Embed the patches and lay out the batch: what comes before the first layer. See forward for the shapes."""
        return self.lay_out(self.embed(pixel_values), grid_thw)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """[num_patches, patch_dim] -> [num_patches, embed_dim]."""
        return F.linear(pixel_values.to(self.patch_embed.device, self.patch_embed.dtype), self.patch_embed)

    def patch_embed_still(self) -> Tensor:
        """The patch embedding of a still image, [embed_dim, channels * patch_size**2].

        Its temporal_patch_size frames are one frame, so their slices of the kernel are summed: half the products and
        half the patches' bytes. The sum is taken in float32 and rounded once.
        """
        config = self.config
        area = config.patch_size**2
        slices = self.patch_embed.view(config.embed_dim, config.in_channels, config.temporal_patch_size, area)
        return slices.float().sum(2).to(self.patch_embed.dtype).view(config.embed_dim, -1)

    def shifts(self) -> Tensor:
        """What the residual stream lacks at each norm, the merger's last: all biases before it, float32.

        So the products add to the stream in place, and a norm reads one tensor and writes one.
        """
        return self.residual_biases.cumsum(0, dtype=torch.float32)

    def lay_out(self, embedded: Tensor, grid_thw: Sequence[GridThw]) -> VisionState:
        """The state before the first layer of embedded patches [num_patches, embed_dim], in the processors' order.

        embedded is given away: the layers may add to it in place.
        The attention's tiles are as large for every batch, so that all can go through the same recorded layers.
        Raises: ValueError if the grids do not describe num_patches patches in whole merge blocks.
        """
        check_grids(embedded.shape[0], grid_thw, self.config.spatial_merge_size)
        config = self.config
        device = embedded.device
        # First, so that other kernels lie between it and the norms, which read it without a wait as they do weights.
        shifts = self.shifts()
        positions = patch_positions(grid_thw, config.spatial_merge_size)
        windows = restore = None
        if config.window_cells is not None:
            order, lengths = window_layout(grid_thw, config.spatial_merge_size, config.window_cells)
            unit = config.spatial_merge_size**2
            positions = positions.reshape(-1, unit, 2)[order].reshape(-1, 2)
            embedded = embedded.view(-1, unit * config.embed_dim)[to_device(order, device)].view(-1, config.embed_dim)
            windows = pack_segments(lengths, device, tile_for(config.window_cells**2 * unit))
            restore = to_device(np.argsort(order), device)
        cos, sin = turned_by(positions, self.inverse_frequency)
        frames = pack_segments(frame_lengths(grid_thw), device, LONG_TILE)
        return VisionState(embedded, shifts, cos, sin, frames, windows, restore)

    def run_layers(self, state: VisionState, first: int, last: int) -> VisionState:
        """Run the layers [first, last) on a state, in place; returns the same state.

        Raises: ValueError if first is not the state's next layer or last is past the end.
        """
        if first != state.next_layer or not first <= last <= self.num_layers:
            raise ValueError(f"layers [{first}, {last}): the next is {state.next_layer} of {self.num_layers}")
        for index in range(first, last):
            segments = state.frames if self.config.sees_frames(index) else cast(Segments, state.windows)
            shifts = state.shifts[2 * index : 2 * index + 2]
            self.blocks[index](state.x, state.cos, state.sin, segments, shifts)
        state.next_layer = last
        return state

    def finish(self, state: VisionState) -> Tensor:
        """Merge the patches of a state that has been through all layers into rows, in the order of the input."""
        if state.next_layer != self.num_layers:
            raise ValueError(f"only {state.next_layer} of {self.num_layers} layers have run")
        rows: Tensor = self.merger(state.x, state.shifts[-1])
        return rows if state.restore is None else rows[state.restore]

    def targets(self) -> Iterator[tuple[str, Target]]:
        """Where each tensor of a checkpoint goes, by its flat name."""
        config = self.config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        shape = (config.embed_dim, config.in_channels, *kernel)  # stored as a convolution with stride = kernel
        yield "visual.patch_embed.proj.weight", Target(self.patch_embed, shape)
        for index, block in enumerate(self.blocks):
            biases = self.residual_biases[1 + 2 * index : 3 + 2 * index]
            yield from cast(VisionBlock, block).targets(f"visual.blocks.{index}.", biases)
        yield from self.merger.targets("visual.merger.")

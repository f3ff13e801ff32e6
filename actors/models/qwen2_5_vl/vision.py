"""The vision tower of Qwen2.5-VL: pre-RMSNorm blocks with a gated MLP, most layers attending within windows."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.layers import Linear, Norm, Target, whole
from vlmrt.actors.models.vision_tower import NORM_EPS, ResidualLinear, VisionAttention, VisionTower, shifted_norm
from vlmrt.kernels.segment_rows import SegmentRows
from vlmrt.kernels.silu_and_mul import silu_and_mul
from vlmrt.kernels.vision_attention import Segments

# cuBLAS takes its slow kernels for rows that are no multiple of 16 bytes, as those of the published 3,420 columns are.
ROW_ELEMENTS = 8


class Qwen25VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.norm1 = Norm(config.embed_dim, NORM_EPS, False, dtype, device)
        self.norm2 = Norm(config.embed_dim, NORM_EPS, False, dtype, device)
        self.attn = VisionAttention(config, dtype, device)
        self.width = config.intermediate_size
        padded = -(-self.width // ROW_ELEMENTS) * ROW_ELEMENTS
        self.gate_up_proj = Linear(config.embed_dim, 2 * padded, True, dtype, device)
        self.down_proj = ResidualLinear(padded, config.embed_dim, dtype, device)
        self.gate, self.up = (slice(first, first + self.width) for first in (0, padded))
        if padded != self.width:  # silu(0) * 0 = 0, times a column of 0
            for parameter in (*self.gate_up_proj.parameters(), self.down_proj.weight):
                parameter.zero_()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | SegmentRows, shifts: Tensor) -> None:
        self.attn(shifted_norm(x, shifts[0], self.norm1), cos, sin, segments, x)
        self.mlp(shifted_norm(x, shifts[1], self.norm2), x)

    def mlp(self, x: Tensor, residual: Tensor) -> None:
        self.down_proj.add_to(residual, silu_and_mul(self.gate_up_proj(x)))

    def targets(self, prefix: str, biases: Tensor) -> Iterator[tuple[str, Target]]:
        yield from self.norm1.targets(f"{prefix}norm1.")
        yield from self.norm2.targets(f"{prefix}norm2.")
        yield from self.attn.targets(f"{prefix}attn.", biases[0])
        for name, rows in (("gate_proj", self.gate), ("up_proj", self.up)):
            for kind, into in self.gate_up_proj.named_parameters():
                yield f"{prefix}mlp.{name}.{kind}", whole(into[rows])
        yield f"{prefix}mlp.down_proj.weight", whole(self.down_proj.weight[:, : self.width])
        yield f"{prefix}mlp.down_proj.bias", whole(biases[1])


def vision_tower(config: VisionConfig, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Qwen2.5-VL's tower with uninitialised weights."""
    return VisionTower(config, Qwen25VisionBlock, dtype, device)

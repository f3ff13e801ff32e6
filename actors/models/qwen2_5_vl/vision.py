"""The vision tower of Qwen2.5-VL: pre-RMSNorm blocks with a gated MLP, most layers attending within windows."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.layers import Linear, Norm, Target
from vlmrt.actors.models.vision_tower import NORM_EPS, VisionAttention, VisionTower, add_norm
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
        self.down_proj = Linear(padded, config.embed_dim, True, dtype, device)
        self.gate, self.up = (slice(first, first + self.width) for first in (0, padded))
        if padded != self.width:  # silu(0) * 0 = 0, times a column of 0
            for parameter in (*self.gate_up_proj.parameters(), self.down_proj.weight):
                parameter.zero_()

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        x, residual = add_norm(x, residual, self.norm1)
        x, residual = add_norm(self.attn(x, cos, sin, segments), residual, self.norm2)
        return self.mlp(x), residual

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))  # type: ignore[no-any-return]

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.norm1.targets(f"{prefix}norm1.")
        yield from self.norm2.targets(f"{prefix}norm2.")
        yield from self.attn.targets(f"{prefix}attn.")
        for name, rows in (("gate_proj", self.gate), ("up_proj", self.up)):
            for kind, into in self.gate_up_proj.named_parameters():
                yield f"{prefix}mlp.{name}.{kind}", _whole(into[rows])
        for kind, into in self.down_proj.named_parameters():
            yield f"{prefix}mlp.down_proj.{kind}", _whole(into[:, : self.width] if into.dim() == 2 else into)


def _whole(into: Tensor) -> Target:
    return Target(into, tuple(into.shape))


def vision_tower(config: VisionConfig, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Qwen2.5-VL's tower with uninitialised weights."""
    return VisionTower(config, Qwen25VisionBlock, dtype, device)

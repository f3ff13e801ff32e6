"""The vision tower of Qwen2.5-VL: pre-RMSNorm blocks with a gated MLP, most layers attending within windows."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.layers import Linear, MergedColumnLinear, Norm, Target, TensorParallel
from vlmrt.actors.models.vision_tower import NORM_EPS, Segments, VisionAttention, VisionTower
from vlmrt.kernels.rms_norm import add_rms_norm, rms_norm
from vlmrt.kernels.silu_and_mul import silu_and_mul


class Qwen25VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.norm1 = Norm(config.embed_dim, NORM_EPS, False, dtype, device)
        self.norm2 = Norm(config.embed_dim, NORM_EPS, False, dtype, device)
        self.attn = VisionAttention(config, dtype, device)
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedColumnLinear(config.embed_dim, parts, True, TensorParallel(), dtype, device)
        self.down_proj = Linear(config.intermediate_size, config.embed_dim, True, dtype, device)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        attended = self.attn(rms_norm(hidden, self.norm1.weight, NORM_EPS), cos, sin, segments)
        normed, hidden = add_rms_norm(attended, hidden, self.norm2.weight, NORM_EPS)
        return hidden + self.down_proj(silu_and_mul(self.gate_up_proj(normed)))  # type: ignore[no-any-return]

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.norm1.targets(f"{prefix}norm1.")
        yield from self.norm2.targets(f"{prefix}norm2.")
        yield from self.attn.targets(f"{prefix}attn.")
        yield from self.gate_up_proj.targets(f"{prefix}mlp.")
        yield from self.down_proj.targets(f"{prefix}mlp.down_proj.")


def vision_tower(config: VisionConfig, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Qwen2.5-VL's tower with uninitialised weights."""
    return VisionTower(config, Qwen25VisionBlock, dtype, device)

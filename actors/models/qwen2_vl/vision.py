"""The vision tower of Qwen2-VL: pre-LayerNorm blocks with a plain MLP, every layer attending to the whole frame."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.layers import Linear, Norm, Target, whole
from vlmrt.actors.models.vision_tower import NORM_EPS, ResidualLinear, VisionAttention, VisionTower, shifted_norm
from vlmrt.kernels.gelu_linear import quick_gelu_linear
from vlmrt.kernels.segment_rows import SegmentRows
from vlmrt.kernels.vision_attention import Segments


class Qwen2VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.quick_gelu = config.hidden_act == "quick_gelu"
        self.norm1 = Norm(config.embed_dim, NORM_EPS, True, dtype, device)
        self.norm2 = Norm(config.embed_dim, NORM_EPS, True, dtype, device)
        self.attn = VisionAttention(config, dtype, device)
        self.fc1 = Linear(config.embed_dim, config.intermediate_size, True, dtype, device)
        self.fc2 = ResidualLinear(config.intermediate_size, config.embed_dim, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | SegmentRows, shifts: Tensor) -> None:
        self.attn(shifted_norm(x, shifts[0], self.norm1), cos, sin, segments, x)
        self.mlp(shifted_norm(x, shifts[1], self.norm2), x)

    def mlp(self, x: Tensor, residual: Tensor) -> None:
        wide = quick_gelu_linear(x, self.fc1.weight, self.fc1.bias) if self.quick_gelu else F.gelu(self.fc1(x))
        self.fc2.add_to(residual, wide)

    def targets(self, prefix: str, biases: Tensor) -> Iterator[tuple[str, Target]]:
        yield from self.norm1.targets(f"{prefix}norm1.")
        yield from self.norm2.targets(f"{prefix}norm2.")
        yield from self.attn.targets(f"{prefix}attn.", biases[0])
        yield from self.fc1.targets(f"{prefix}mlp.fc1.")
        yield f"{prefix}mlp.fc2.weight", whole(self.fc2.weight)
        yield f"{prefix}mlp.fc2.bias", whole(biases[1])


def vision_tower(config: VisionConfig, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Qwen2-VL's tower with uninitialised weights."""
    return VisionTower(config, Qwen2VisionBlock, dtype, device)

"""Qwen2-VL at toy size for training: packed sequences, no padding, parameters under their public names.

The published layout is `visual.*` for the vision tower and `model.*` for the language model, whose head is tied to the
embedding; a state dict of `Network` is therefore a checkpoint. `forward` runs a whole batch as one packed sequence of
patches and one of tokens, cut by cumulative lengths, so that no image and no chat is padded to another's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrt.tools.demo.processing import IMAGE_MEAN, IMAGE_STD, MERGE_SIZE, PATCH_SIZE
from vlmrt.tools.demo.tokenizer import MAX_POSITIONS


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; head_dim is 32 in both halves, since some CPU attention kernels want a multiple of 32."""

    vocab_size: int
    depth: int = 6
    embed_dim: int = 192
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = (
        500.0  # at 10000 a column's step turns the width part of a head by 0.003 rad: left looks like right
    )
    mrope_section: tuple[int, int, int] = (2, 4, 10)

    @property
    def num_heads(self) -> int:
        """Query heads of the language model."""
        return self.hidden_size // self.head_dim


@dataclass(frozen=True)
class Lengths:
    """Where the sequences of a packed batch end."""

    cu_seqlens: Tensor  # int32 [num_sequences + 1]
    longest: int


def _attend_each(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, causal: bool) -> Tensor:
    """Attention within each sequence, one after the other: [T, heads, head_dim]. For CPUs and as the reference."""
    rows = []
    for a, b in itertools.pairwise(lengths.cu_seqlens.tolist()):
        q, k, v = (x[a:b].transpose(0, 1) for x in (query, key, value))
        rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    return torch.cat(rows, dim=1).transpose(0, 1)


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, causal: bool) -> Tensor:
    """The same in one kernel, for CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    cu, longest = lengths.cu_seqlens, lengths.longest
    attend: Callable[..., Any] = varlen_attn
    out: Tensor = attend(query, key, value, cu, cu, longest, longest, window_size=(-1, 0) if causal else (-1, -1))
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, causal: bool) -> Tensor:
    """Attention within each sequence of a packed batch: [T, heads, head_dim] each -> the same."""
    function = _attend_packed if query.is_cuda else _attend_each
    return function(query, key, value, lengths, causal)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class VisionAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Lengths) -> Tensor:
        query, key, value = self.qkv(x).view(len(x), 3, -1, self.head_dim).unbind(1)
        out = attend(_rotate(query, cos, sin), _rotate(key, cos, sin), value, lengths, causal=False)
        projected: Tensor = self.proj(out.reshape(len(x), -1))
        return projected


class VisionMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * 4)
        self.fc2 = nn.Linear(dim * 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class VisionBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VisionAttention(dim, head_dim)
        self.mlp = VisionMlp(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Lengths) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (2, PATCH_SIZE, PATCH_SIZE), stride=(2, PATCH_SIZE, PATCH_SIZE), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        merged = dim * MERGE_SIZE**2
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.ln_q(x)
        out: Tensor = self.mlp(normed.view(-1, x.shape[-1] * MERGE_SIZE**2))
        return out


class Vision(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.patch_embed = PatchEmbed(shape.embed_dim)
        self.blocks = nn.ModuleList(VisionBlock(shape.embed_dim, shape.head_dim) for _ in range(shape.depth))
        self.merger = PatchMerger(shape.embed_dim, shape.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor, lengths: Lengths) -> Tensor:
        """Normalised patches [N, 1176] at rows and columns [N, 2] -> one row a token [N / 4, hidden_size]."""
        x = self.patch_embed(patches)
        quarter = self.head_dim // 2
        powers = torch.arange(0, quarter, 2, device=x.device, dtype=torch.float32) / quarter
        angles = (positions[:, :, None].float() * 10000.0**-powers).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        out: Tensor = self.merger(x)
        return out


class RmsNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight).to(x.dtype)


class TextAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim, self.num_groups = shape.head_dim, shape.num_heads // shape.num_kv_heads
        dim, kv_dim = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, kv_dim)
        self.v_proj = nn.Linear(dim, kv_dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Lengths) -> Tensor:
        query, key, value = (
            proj(x).view(len(x), -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = (y.repeat_interleave(self.num_groups, dim=1) for y in (_rotate(key, cos, sin), value))
        out = attend(_rotate(query, cos, sin), key, value, lengths, causal=True)
        projected: Tensor = self.o_proj(out.reshape(len(x), -1))
        return projected


class TextMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class TextLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size)
        self.self_attn = TextAttention(shape)
        self.mlp = TextMlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Lengths) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Text(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden_size)

    def forward(self, embeds: Tensor, positions: Tensor, lengths: Lengths) -> Tensor:
        """Embeddings [T, hidden_size] at M-RoPE positions [3, T] -> hidden states of the same shape."""
        head_dim = self.shape.head_dim
        powers = torch.arange(0, head_dim, 2, device=embeds.device, dtype=torch.float32) / head_dim
        axis = torch.repeat_interleave(
            torch.arange(3, device=embeds.device), torch.tensor(self.shape.mrope_section, device=embeds.device)
        )
        angles = positions.float()[axis].T * self.shape.rope_theta**-powers
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        for layer in self.layers:
            embeds = layer(embeds, cos, sin, lengths)
        out: Tensor = self.norm(embeds)
        return out


class Network(nn.Module):
    """The whole model; `state_dict` has the published names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.visual = Vision(shape)
        self.model = Text(shape)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1) * 255, persistent=False)

    def initialise(self) -> None:
        """Normal weights scaled by fan-in; matrices that write into the residual stream start smaller."""
        for name, weight in self.named_parameters():
            if name == "model.embed_tokens.weight":
                nn.init.normal_(weight, 0.0, 0.02 * 16**0.5)
            elif weight.ndim >= 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight"))
                nn.init.normal_(weight, 0.0, weight[0].numel() ** -0.5 * (0.35 if writes else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def normalised(self, frames: Tensor) -> Tensor:
        """uint8 patches of two frames [N, 2, 588] -> [N, 1176] as the vision tower takes them."""
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.std, Tensor)
        wide = frames.view(len(frames), 2, 3, PATCH_SIZE, PATCH_SIZE).transpose(1, 2)
        return ((wide - self.mean[..., None]) / self.std[..., None]).flatten(1)

    def forward(
        self, ids: Tensor, positions: Tensor, lengths: Lengths, is_vision: Tensor, rows: Tensor | None
    ) -> Tensor:
        """Token ids [T], M-RoPE positions [3, T], where vision rows go [T], those rows -> hidden [T, hidden_size]."""
        embeds = self.model.embed_tokens(ids)
        if rows is not None:
            embeds = embeds.masked_scatter(is_vision[:, None], rows.to(embeds.dtype))
        out: Tensor = self.model(embeds, positions, lengths)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, hidden_size] -> scores [T, vocab_size], through the tied embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def config(shape: Shape, token_ids: dict[str, int], transformers_version: str) -> dict[str, Any]:
    """The config.json of a network of this shape."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "bfloat16",
        "transformers_version": transformers_version,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_token_id": token_ids["<|vision_pad|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": shape.depth,
            "embed_dim": shape.embed_dim,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.embed_dim // shape.head_dim,
            "mlp_ratio": 4,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": 2,
        },
    }

"""The language model of Qwen2-VL and Qwen2.5-VL: Qwen2 with M-RoPE."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vlmrt.actors.models.config import TextConfig
from vlmrt.actors.models.layers import (
    MergedColumnLinear,
    Norm,
    RowLinear,
    Target,
    TensorParallel,
    VocabParallelEmbedding,
)
from vlmrt.kernels.linear import gated_linear
from vlmrt.kernels.paged_attention import PagedBatch, paged_attention
from vlmrt.kernels.rms_norm import add_rms_norm, rms_norm
from vlmrt.kernels.rope_and_cache import rope_and_cache
from vlmrt.kernels.rotary import mrope_tables


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, with biased q, k and v."""

    def __init__(
        self, config: TextConfig, layer: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.num_heads = config.num_heads // tp.size
        self.num_kv_heads = config.num_kv_heads // tp.size
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.layer_window(layer)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedColumnLinear(config.hidden_size, parts, True, tp, dtype, device)
        self.o_proj = RowLinear(q_size, config.hidden_size, tp, dtype, device)

    def attend(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: PagedBatch,
    ) -> Tensor:
        """What lies between the two projections: [T, (Hq + 2 Hkv) * D] -> [T, Hq * D]; bias is what qkv still lacks."""
        q = rope_and_cache(qkv, bias, cos, sin, *kv, batch.slot_mapping, self.num_heads)
        return paged_attention(q, *kv, batch, self.scale, self.sliding_window).reshape(qkv.shape[0], -1)


class DecoderLayer(nn.Module):
    def __init__(
        self, config: TextConfig, layer: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, False, dtype, device)
        self.self_attn = Attention(config, layer, tp, dtype, device)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, False, dtype, device)
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedColumnLinear(config.hidden_size, parts, False, tp, dtype, device)
        self.down_proj = RowLinear(config.intermediate_size, config.hidden_size, tp, dtype, device)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.input_layernorm.targets(f"{prefix}input_layernorm.")
        yield from self.self_attn.qkv_proj.targets(f"{prefix}self_attn.")
        yield from self.self_attn.o_proj.targets(f"{prefix}self_attn.o_proj.")
        yield from self.post_attention_layernorm.targets(f"{prefix}post_attention_layernorm.")
        yield from self.gate_up_proj.targets(f"{prefix}mlp.")
        yield from self.down_proj.targets(f"{prefix}mlp.down_proj.")


class LanguageModel(nn.Module):
    """One tensor-parallel rank of the language model.

    T: tokens of a step, R: rows to sample, H: hidden size. Source: arXiv:2409.12191.
    """

    def __init__(self, config: TextConfig, tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, dtype, device)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, layer, tp, dtype, device) for layer in range(config.num_layers)]
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, False, dtype, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, dtype, device)
        )
        pair = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        self.inverse_frequency = (1.0 / config.rope_theta ** (pair / config.head_dim)).to(device)
        components = torch.arange(3).repeat_interleave(torch.tensor(config.mrope_section))
        self.component_of_pair = components.to(device)  # 0, 1, 2: the pair turns with time, height, width

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings: int64 [T] -> [T, H]."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of each token's angles for rope_and_cache: int64 [3, T] -> cos, sin float32 [T, head_dim]."""
        return mrope_tables(positions, self.inverse_frequency, self.component_of_pair)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, kv: Sequence[tuple[Tensor, Tensor]], batch: PagedBatch
    ) -> Tensor:
        """Run all layers over a step's tokens, writing their keys and values to the cache.

        Shapes: hidden [T, H], cos and sin from rotary, kv per layer (k, v) caches [num_blocks, block_size, Hkv / tp,
        head_dim] -> [T, H] after the final norm.
        """
        residual = hidden
        x = rms_norm(hidden, self._input_norm(0).weight, self.config.rms_norm_eps)
        for index, (layer, cache) in enumerate(zip(self.layers, kv, strict=True)):
            assert isinstance(layer, DecoderLayer)
            attention = layer.self_attn
            x = attention.o_proj(attention.attend(*attention.qkv_proj.product(x), cos, sin, cache, batch))
            norm = layer.post_attention_layernorm
            x, residual = add_rms_norm(x, residual, norm.weight, norm.eps)
            x = layer.down_proj(gated_linear(x, layer.gate_up_proj.weight))
            norm = self._input_norm(index + 1)
            x, residual = add_rms_norm(x, residual, norm.weight, norm.eps)
        return x

    def _input_norm(self, index: int) -> Norm:
        """The norm before a layer; the final one after the last."""
        if index == len(self.layers):
            return self.norm
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer.input_layernorm

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of chosen rows after the final norm: [R, H] -> [R, vocab_size], gathered over ranks."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.logits(hidden)

    def targets(self) -> Iterator[tuple[str, Target]]:
        """Where each tensor of a checkpoint goes, by its flat name."""
        yield from self.embed_tokens.targets("model.embed_tokens.")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.targets(f"model.layers.{index}.")
        yield from self.norm.targets("model.norm.")
        if self.lm_head is not None:
            yield from self.lm_head.targets("lm_head.")

"""Shapes of the public Qwen-VL checkpoints, and of small ones for tests, as the JSON of their files."""

import copy
from typing import Any, NamedTuple

# Ids that the public vocabulary gives the special tokens: 151,643 byte-pair tokens come first.
PUBLIC_BASE_TOKENS = 151_643
TEST_VOCAB_SIZE = 1024

CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOOL_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
ADDED_TOKENS = {"qwen2_vl": CHAT_TOKENS, "qwen2_5_vl": CHAT_TOKENS + TOOL_TOKENS}

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class Preset(NamedTuple):
    """One shape and how its random weights are spread."""

    config: dict[str, Any]  # config.json with ids of the public vocabulary
    std: float
    dtype: str
    base_tokens: int  # byte-pair tokens before the special ones

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def _qwen2_vl(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int = 151_936,
    tie: bool = False,
    mrope: tuple[int, int, int] = (16, 24, 24),
    vision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    tower = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(mrope)},
        "sliding_window": 32768,
        "tie_word_embeddings": tie,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": tower | (vision or {}),
        "vocab_size": vocab,
    }


def _qwen2_5_vl(*, vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    tower = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": text["hidden"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
        "model_type": "qwen2_5_vl",
    }
    config = _qwen2_vl(**text)
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["model_type"] = "qwen2_5_vl"
    config["max_position_embeddings"] = 128_000
    config["vision_config"] = tower | (vision or {})
    return config


def _public(config: dict[str, Any]) -> Preset:
    return Preset(config, 0.02, "bfloat16", PUBLIC_BASE_TOKENS)


def _tiny(config: dict[str, Any]) -> Preset:
    """Tiny networks need wider weights: at 0.02 a tied one only repeats its last token."""
    return Preset(config, 0.12, "float32", PUBLIC_BASE_TOKENS)


def _test(config: dict[str, Any]) -> Preset:
    base_tokens = TEST_VOCAB_SIZE - len(ADDED_TOKENS[config["model_type"]])
    return Preset(config, 0.12, "float32", base_tokens)


_TINY_TEXT: dict[str, Any] = {
    "hidden": 128,
    "intermediate": 256,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "tie": True,
    "mrope": (4, 6, 6),
}
_TINY_VISION = {"depth": 2, "embed_dim": 64, "num_heads": 2}
_TINY_WINDOWED = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "fullatt_block_indexes": [1],
}
_72B: dict[str, Any] = {"hidden": 8192, "intermediate": 29568, "layers": 80, "heads": 64, "kv_heads": 8}
_32B: dict[str, Any] = {"hidden": 5120, "intermediate": 27648, "layers": 64, "heads": 40, "kv_heads": 8}
_7B: dict[str, Any] = {"hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4}
_3B: dict[str, Any] = {"hidden": 2048, "intermediate": 11008, "layers": 36, "heads": 16, "kv_heads": 2, "tie": True}
_2B: dict[str, Any] = {"hidden": 1536, "intermediate": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "tie": True}
_WIDE_VISION = {"intermediate_size": 3456}

PRESETS: dict[str, Preset] = {
    "test-qwen2-vl": _test(_qwen2_vl(**_TINY_TEXT, vocab=TEST_VOCAB_SIZE, vision=_TINY_VISION)),
    "test-qwen2.5-vl": _test(_qwen2_5_vl(**_TINY_TEXT, vocab=TEST_VOCAB_SIZE, vision=_TINY_WINDOWED)),
    "tiny-qwen2-vl": _tiny(_qwen2_vl(**_TINY_TEXT, vision=_TINY_VISION)),
    "tiny-qwen2.5-vl": _tiny(_qwen2_5_vl(**_TINY_TEXT, vision=_TINY_WINDOWED)),
    "qwen2-vl-2b": _public(_qwen2_vl(**_2B)),
    "qwen2-vl-7b": _public(_qwen2_vl(**_7B, vocab=152_064)),
    "qwen2-vl-72b": _public(_qwen2_vl(**_72B, vocab=152_064)),
    "qwen2.5-vl-3b": _public(_qwen2_5_vl(**_3B)),
    "qwen2.5-vl-7b": _public(_qwen2_5_vl(**_7B, vocab=152_064)),
    "qwen2.5-vl-32b": _public(_qwen2_5_vl(**_32B, vocab=152_064, vision=_WIDE_VISION)),
    "qwen2.5-vl-72b": _public(_qwen2_5_vl(**_72B, vocab=152_064, vision=_WIDE_VISION)),
}


def config_json(
    preset: Preset, dtype: str, *, tie: bool | None = None, layers: int | None = None, vision_depth: int | None = None
) -> dict[str, Any]:
    """config.json of a preset, in the flat layout of the public files."""
    config = copy.deepcopy(preset.config)
    ids = token_ids(preset)
    config |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "torch_dtype": dtype,
        "transformers_version": "4.57.1",  # without it, transformers 5 suspects local tokenizers of a known fault
    }
    if tie is not None:
        config["tie_word_embeddings"] = tie
    if layers is not None:
        config["num_hidden_layers"] = config["max_window_layers"] = layers
    if vision_depth is not None:
        tower = config["vision_config"]
        tower["depth"] = vision_depth
        if "fullatt_block_indexes" in tower:
            kept = [index for index in tower["fullatt_block_indexes"] if index < vision_depth]
            tower["fullatt_block_indexes"] = kept or [vision_depth - 1]
    return config


def token_ids(preset: Preset) -> dict[str, int]:
    """Ids of the added tokens."""
    return {token: preset.base_tokens + index for index, token in enumerate(ADDED_TOKENS[preset.model_type])}


def preprocessor_json(preset: Preset) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor_class(preset),
    }


def processor_class(preset: Preset) -> str:
    return "Qwen2VLProcessor" if preset.model_type == "qwen2_vl" else "Qwen2_5_VLProcessor"


def generation_json(preset: Preset) -> dict[str, Any]:
    """generation_config.json, with the public files' sampling defaults."""
    ids = token_ids(preset)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1}
    if preset.model_type == "qwen2_5_vl":
        sampling = {"do_sample": True, "temperature": 1e-06, "repetition_penalty": 1.05}
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "transformers_version": "4.57.1",
    } | sampling

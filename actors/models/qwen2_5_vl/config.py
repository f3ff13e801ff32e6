"""config.json of Qwen2.5-VL; its language model is Qwen2-VL's."""

from vlmrt.actors.models.config import TextConfig, VisionConfig
from vlmrt.actors.models.json_fields import JsonFields
from vlmrt.actors.models.qwen2_vl.config import check_vision_config, read_text_config

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

__all__ = ["ARCHITECTURE", "read_text_config", "read_vision_config"]


def read_vision_config(root: JsonFields, text: TextConfig) -> VisionConfig:
    """The vision_config section of Qwen2.5-VL."""
    vision = root.section("vision_config")
    if vision is None:
        raise root.error("vision_config", "is missing")
    depth = vision.integer("depth", default=32)
    config = VisionConfig(
        depth=depth,
        embed_dim=vision.integer("hidden_size", default=1280),
        num_heads=vision.integer("num_heads", default=16),
        intermediate_size=vision.integer("intermediate_size", default=3420),
        hidden_act=vision.choice("hidden_act", allowed=("silu",), default="silu"),
        in_channels=vision.integer("in_channels", "in_chans", default=3),
        patch_size=vision.integer("patch_size", default=14),
        temporal_patch_size=vision.integer("temporal_patch_size", default=2),
        spatial_merge_size=vision.integer("spatial_merge_size", default=2),
        out_hidden_size=vision.integer("out_hidden_size", default=text.hidden_size),
        norm="rms_norm",
        window_size=vision.integer("window_size", default=112),
        fullatt_block_indexes=vision.integers("fullatt_block_indexes", default=(7, 15, 23, 31)),
        tokens_per_second=vision.number("tokens_per_second", default=4.0),
    )
    check_vision_config(vision, config, text, "out_hidden_size")
    merged_patch = config.patch_size * config.spatial_merge_size
    if config.window_size is not None and config.window_size < merged_patch:
        raise vision.error("window_size", f"{config.window_size} is smaller than a merged patch, {merged_patch} pixels")
    return config

"""config.json of Qwen2-VL, in the spellings of its public and of newer files."""

from vlmrt.actors.models.config import TextConfig, VisionConfig
from vlmrt.actors.models.json_fields import JsonFields

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
ROPE_TYPES = ("mrope", "default")
DEFAULT_ROPE_THETA = 1_000_000.0
DEFAULT_MROPE_SECTION = (16, 24, 24)


def read_vision_config(root: JsonFields, text: TextConfig) -> VisionConfig:
    """The vision_config section of Qwen2-VL."""
    vision = root.section("vision_config")
    if vision is None:
        raise root.error("vision_config", "is missing")
    embed_dim = vision.integer("embed_dim", default=1280)
    config = VisionConfig(
        depth=vision.integer("depth", default=32),
        embed_dim=embed_dim,
        num_heads=vision.integer("num_heads", default=16),
        intermediate_size=int(embed_dim * vision.number("mlp_ratio", default=4.0)),
        hidden_act=vision.choice("hidden_act", allowed=("quick_gelu", "gelu"), default="quick_gelu"),
        in_channels=vision.integer("in_channels", "in_chans", default=3),
        patch_size=vision.integer("patch_size", default=14),
        temporal_patch_size=vision.integer("temporal_patch_size", default=2),
        spatial_merge_size=vision.integer("spatial_merge_size", default=2),
        out_hidden_size=vision.integer("hidden_size", default=text.hidden_size),
        norm="layer_norm",
    )
    check_vision_config(vision, config, text, "hidden_size")
    return config


def check_vision_config(vision: JsonFields, config: VisionConfig, text: TextConfig, out_field: str) -> None:
    """What both families ask of a tower: whole rotary pairs per head, rows as wide as the language model."""
    if config.embed_dim % config.num_heads or config.head_dim % 4:
        raise vision.error(
            "num_heads", f"{config.num_heads} does not divide a width of {config.embed_dim} into multiples of 4"
        )
    if config.out_hidden_size != text.hidden_size:
        raise vision.error(
            out_field, f"{config.out_hidden_size} differs from the language model's hidden_size {text.hidden_size}"
        )


def read_text_config(root: JsonFields) -> TextConfig:
    """The language model's fields, at the top of the file (public files) or under text_config (newer ones)."""
    text = root.section("text_config") or root
    num_layers = text.integer("num_hidden_layers")
    num_heads = text.integer("num_attention_heads")
    num_kv_heads = text.integer("num_key_value_heads", default=num_heads)
    hidden_size = text.integer("hidden_size")
    if hidden_size % num_heads:
        raise text.error("num_attention_heads", f"{num_heads} does not divide hidden_size {hidden_size}")
    if num_heads % num_kv_heads:
        raise text.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    head_dim = hidden_size // num_heads
    rope_theta, mrope_section = _read_rope(text, head_dim)
    sliding_window, first_sliding_layer = _read_sliding_window(text, num_layers)
    return TextConfig(
        vocab_size=text.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", default=1e-5),
        rope_theta=rope_theta,
        mrope_section=mrope_section,
        max_position_embeddings=text.integer("max_position_embeddings", default=32768),
        tie_word_embeddings=root.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        sliding_window=sliding_window,
        first_sliding_layer=first_sliding_layer,
        hidden_act=text.choice("hidden_act", allowed=("silu",), default="silu"),
    )


def _read_rope(text: JsonFields, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """rope_theta and mrope_section from rope_parameters (newer) or rope_scaling (public), checked to be unscaled."""
    rope = text.section("rope_parameters") or text.section("rope_scaling")
    theta = text.number("rope_theta", default=DEFAULT_ROPE_THETA)
    section = DEFAULT_MROPE_SECTION
    if rope is not None:
        for spelling in ("rope_type", "type"):
            rope.choice(spelling, allowed=ROPE_TYPES, default="mrope")
        factor = rope.number("factor", default=1.0)
        if factor != 1.0:
            raise rope.error("factor", f"{factor:g} is not supported (supported: 1)")
        theta = rope.number("rope_theta", default=theta)
        time, height, width = rope.integers("mrope_section", length=3, default=section)
        section = time, height, width
    if 2 * sum(section) != head_dim:
        where = rope or text
        raise where.error("mrope_section", f"{list(section)} does not sum to half the head size, {head_dim // 2}")
    return theta, section


def _read_sliding_window(text: JsonFields, num_layers: int) -> tuple[int | None, int]:
    """(window in tokens or None, first layer that has it)."""
    if not text.flag("use_sliding_window", False) or text.get("sliding_window")[1] is None:
        return None, num_layers
    window = text.integer("sliding_window")
    first = text.integer("max_window_layers", minimum=0, default=num_layers)
    name, kinds = text.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise text.error(name, f"{kinds!r} does not name one kind for each of {num_layers} layers")
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else num_layers
        if kinds != ["full_attention"] * first + ["sliding_attention"] * (num_layers - first):
            raise text.error(name, "is supported only as full_attention layers followed by sliding_attention layers")
    return (window, first) if first < num_layers else (None, num_layers)

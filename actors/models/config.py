"""What a checkpoint's JSON files say, as frozen Structs; no torch, no transformers."""

import msgspec


class CheckpointError(ValueError):
    """A checkpoint cannot be used; one line naming the file, the field, its value and the bound."""


class VisionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a vision tower."""

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    hidden_act: str
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int  # equals the hidden size of the language model
    norm: str  # "layer_norm" or "rms_norm"
    window_size: int | None = None  # pixels; None: every layer attends to the whole frame
    fullatt_block_indexes: tuple[int, ...] = ()  # layers that attend to the whole frame when window_size is set
    tokens_per_second: float | None = None

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels * temporal_patch_size * patch_size**2."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_cells(self) -> int | None:
        """Side of a window in merge blocks."""
        return None if self.window_size is None else self.window_size // self.patch_size // self.spatial_merge_size

    def sees_frames(self, layer: int) -> bool:
        """Whether a layer attends to the whole frame."""
        return self.window_size is None or layer in self.fullatt_block_indexes


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # rotary pairs that follow time, height and width; sums to head_dim / 2
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None  # tokens, the query's own included; None: no layer has a window
    first_sliding_layer: int  # the window applies from this layer on
    hidden_act: str

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, None where it sees all that came before."""
        return self.sliding_window if layer >= self.first_sliding_layer else None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A whole checkpoint: both networks, the ids that join them, and the dtype its weights are stored in."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str  # "float32", "bfloat16" or "float16"


class ImageProcessing(msgspec.Struct, frozen=True, kw_only=True):
    """How an image becomes patches."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float


class VideoProcessing(msgspec.Struct, frozen=True, kw_only=True):
    """How a clip's frames are chosen and sized; they become patches as an image does."""

    min_pixels: int  # of one frame
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    fps: float = 2.0  # frames to take from a second
    min_frames: int = 4
    max_frames: int = 768


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling fields of generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool | None = None

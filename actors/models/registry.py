"""The model families that are known, and the one way from a checkpoint's directory to its configuration.

Importing this needs neither torch nor transformers; family() imports the torch side of one family when called.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from vlmrt.actors.models.config import (
    CheckpointError,
    GenerationDefaults,
    ImageProcessing,
    ModelConfig,
    VideoProcessing,
)
from vlmrt.actors.models.json_fields import JsonFields
from vlmrt.actors.models.qwen2_5_vl import config as qwen2_5_vl_config
from vlmrt.actors.models.qwen2_vl import config as qwen2_vl_config

if TYPE_CHECKING:
    import torch

    from vlmrt.actors.models.checkpoint_files import WeightFiles
    from vlmrt.actors.models.layers import TensorParallel
    from vlmrt.actors.models.qwen2_vl.language import LanguageModel
    from vlmrt.actors.models.vision_tower import VisionTower

_CONFIGS: dict[str, Any] = {"qwen2_vl": qwen2_vl_config, "qwen2_5_vl": qwen2_5_vl_config}
_DTYPES = ("float32", "bfloat16", "float16")


class Family(Protocol):
    """The torch side of one model family."""

    def load_language(
        self,
        files: "WeightFiles",
        config: ModelConfig,
        tp: "TensorParallel",
        device: "torch.device",
        dtype: "torch.dtype",
        progress: Callable[[int, int], None] | None = None,
    ) -> "LanguageModel":
        """This rank's part of the language model. progress gets (bytes read, bytes to read)."""

    def load_vision(
        self,
        files: "WeightFiles",
        config: ModelConfig,
        device: "torch.device",
        dtype: "torch.dtype",
        progress: Callable[[int, int], None] | None = None,
    ) -> "VisionTower":
        """The whole vision tower."""


def family(model_type: str) -> Family:
    """The torch side of a family. Raises CheckpointError for a model_type that is not known."""
    if model_type not in _CONFIGS:
        raise CheckpointError(f"model_type {model_type!r} is not known (known: {', '.join(_CONFIGS)})")
    return cast(Family, importlib.import_module(f"vlmrt.actors.models.{model_type}.loading"))


def load_model_config(directory: Path) -> ModelConfig:
    """config.json as a ModelConfig.

    Raises: CheckpointError for an unknown architecture, a quantised checkpoint, a field out of bounds.
    """
    root = JsonFields.read(directory / "config.json")
    model_type = _model_type(root)
    quantization = root.section("quantization_config")
    if quantization is not None:
        _, method = quantization.get("quant_method")
        raise root.error("quantization_config", f"method {method!r} is not supported; use the unquantised checkpoint")
    read = _CONFIGS[model_type]
    text = read.read_text_config(root)
    text_fields = root.section("text_config") or root
    _, eos = root.get("eos_token_id")
    return ModelConfig(
        model_type=model_type,
        text=text,
        vision=read.read_vision_config(root, text),
        image_token_id=_token_id(root, "image_token_id", 151655, text.vocab_size),
        video_token_id=_token_id(root, "video_token_id", 151656, text.vocab_size),
        vision_start_token_id=_token_id(root, "vision_start_token_id", 151652, text.vocab_size),
        vision_end_token_id=_token_id(root, "vision_end_token_id", 151653, text.vocab_size),
        eos_token_ids=(root if eos is not None else text_fields).integers("eos_token_id", default=()),
        dtype=_dtype(root, text_fields),
    )


def _model_type(root: JsonFields) -> str:
    name, architectures = root.get("architectures")
    known = {read.ARCHITECTURE: model_type for model_type, read in _CONFIGS.items()}
    if architectures is None:
        return root.choice("model_type", allowed=tuple(_CONFIGS))
    named = architectures if isinstance(architectures, list) else [architectures]
    for architecture in named:
        if architecture in known:
            return known[architecture]
    raise root.error(name, f"{architectures!r} is not known (known: {', '.join(known)})")


def _token_id(root: JsonFields, name: str, default: int, vocab_size: int) -> int:
    token_id = root.integer(name, minimum=0, default=default)
    if token_id >= vocab_size:
        raise root.error(name, f"{token_id} is outside the vocabulary of {vocab_size}")
    return token_id


def _dtype(root: JsonFields, text: JsonFields) -> str:
    for fields in (root, text):
        if fields.get("dtype", "torch_dtype")[1] is not None:
            return fields.choice("dtype", "torch_dtype", allowed=_DTYPES)
    return "float32"


def load_image_processing(directory: Path) -> ImageProcessing:
    """preprocessor_config.json, in the min_pixels/max_pixels or the size.shortest_edge/longest_edge spelling."""
    return _image_processing(JsonFields.read(directory / "preprocessor_config.json"))


def load_video_processing(directory: Path) -> VideoProcessing:
    """video_preprocessor_config.json or, where there is none, preprocessor_config.json, as the reference reads them.

    Raises: CheckpointError if frames are to become patches in another way than images do.
    """
    file = directory / "video_preprocessor_config.json"
    if not file.exists():
        file = directory / "preprocessor_config.json"
    root = JsonFields.read(file)
    frames, images = _image_processing(root, 128 * 28 * 28, 768 * 28 * 28), load_image_processing(directory)
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor"):
        value, expected = getattr(frames, name), getattr(images, name)
        if value != expected:
            raise root.error(name, f"{value!r} differs from the images' {expected!r}, which is not supported")
    return VideoProcessing(
        min_pixels=frames.min_pixels,
        max_pixels=frames.max_pixels,
        patch_size=frames.patch_size,
        temporal_patch_size=frames.temporal_patch_size,
        merge_size=frames.merge_size,
        fps=root.number("fps", default=2.0),
        min_frames=root.integer("min_frames", default=4),
        max_frames=root.integer("max_frames", default=768),
    )


def _image_processing(root: JsonFields, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280) -> ImageProcessing:
    """min_pixels, max_pixels: where the file says nothing."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not root.flag(step, True):
            raise root.error(step, "false is not supported")
    if root.integer("resample", minimum=0, default=3) != 3:
        raise root.error("resample", f"{root.values['resample']} is not supported (supported: 3, bicubic)")
    size = root.section("size") or JsonFields(root.file, {}, "size.")
    min_pixels = root.integer("min_pixels", default=size.integer("shortest_edge", "min_pixels", default=min_pixels))
    max_pixels = root.integer("max_pixels", default=size.integer("longest_edge", "max_pixels", default=max_pixels))
    if max_pixels < min_pixels:
        raise root.error("max_pixels", f"{max_pixels} is below min_pixels {min_pixels}")
    image_std = root.three_numbers("image_std")
    if min(image_std) <= 0:
        raise root.error("image_std", f"{list(image_std)} is not above 0")
    return ImageProcessing(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=root.integer("patch_size"),
        temporal_patch_size=root.integer("temporal_patch_size"),
        merge_size=root.integer("merge_size"),
        image_mean=root.three_numbers("image_mean"),
        image_std=image_std,
        rescale_factor=root.number("rescale_factor", default=1 / 255),
    )


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """generation_config.json; all unset where the file is missing. do_sample false means temperature 0."""
    file = directory / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    root = JsonFields.read(file)

    def optional(name: str, minimum: float | None = None, maximum: float | None = None) -> float | None:
        return None if root.get(name)[1] is None else root.number(name, minimum=minimum, maximum=maximum)

    do_sample = None if root.get("do_sample")[1] is None else root.flag("do_sample", False)
    top_k = None if root.get("top_k")[1] is None else root.integer("top_k", minimum=0)
    return GenerationDefaults(
        temperature=0.0 if do_sample is False else optional("temperature", minimum=0.0),
        top_p=optional("top_p", maximum=1.0),
        top_k=top_k,
        repetition_penalty=optional("repetition_penalty"),
        eos_token_ids=root.integers("eos_token_id", default=()),
        do_sample=do_sample,
    )


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Check that tp ranks can share the language model; the vocabulary is padded, so any size of it divides.

    Raises: CheckpointError naming the first dimension that tp does not divide.
    """
    if tp < 1:
        raise CheckpointError(f"tensor parallel size {tp} is below 1")
    text = config.text
    for name, value in (
        ("num_attention_heads", text.num_heads),
        ("num_key_value_heads", text.num_kv_heads),
        ("intermediate_size", text.intermediate_size),
    ):
        if value % tp:
            raise CheckpointError(f"config.json: field {name}: {value} is not divisible by tensor parallel size {tp}")

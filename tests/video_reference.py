"""transformers' video processor as the judge.

It needs torchvision for one resize, one normalisation and the names of their options, and torchvision's wheels for
a GPU do not load beside a CPU's torch. What it calls there is torch's own (torchvision 0.28's resize of uint8 tensors
on a CPU is this call of interpolate, equal to the bit), so that stands in for it.
"""

from __future__ import annotations

import enum
import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


class InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def resize(videos: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool) -> Tensor:
    frames = videos.reshape(-1, *videos.shape[-3:])
    resized = F.interpolate(frames, size=tuple(size), mode=interpolation.value, antialias=antialias)
    return resized.reshape(*videos.shape[:-2], *size)


def normalize(videos: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.as_tensor(value, dtype=videos.dtype).view(-1, 1, 1) for value in (mean, std))
    normalised: Tensor = (videos - mean) / std
    return normalised


def _processor_class() -> Any:
    functional = ModuleType("torchvision.transforms.v2.functional")
    for name, value in (
        ("InterpolationMode", InterpolationMode),
        ("resize", resize),
        ("normalize", normalize),
        ("grayscale_to_rgb", lambda videos: videos),
    ):
        setattr(functional, name, value)
    package, transforms, v2 = map(ModuleType, ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"))
    for parent, name, child in (
        (package, "transforms", transforms),
        (transforms, "v2", v2),
        (v2, "functional", functional),
    ):
        setattr(parent, name, child)
    backends = importlib.import_module("transformers.image_processing_backends")
    utils = importlib.import_module("transformers.video_processing_utils")
    stand_in = {module.__name__: module for module in (package, transforms, v2, functional)}
    with mock.patch.dict(sys.modules, stand_in):
        module = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    for user in (backends, utils):
        user.tvF = functional  # type: ignore[attr-defined]
    backends.pil_torch_interpolation_mapping = {3: InterpolationMode.BICUBIC}  # type: ignore[attr-defined]
    return module.Qwen2VLVideoProcessor


def video_processor(**options: Any) -> Any:
    """A Qwen2VLVideoProcessor, which Qwen2.5-VL uses too.

    Where its quotient of frames is rounded down, its arange ends with an index one past the clip, at which it fails.
    """
    reference = _processor_class()

    class Qwen2VLVideoProcessor(reference):  # type: ignore[misc, valid-type]
        def sample_frames(self, metadata: Any, **choice: Any) -> Tensor:
            indices: Tensor = super().sample_frames(metadata, **choice)
            return indices[indices < metadata.total_num_frames]

    return Qwen2VLVideoProcessor(**{"cap_pixels_per_frame": False, "do_sample_frames": True, **options})

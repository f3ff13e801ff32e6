"""Pixels equal the reference's to the bit, and every broken file is an ordinary error."""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import SizeDict, load_image

from tests.actors.edge.encoded_images import all_images, save
from tests.pictures import noise
from vlmrt.actors.media.image import Pixels, decode_image
from vlmrt.actors.models.config import ImageProcessing
from vlmrt.actors.models.qwen2_vl.processing import resized_size
from vlmrt.runtime.errors import RequestError

IMAGES = all_images()
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 64
PROCESSING = ImageProcessing(
    min_pixels=MIN_PIXELS,
    max_pixels=MAX_PIXELS,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    rescale_factor=1 / 255,
)
LIMIT = 10_000_000


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


def decode(data: bytes, max_pixels: int = LIMIT) -> Pixels:
    with Image.open(io.BytesIO(data)) as opened:
        width, height = load_image(opened).size
    return decode_image(data, (width, height), resized_size(width, height, PROCESSING), max_pixels)


def reference_pixels(processor: Qwen2VLImageProcessorPil, image: Image.Image) -> Pixels:
    planes = np.asarray(image).transpose(2, 0, 1)
    resized = processor.resize(
        planes, SizeDict(shortest_edge=MIN_PIXELS, longest_edge=MAX_PIXELS), Image.Resampling.BICUBIC, factor=28
    )
    pixels: Pixels = resized.transpose(1, 2, 0)
    return pixels


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_the_reference_processors(name: str, processor: Qwen2VLImageProcessorPil) -> None:
    data = IMAGES[name]
    with Image.open(io.BytesIO(data)) as opened:
        expected = reference_pixels(processor, load_image(opened))
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, *expected.shape)
    np.testing.assert_array_equal(pixels[0], expected)


def test_another_size_than_the_headers_is_refused() -> None:
    data = save(noise(64, 48, 0), "PNG")
    with pytest.raises(RequestError) as refused:
        decode_image(data, (64, 50), (56, 56), LIMIT)
    assert (refused.value.status, refused.value.code) == (400, "image_mismatch")


def test_a_turned_size_needs_an_orientation_that_turns() -> None:
    data = save(noise(64, 48, 0), "PNG")
    with pytest.raises(RequestError) as refused:
        decode_image(data, (48, 64), (56, 56), LIMIT)
    assert refused.value.code == "image_mismatch"


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = save(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(RequestError) as refused:
        decode_image(data, (3000, 3000), (56, 56), 1_000_000)
    assert refused.value.code == "image_too_large"


def test_other_formats_are_refused_whatever_they_are_called() -> None:
    for kind in ("PPM", "TGA", "ICO", "PCX"):
        with pytest.raises(RequestError) as refused:
            decode_image(save(noise(32, 32, 0), kind), (32, 32), (56, 56), LIMIT)
        assert refused.value.code == "invalid_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_broken_files_are_errors_that_quote_nothing(kind: str) -> None:
    whole = save(noise(80, 60, 1).convert("P") if kind == "GIF" else noise(80, 60, 1), kind)
    rng = random.Random(kind)
    for trial in range(60):
        data = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(rng.randrange(1, 8)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        outcome = outcome_of(bytes(data))
        if isinstance(outcome, RequestError):
            assert outcome.status == 400
            assert not re.search(r"\b0x[0-9a-f]{6}|/|object at", outcome.message)
        else:
            assert outcome.shape == (1, 56, 84, 3)


def outcome_of(data: bytes) -> Pixels | RequestError:
    try:
        return decode_image(data, (80, 60), (84, 56), LIMIT)
    except RequestError as error:
        return error

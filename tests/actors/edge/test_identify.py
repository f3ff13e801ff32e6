"""Sizes out of headers equal those of decoded pictures; keys bind the bytes and every option."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.actors.edge.encoded_images import all_images, save
from tests.pictures import noise
from vlmrt.actors.edge.chat_request import PixelLimits
from vlmrt.actors.edge.identify import LOW_DETAIL_PIXELS, MAX_CACHED_OPTIONS, IdentifiedImage, ImageIdentifier
from vlmrt.actors.edge.image_header import NotAnImage, read_image_header
from vlmrt.actors.models.config import ImageProcessing
from vlmrt.runtime.errors import RequestError

IMAGES = all_images()
PROCESSING = ImageProcessing(
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 1280,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    rescale_factor=1 / 255,
)
MAX_PIXELS = 10_000_000


@pytest.mark.parametrize("name", IMAGES)
def test_the_headers_size_is_that_of_the_upright_picture(name: str) -> None:
    with Image.open(io.BytesIO(IMAGES[name])) as image:
        expected = ImageOps.exif_transpose(image).size
    header = read_image_header(IMAGES[name])
    assert (header.width, header.height) == expected


@pytest.mark.parametrize("name", ["JPEG RGB 27x31", "PNG RGB 27x31", "WEBP RGB 27x31", "GIF P 27x31", "TIFF big"])
def test_a_cut_or_damaged_header_is_refused_or_read_but_never_crashes(name: str) -> None:
    data = IMAGES[name]
    rng = random.Random(name)
    for length in range(min(len(data), 400)):
        _read(data[:length])
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        _read(bytes(damaged))


def _read(data: bytes) -> None:
    with contextlib.suppress(NotAnImage):
        read_image_header(data)


@given(
    st.binary(max_size=300), st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8X", b"GIF89a"])
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_behind_a_known_start_are_no_crash(data: bytes, start: bytes) -> None:
    _read(start + data)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\0" * 100, save(noise(30, 30, 0), "PPM"), save(noise(32, 32, 0), "ICO"), b"<svg/>", b"BM"]
)
def test_other_bytes_are_no_image(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        read_image_header(data)


def test_a_header_of_many_segments_ends() -> None:
    with pytest.raises(NotAnImage):
        read_image_header(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1_000_000)
    with pytest.raises(NotAnImage):
        read_image_header(b"GIF89a\x01\x00\x01\x00\x00\x00\x00" + b"\x21\xfe\x00" * 1_000_000)


@pytest.fixture
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def identify(
    executor: ThreadPoolExecutor,
    data: bytes,
    processing: ImageProcessing = PROCESSING,
    identity: str = "model@1",
    limits: PixelLimits | None = None,
    cache_salt: str = "",
) -> IdentifiedImage:
    identifier = ImageIdentifier(processing, identity, MAX_PIXELS)
    return await identifier.identify(
        data, limits=limits or PixelLimits(), cache_salt=cache_salt, param="messages[0]", executor=executor
    )


async def test_a_key_binds_the_bytes_and_every_option(executor: ThreadPoolExecutor) -> None:
    data = save(noise(800, 600, 0), "PNG")
    other = save(noise(800, 600, 1), "PNG")
    replace = msgspec.structs.replace
    variants = [
        await identify(executor, data),
        await identify(executor, other),
        await identify(executor, data, identity="model@2"),
        await identify(executor, data, cache_salt="a"),
        await identify(executor, data, limits=PixelLimits(low_detail=True)),
        await identify(executor, data, limits=PixelLimits(max_pixels=28 * 28 * 99)),
        await identify(executor, data, limits=PixelLimits(min_pixels=28 * 28 * 99)),
        await identify(executor, data, replace(PROCESSING, max_pixels=28 * 28 * 100)),
        await identify(executor, data, replace(PROCESSING, min_pixels=57 * 57)),
        await identify(executor, data, replace(PROCESSING, image_mean=(0.5, 0.5, 0.4))),
        await identify(executor, data, replace(PROCESSING, image_std=(0.5, 0.5, 0.4))),
    ]
    keys = [variant.mm_hash for variant in variants]
    assert len(set(keys)) == len(keys)
    assert all(len(key) >= 40 for key in keys)
    assert keys[0] == (await identify(executor, data)).mm_hash


async def test_low_detail_takes_fewer_tokens(executor: ThreadPoolExecutor) -> None:
    data = save(noise(900, 800, 0), "JPEG")
    high, low = await identify(executor, data), await identify(executor, data, limits=PixelLimits(low_detail=True))
    assert low.num_tokens < high.num_tokens
    assert low.target_size[0] * low.target_size[1] <= LOW_DETAIL_PIXELS
    assert low.size == high.size == (900, 800)


@pytest.mark.parametrize(
    ("limits", "low", "high"),
    [
        (PixelLimits(max_pixels=28 * 28 * 50), 1, 28 * 28 * 50),
        (PixelLimits(max_pixels=1), 28 * 28, 28 * 28),
        (PixelLimits(max_pixels=2**31 - 1), 1, PROCESSING.max_pixels),
        (PixelLimits(min_pixels=28 * 28 * 800), 28 * 28 * 800, PROCESSING.max_pixels),
        (PixelLimits(min_pixels=2**31 - 1), 28 * 28 * 1200, PROCESSING.max_pixels),
        (PixelLimits(min_pixels=28 * 28 * 10, max_pixels=28 * 28 * 10), 28 * 28 * 5, 28 * 28 * 10),
        (PixelLimits(max_pixels=28 * 28 * 50, low_detail=True), 1, 28 * 28 * 50),
        (PixelLimits(max_pixels=28 * 28 * 1000, low_detail=True), 1, LOW_DETAIL_PIXELS),
    ],
    ids=str,
)
async def test_a_client_may_limit_the_pixels_within_the_servers_own_limit(
    limits: PixelLimits, low: int, high: int, executor: ThreadPoolExecutor
) -> None:
    for size in ((300, 280), (1900, 1200), (60, 60), (290, 30)):
        width, height = (await identify(executor, save(noise(*size, 0), "PNG"), limits=limits)).target_size
        assert low <= width * height <= high


async def test_the_same_limits_in_other_words_are_the_same_picture(executor: ThreadPoolExecutor) -> None:
    data = save(noise(300, 200, 0), "PNG")
    own = await identify(executor, data)
    assert own == await identify(executor, data, limits=PixelLimits(PROCESSING.min_pixels, PROCESSING.max_pixels))
    assert own == await identify(executor, data, limits=PixelLimits(max_pixels=PROCESSING.max_pixels * 2))


async def test_many_limits_are_not_kept_for_ever(executor: ThreadPoolExecutor) -> None:
    identifier = ImageIdentifier(PROCESSING, "model@1", MAX_PIXELS)
    data = save(noise(300, 200, 0), "PNG")
    keys = set()
    for number in range(300):
        limits = PixelLimits(max_pixels=10_000 + number)
        found = await identifier.identify(data, limits=limits, cache_salt="", param="x", executor=executor)
        keys.add(found.mm_hash)
    assert len(keys) == 300
    assert len(identifier._options) <= MAX_CACHED_OPTIONS


@pytest.mark.parametrize(
    ("size", "code"),
    [((1, 201), "invalid_image_size"), ((201, 1), "invalid_image_size"), ((4000, 3000), "image_too_large")],
)
async def test_sizes_out_of_bounds_are_refused(size: tuple[int, int], code: str, executor: ThreadPoolExecutor) -> None:
    with pytest.raises(RequestError) as refused:
        await identify(executor, save(Image.new("L", size), "PNG"))
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, "messages[0]")


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (27, 27), (28, 28), (29, 29)])
async def test_small_and_long_pictures_are_identified(size: tuple[int, int], executor: ThreadPoolExecutor) -> None:
    image = await identify(executor, save(Image.new("L", size), "PNG"))
    assert image.num_tokens == image.grid_thw[1] * image.grid_thw[2] // 4 > 0
    assert image.target_size == (image.grid_thw[2] * 14, image.grid_thw[1] * 14)


async def test_a_zero_side_is_refused(executor: ThreadPoolExecutor) -> None:
    data = bytearray(save(noise(30, 30, 0), "PNG"))
    data[16:20] = bytes(4)
    with pytest.raises(RequestError) as refused:
        await identify(executor, bytes(data))
    assert refused.value.code == "invalid_image_size"


async def test_large_files_are_hashed_off_the_loop_to_the_same_key(executor: ThreadPoolExecutor) -> None:
    data = save(noise(640, 480, 0), "BMP")
    assert len(data) > 64 << 10
    first, second = await identify(executor, data), await identify(executor, data)
    assert first == second

"""Encoded bytes -> what the model will see of them: identity, size, grid and number of tokens; nothing is decoded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor
from hashlib import blake2b
from math import prod

import msgspec
from msgspec import Struct

from vlmrt.actors.edge.chat_request import PixelLimits
from vlmrt.actors.edge.image_header import ImageHeader, NotAnImage, read_image_header
from vlmrt.actors.models.config import ImageProcessing
from vlmrt.actors.models.qwen2_vl.processing import image_grid_thw, num_image_tokens, resized_size
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import MmHash

LARGE_BYTES = 64 << 10  # hashed off the event loop from here on (about 0.1 ms)
DIGEST_BYTES = 32
LOW_DETAIL_PIXELS = 512 * 512  # detail "low": no picture is resized to more than this
MAX_CACHED_HEADERS = 4096
MAX_CACHED_OPTIONS = 256
ENLARGED = 1 << 16  # a power of two: the aspect ratio stays exact


class IdentifiedImage(Struct, frozen=True):
    """One picture of a prompt: its key, its tokens, and how a media worker is to decode it."""

    mm_hash: MmHash
    encoded: bytes
    size: tuple[int, int]  # width, height after EXIF orientation
    target_size: tuple[int, int]
    grid_thw: tuple[int, int, int]
    num_tokens: int
    uuid: str = ""  # the client's name for it


class NamedImage(Struct, frozen=True):
    """One picture of a prompt that the client names and the scheduler knows: nobody has its bytes."""

    uuid: str
    mm_hash: MmHash
    grid_thw: tuple[int, int, int]
    num_tokens: int


class _Options(Struct, frozen=True):
    processing: ImageProcessing
    key: bytes  # of the model and the options
    has_minimum: bool  # of the client, above the server's


PromptImage = IdentifiedImage | NamedImage


class ImageIdentifier:
    """Identifies pictures for one model.  The key binds the bytes and every option that changes the model's rows."""

    def __init__(self, processing: ImageProcessing, model_identity: str, max_pixels: int) -> None:
        self._processing = processing
        self._model_identity = model_identity
        self._options: dict[PixelLimits, _Options] = {}
        self._max_pixels = max_pixels
        self._headers: OrderedDict[bytes, ImageHeader] = OrderedDict()

    async def identify(
        self,
        encoded: bytes,
        *,
        limits: PixelLimits,
        cache_salt: str,
        param: str,
        executor: Executor,
        uuid: str = "",
    ) -> IdentifiedImage:
        """Raises: RequestError 400 for bytes that are no picture, or one of a size out of bounds."""
        content = blake2b(digest_size=DIGEST_BYTES)
        if len(encoded) < LARGE_BYTES:
            content.update(encoded)
            header = self._headers.get(content.digest())
            header = header if header is not None else _read_header(encoded, param)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(executor, content.update, encoded)
            header = self._headers.get(content.digest())
            if header is None:
                header = await loop.run_in_executor(executor, _read_header, encoded, param)
        self._remember(content.digest(), header)
        self._check_size(header, param)
        options = self._options_within(limits)
        key = blake2b(content.digest(), digest_size=DIGEST_BYTES, key=options.key)
        key.update(cache_salt.encode())
        image = self._identified(MmHash(key.hexdigest()), encoded, header, options, param)
        return msgspec.structs.replace(image, uuid=uuid) if uuid else image

    def _options_within(self, limits: PixelLimits) -> _Options:
        known = self._options.get(limits)
        if known is None:
            processing = _limited(self._processing, limits)
            key = blake2b(msgspec.msgpack.encode((self._model_identity, processing)), digest_size=DIGEST_BYTES)
            known = _Options(processing, key.digest(), processing.min_pixels > self._processing.min_pixels)
            if len(self._options) >= MAX_CACHED_OPTIONS:
                self._options.clear()
            self._options[limits] = known
        return known

    def _remember(self, digest: bytes, header: ImageHeader) -> None:
        self._headers[digest] = header
        self._headers.move_to_end(digest)
        if len(self._headers) > MAX_CACHED_HEADERS:
            self._headers.popitem(last=False)

    def _check_size(self, header: ImageHeader, param: str) -> None:
        pixels = header.width * header.height
        if pixels > self._max_pixels:
            raise RequestError(
                f"{param}: the image is {header.width}x{header.height}, {pixels} pixels, more than {self._max_pixels}",
                param=param,
                code="image_too_large",
            )

    def _identified(
        self, mm_hash: MmHash, encoded: bytes, header: ImageHeader, options: _Options, param: str
    ) -> IdentifiedImage:
        width, height, processing = header.width, header.height, options.processing
        try:
            target_size = resized_size(width, height, processing)
            if options.has_minimum and prod(target_size) > processing.max_pixels:  # enlarged, and rounded up too far
                width, height = width * ENLARGED, height * ENLARGED  # made smaller, and rounded down, instead
                target_size = resized_size(width, height, processing)
            grid_thw = image_grid_thw(width, height, processing)
        except ValueError as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_image_size") from None
        num_tokens = num_image_tokens(grid_thw, processing.merge_size)
        return IdentifiedImage(mm_hash, encoded, (header.width, header.height), target_size, grid_thw, num_tokens)


def _read_header(encoded: bytes, param: str) -> ImageHeader:
    try:
        return read_image_header(encoded)
    except NotAnImage as error:
        raise RequestError(f"{param}: {error}", param=param, code="invalid_image") from None


def _limited(processing: ImageProcessing, limits: PixelLimits) -> ImageProcessing:
    """What a client asks for, never more pixels than the server's own limit."""
    max_pixels = min(limits.max_pixels or processing.max_pixels, processing.max_pixels)
    if limits.low_detail:
        max_pixels = min(max_pixels, LOW_DETAIL_PIXELS)
    min_pixels = min(limits.min_pixels or processing.min_pixels, max_pixels)
    return msgspec.structs.replace(processing, max_pixels=max_pixels, min_pixels=min_pixels)

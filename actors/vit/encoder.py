"""A batch of Encodes -> rows in the slab and one answer each: what the ViT's worker thread does."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.vit.engines.engine import Pixels, VisionEngine
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import ActorName, ArenaRef, EmbedsReady, Encode, EncodeFailed, Epoch, SlabExport
from vlmrt.runtime.slab import EmbeddingSlab, row_index

Answer = EmbedsReady | EncodeFailed


class PixelReader(Protocol):
    """runtime.shared_memory.ArenaReader, or what a test puts in its place."""

    def view(self, ref: ArenaRef, shape: tuple[int, ...]) -> Pixels: ...

    def drop(self, actor: ActorName, epoch: Epoch) -> None: ...

    def close(self) -> None: ...


class Loaded(NamedTuple):
    encode: Encode
    pixels: Pixels
    num_rows: int


class Encoder:
    """The engine, the slab it writes to and the arenas it reads from."""

    def __init__(
        self, engine: VisionEngine[Any], slab: EmbeddingSlab, reader: PixelReader, vision: VisionConfig
    ) -> None:
        self._engine = engine
        self.slab = slab
        self._reader = reader
        self._vision = vision
        self.beat_s = time.monotonic()  # when the last quantum ended; who waits for a batch sees whether it moves

    @property
    def export(self) -> SlabExport:
        return self.slab.export()

    def close(self) -> None:
        self._reader.close()
        self.slab.close()

    def encode(self, batch: Sequence[Encode]) -> list[Answer]:
        """Encode a batch; an image that cannot be read or encoded fails alone.  Returns when the rows are in the slab.

        Raises: torch.AcceleratorError after a fault of the device, which only a new process can mend.
        """
        self.beat_s = time.monotonic()
        failed: list[Answer] = []
        loaded: list[Loaded] = []
        for encode in batch:
            try:
                loaded.append(self._load(encode))
            except RequestError as error:
                failed.append(EncodeFailed(encode.encode_id, error.to_wire()))
        return failed + self._run(loaded)

    def _run(self, images: Sequence[Loaded]) -> list[Answer]:
        """All images in one forward; where that fails, each in its own."""
        if not images:
            return []
        try:
            return self._forward(images)
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError:
            problem = "the vision tower ran out of GPU memory: lower --max-pixels, or give the image smaller"
        except Exception as error:
            problem = repr(error)
        # Out of the except clauses, so that the error's traceback no longer holds the tensors of what failed.
        if self.slab.tensor().device.type == "cuda":
            torch.cuda.empty_cache()
        if len(images) > 1:
            return [answer for image in images for answer in self._run([image])]
        failure = RequestError(f"image cannot be encoded: {problem}", status=500, code="encode_failed")
        return [EncodeFailed(images[0].encode.encode_id, failure.to_wire())]

    def _forward(self, images: Sequence[Loaded]) -> list[Answer]:
        run = self._engine.prepare([image.pixels for image in images], [image.encode.grid_thw for image in images])
        self.beat_s = time.monotonic()
        while not self._engine.run_quantum(run):
            self.beat_s = time.monotonic()
        rows = self._engine.rows(run)
        index = np.concatenate(
            [row_index(image.encode.pages, 0, image.num_rows, self.slab.page_rows) for image in images]
        )
        if rows.shape != (len(index), self._vision.out_hidden_size):
            raise ValueError(f"the engine gave rows {list(rows.shape)} for {len(index)} places")
        with torch.inference_mode():
            target = self.slab.tensor()
            target.index_copy_(0, torch.from_numpy(index).to(target.device), rows.to(target.dtype))
        if target.device.type == "cuda":
            torch.cuda.current_stream(target.device).synchronize()
        self.beat_s = time.monotonic()
        return [EmbedsReady(image.encode.encode_id, image.num_rows) for image in images]

    def _load(self, encode: Encode) -> Loaded:
        """Raises: RequestError if the message contradicts itself, the slab or the arena."""
        num_rows = self._check(encode)
        arena = encode.pixels
        self._reader.drop(arena.arena, Epoch(arena.epoch - 1))  # a worker that lives again has given up its old arena
        try:
            return Loaded(encode, self._reader.view(encode.pixels, encode.shape), num_rows)
        except KeyError as error:
            raise RequestError(f"the decoded pixels are gone: {error}", status=500, code="pixels_lost") from None
        except ValueError as error:
            raise _bad_encode(str(error)) from None

    def _check(self, encode: Encode) -> int:
        """Rows of an image whose grid, pixels and pages fit each other."""
        frames, height, width = encode.grid_thw
        patch, merge, group = self._vision.patch_size, self._vision.spatial_merge_size, self._vision.temporal_patch_size
        if min(encode.grid_thw) < 1 or height % merge or width % merge:
            raise _bad_encode(f"grid_thw {encode.grid_thw} is not positive in multiples of {merge}")
        if encode.shape[1:] != (height * patch, width * patch, 3) or -(-encode.shape[0] // group) != frames:
            raise _bad_encode(f"pixels of shape {encode.shape} do not fill grid_thw {encode.grid_thw}")
        if encode.pixels.num_bytes != math.prod(encode.shape):
            raise _bad_encode(f"{encode.pixels.num_bytes} bytes of pixels for shape {encode.shape}")
        num_rows = frames * height * width // merge**2
        pages, num_pages = encode.pages, self.slab.num_pages
        if len(pages) != -(-num_rows // self.slab.page_rows) or len(set(pages)) != len(pages):
            raise _bad_encode(f"{len(pages)} pages of {self.slab.page_rows} rows for {num_rows} rows")
        if min(pages) < 0 or max(pages) >= num_pages:
            raise _bad_encode(f"pages {min(pages)} to {max(pages)} are not within the slab's {num_pages}")
        return num_rows


def _bad_encode(problem: str) -> RequestError:
    return RequestError(f"encode refused: {problem}", status=500, code="bad_encode")

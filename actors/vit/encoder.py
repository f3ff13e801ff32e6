"""A batch of Encodes -> rows in the slab and one answer each: what the ViT's worker thread does.

Restores are another thread's: rows that were encoded before come back from host memory, whatever is being encoded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.vit.engines.engine import Pixels, VisionEngine
from vlmrt.actors.vit.host_rows import HostRows
from vlmrt.kernels.transfer import to_device
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import ActorName, ArenaRef, EmbedsReady, Encode, EncodeFailed, Epoch, Restore, SlabExport
from vlmrt.runtime.slab import EmbeddingSlab, num_pages_for, row_index

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


@dataclass(slots=True)
class EncodeBatch:
    """Images on their way through begin, issue and finish."""

    images: list[Loaded] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)  # known already
    run: Any = None  # the engine's, between begin and issue
    problem: str | None = None  # why the images cannot be encoded together
    begin_s: float = field(default_factory=time.monotonic)


class Encoder:
    """The engine, the slab it writes to, the host memory behind that and the arenas it reads from."""

    def __init__(
        self,
        engine: VisionEngine[Any],
        slab: EmbeddingSlab,
        host_rows: HostRows,
        reader: PixelReader,
        vision: VisionConfig,
    ) -> None:
        self._engine = engine
        self.slab = slab
        self._host_rows = host_rows
        self._reader = reader
        self._vision = vision
        self.beat_s = time.monotonic()  # when the last quantum ended; who waits for a batch sees whether it moves

    @property
    def export(self) -> SlabExport:
        return self.slab.export()

    @property
    def num_host_pages(self) -> int:
        return self._host_rows.num_pages

    def close(self) -> None:
        self._reader.close()
        self.slab.close()

    def restore(self, restores: Sequence[Restore]) -> list[Answer]:
        """Rows from host memory into the slab; one answer for each image, when they are there.

        From any thread, beside begin, issue and finish: nobody else writes these pages, nobody writes the host's.
        """
        begin_s = time.monotonic()
        answers: list[Answer] = []
        checked: list[Restore] = []
        for restore in restores:
            try:
                self._check_restore(restore)
                checked.append(restore)
            except RequestError as error:
                answers.append(EncodeFailed(restore.encode_id, error.to_wire()))
        self._host_rows.restore(checked)
        end_s = time.monotonic()
        return answers + [EmbedsReady(restore.encode_id, restore.num_rows, begin_s, end_s) for restore in checked]

    def begin(self, batch: Sequence[Encode]) -> EncodeBatch:
        """Read a batch's pixels and bring them to the device, behind what it is doing.

        Raises: torch.AcceleratorError after a fault of the device, which only a new process can mend; so do the others.
        """
        self.beat_s = time.monotonic()
        begun = EncodeBatch()
        for encode in batch:
            try:
                begun.images.append(self._load(encode))
            except RequestError as error:
                begun.answers.append(EncodeFailed(encode.encode_id, error.to_wire()))
        if begun.images:
            begun.problem = self._try(partial(self._prepare, begun))
        return begun

    def issue(self, begun: EncodeBatch) -> None:
        """Run all layers; returns when the last ones and the copies of the rows are queued on the device."""
        if begun.images and begun.problem is None:
            begun.problem = self._try(partial(self._run_layers, begun))

    def finish(self, begun: EncodeBatch) -> list[Answer]:
        """One answer for each image, when all copies of its rows are there; a batch that failed is tried one by one."""
        if begun.problem is None:
            self._wait()
            end_s = time.monotonic()
            ready = [
                EmbedsReady(image.encode.encode_id, image.num_rows, begun.begin_s, end_s) for image in begun.images
            ]
            return begun.answers + ready
        if self._on_cuda:
            torch.cuda.empty_cache()
        if len(begun.images) == 1:
            failure = RequestError(f"image cannot be encoded: {begun.problem}", status=500, code="encode_failed")
            return [*begun.answers, EncodeFailed(begun.images[0].encode.encode_id, failure.to_wire())]
        for image in begun.images:
            alone = EncodeBatch(images=[image])
            alone.problem = self._try(partial(self._prepare, alone))
            self.issue(alone)
            begun.answers += self.finish(alone)
        return begun.answers

    def _try(self, work: Callable[[], None]) -> str | None:
        """What went wrong; None if nothing did.  The error itself is let go: its traceback holds the work's tensors."""
        try:
            work()
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError:
            return "the vision tower ran out of GPU memory: lower --max-pixels, or give the image smaller"
        except Exception as error:
            return repr(error)
        return None

    def _prepare(self, begun: EncodeBatch) -> None:
        images = begun.images
        begun.run = self._engine.prepare(
            [image.pixels for image in images], [image.encode.grid_thw for image in images]
        )
        self.beat_s = time.monotonic()

    def _run_layers(self, begun: EncodeBatch) -> None:
        run, begun.run = begun.run, None  # let go of here, whatever happens
        while not self._engine.run_quantum(run):
            self.beat_s = time.monotonic()
        rows = self._engine.rows(run)
        index = np.concatenate(
            [row_index(image.encode.pages, 0, image.num_rows, self.slab.page_rows) for image in begun.images]
        )
        if rows.shape != (len(index), self._vision.out_hidden_size):
            raise ValueError(f"the engine gave rows {list(rows.shape)} for {len(index)} places")
        with torch.inference_mode():
            target = self.slab.tensor()
            rows = rows.to(target.dtype)
            target.index_copy_(0, to_device(index, target.device), rows)
            parts = rows.split([image.num_rows for image in begun.images])  # type: ignore[no-untyped-call]
            for image, part in zip(begun.images, parts, strict=True):
                if image.encode.host_pages:
                    self._host_rows.save(part, image.encode.host_pages)
        self.beat_s = time.monotonic()

    @property
    def _on_cuda(self) -> bool:
        return self.slab.tensor().device.type == "cuda"

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.current_stream(self.slab.tensor().device).synchronize()
        self.beat_s = time.monotonic()

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
        problem = self._page_problem(encode.pages, num_rows, self.slab.num_pages, "the slab")
        if problem is None and encode.host_pages:
            problem = self._page_problem(encode.host_pages, num_rows, self.num_host_pages, "host memory")
        if problem is not None:
            raise _bad_encode(problem)
        return num_rows

    def _check_restore(self, restore: Restore) -> None:
        """Raises: RequestError if the message contradicts itself, the slab or the host memory."""
        num_rows = restore.num_rows
        problem = (
            f"{num_rows} rows"
            if num_rows < 1
            else self._page_problem(restore.pages, num_rows, self.slab.num_pages, "the slab")
            or self._page_problem(restore.host_pages, num_rows, self.num_host_pages, "host memory")
        )
        if problem is not None:
            raise RequestError(f"restore refused: {problem}", status=500, code="bad_restore")

    def _page_problem(self, pages: Sequence[int], num_rows: int, num_pages: int, where: str) -> str | None:
        """Why these are not the pages for so many rows in a memory of num_pages; None if they are."""
        if len(pages) != num_pages_for(num_rows, self.slab.page_rows) or len(set(pages)) != len(pages):
            return f"{len(pages)} pages of {self.slab.page_rows} rows in {where} for {num_rows} rows"
        if min(pages) < 0 or max(pages) >= num_pages:
            return f"pages {min(pages)} to {max(pages)} are not within the {num_pages} of {where}"
        return None


def _bad_encode(problem: str) -> RequestError:
    return RequestError(f"encode refused: {problem}", status=500, code="bad_encode")

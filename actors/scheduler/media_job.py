"""One image on its way to rows in a slab: how far it is, and what it fails with."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from vlmrt.actors.scheduler.embed_cache import Slab
from vlmrt.actors.scheduler.request import Request
from vlmrt.actors.scheduler.request_trace import SCHEDULER
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import ActorName, ArenaRef, MmHash, RequestId
from vlmrt.runtime.timeline import Span


class Stage(enum.Enum):
    NEEDED = "needed"  # nobody has been asked
    DECODING = "decoding"  # an edge has been asked to hand it to a media worker
    DECODED = "decoded"  # pixels in an arena, no pages yet
    ENCODING = "encoding"  # pages are allocated, a ViT is at it
    KEPT = "kept"  # rows in a ViT's host memory, no pages yet
    RESTORING = "restoring"  # pages are allocated, the ViT copies the rows back


@dataclass(slots=True, eq=False)
class Job:
    """What there is to do for one mm_hash, and how far it is."""

    mm_hash: MmHash
    grid_thw: tuple[int, int, int]
    num_rows: int
    stage: Stage = Stage.NEEDED
    asked: RequestId | None = None  # through which request
    file: MmHash | None = None  # that it is decoded from: the clip that the request has it in, or itself
    asked_at_s: float = 0.0
    worker: ActorName | None = None  # whose arena is charged with num_bytes
    num_bytes: int = 0
    pixels: ArenaRef | None = None  # None while encoding: their arena is gone
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    decoded: Span | None = None  # how its pixels came about
    encode_id: int = -1
    vit: ActorName | None = None
    is_cancelled: bool = False
    no_pages_since_s: float | None = None  # the most urgent job waits for pages that are held
    num_media_losses: int = 0
    num_vit_losses: int = 0
    num_encode_failures: int = 0

    @property
    def num_patches(self) -> int:
        return self.grid_thw[0] * self.grid_thw[1] * self.grid_thw[2]

    @property
    def is_at_vit(self) -> bool:
        return self.stage in (Stage.ENCODING, Stage.RESTORING)

    def spans_to_rows(self, vit: ActorName, begin_s: float, end_s: float) -> tuple[Span, ...]:
        """From bytes, or from the copy in host memory, to rows that the ViT had between these times."""
        if self.stage is Stage.RESTORING:
            return (Span("restore", vit, begin_s, end_s),)
        encode = Span("encode", vit, begin_s, end_s)
        assert self.decoded is not None, f"{self.mm_hash} is encoded and was never decoded"
        return self.decoded, Span("encode_wait", SCHEDULER, self.decoded.end_s, begin_s), encode


def died(what: str, code: str, doing: str) -> WireError:
    return WireError(500, f"the {what} died twice while {doing} this image", code)


def not_cached(request: Request, mm_hash: MmHash) -> WireError:
    uuid = next(item.uuid for item in request.media if item.mm_hash == mm_hash)
    message = f"the image {uuid!r} is not cached any more; send its bytes as well"
    return WireError(400, message, "media_not_cached", "messages")


def too_large(job: Job, slabs: Iterable[Slab]) -> WireError:
    num_rows = max(slab.export.num_pages * slab.export.page_rows for slab in slabs)
    message = f"an image has {job.num_rows} embedding rows, more than the {num_rows} that the embedding cache holds"
    return WireError(400, message, "image_too_large", "messages")

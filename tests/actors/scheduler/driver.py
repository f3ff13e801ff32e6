"""One State with its peers up, driven event by event; the books are checked after each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

from tests.actors.scheduler.invariants import check_invariants
from tests.support import make_config, peer_down, peer_up
from vlmrt.actors.scheduler.state import Send, State
from vlmrt.runtime.config import ModelOptions, ParallelOptions, SchedulingOptions
from vlmrt.runtime.control_messages import Capabilities, EdgeReady, LlmReady, MediaReady, VitReady
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    ArenaRef,
    EmbedsReady,
    Encode,
    EncodeFailed,
    Epoch,
    FailedRow,
    HostSlabExport,
    MediaItem,
    Message,
    MmHash,
    NeedMedia,
    PixelsReady,
    RequestId,
    Restore,
    Sampling,
    StepPlan,
    StepResult,
    StopRule,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
)

M = TypeVar("M", bound=Message)

STOP = 99  # the stop token of every request made here
PAGE_ROWS = 2
WIDTH = 8
PIXEL_BYTES = 1000
BLOCK_BYTES = 100


def image(name: str, start: int, num_tokens: int) -> MediaItem:
    return MediaItem(MmHash(name), start, num_tokens, (1, 1, num_tokens))


def clip(name: str, start: int, num_groups: int, num_tokens: int = 4) -> tuple[MediaItem, ...]:
    """The groups of a clip, called name0, name1, ..., each of num_tokens."""
    return tuple(
        MediaItem(
            MmHash(f"{name}{group}"),
            start + group * num_tokens,
            num_tokens,
            (1, 1, num_tokens),
            time_offset=group,
            continues=group > 0,
        )
        for group in range(num_groups)
    )


def messages(sends: Iterable[Send], kind: type[M], peer: str | None = None) -> list[M]:
    return [send.message for send in sends if isinstance(send.message, kind) and peer in (None, send.peer)]


class Driver:
    """Options: num_blocks, num_host_blocks, num_pages, num_host_pages, arena_bytes, vits, medias, tp.

    The rest are SchedulingOptions.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 50,
        num_host_blocks: int = 0,
        num_pages: int = 20,
        num_host_pages: int = 0,
        arena_bytes: int = 1 << 20,
        vits: int = 1,
        medias: int = 1,
        tp: int = 1,
        max_model_len: int = 200,
        block_size: int = 4,
        **scheduling: Any,
    ) -> None:
        self.num_blocks, self.num_pages, self.arena_bytes, self.tp = num_blocks, num_pages, arena_bytes, tp
        self.num_host_blocks, self.num_host_pages = num_host_blocks, num_host_pages
        self.state = State(
            make_config(
                model=ModelOptions(directory="", served_names=("fake",), max_model_len=max_model_len),
                scheduling=SchedulingOptions(block_size=block_size, **scheduling),
                parallel=ParallelOptions(tp=tp),
            )
        )
        self.now_s = 0.0
        self.num_pixels = 0
        self.up("edge:0", "edge:1", *(f"media:{i}" for i in range(medias)), *(f"vit:{i}" for i in range(vits)))
        self.llm_up()

    def _checked(self, sends: list[Send]) -> list[Send]:
        check_invariants(self.state)
        return sends

    # ------------------------------------------------------------ peers

    def capabilities(self, name: str) -> Capabilities:
        match name.partition(":")[0]:
            case "edge":
                return EdgeReady()
            case "media":
                return MediaReady(self.arena_bytes)
            case "vit":
                slab = HostSlabExport(f"slab/{name}", self.num_pages, PAGE_ROWS, WIDTH, "float32")
                return VitReady(slab, self.num_host_pages)
            case _:
                return LlmReady(self.num_blocks, self.num_host_blocks, BLOCK_BYTES)

    def up(self, *names: str, epoch: int = 1) -> list[Send]:
        sends = []
        for name in names:
            peer = peer_up(name, self.capabilities(name), epoch=epoch)
            sends += self._checked(self.state.on_peer_up(peer, self.now_s))
        return sends

    def down(self, *names: str, epoch: int = 1) -> list[Send]:
        sends = []
        for name in names:
            sends += self._checked(self.state.on_peer_down(peer_down(name, epoch=epoch), self.now_s))
        return sends

    def llm_up(self, *, epoch: int = 1) -> list[Send]:
        return self.up(*(f"llm:{rank}" for rank in range(self.tp)), epoch=epoch)

    # ------------------------------------------------------------ events

    def event(self, sender: str, message: Any) -> list[Send]:
        return self._checked(self.state.on_event(ActorName(sender), message, self.now_s))

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int] | int,
        media: tuple[MediaItem, ...] = (),
        *,
        max_tokens: int = 5,
        min_tokens: int = 0,
        edge: str = "edge:0",
        **options: Any,
    ) -> list[Send]:
        """tokens: the prompt, or its length."""
        token_ids = tuple(range(100, 100 + tokens)) if isinstance(tokens, int) else tuple(tokens)
        stop = StopRule(max_tokens, min_tokens, (STOP,))
        return self.event(edge, Submit(RequestId(request_id), token_ids, media, 0, Sampling(), stop, **options))

    def abort(self, request_id: str, edge: str = "edge:0") -> list[Send]:
        return self.event(edge, Abort(RequestId(request_id)))

    def pixels(self, name: str, media: str = "media:0", epoch: int = 1, num_bytes: int = PIXEL_BYTES) -> list[Send]:
        self.num_pixels += 1
        ref = ArenaRef(ActorName(media), Epoch(epoch), self.num_pixels, num_bytes)
        return self.event(media, PixelsReady(MmHash(name), ref, (1, 2, 2, 3), *self._worked()))

    def embeds(self, encode: Encode, vit: str = "vit:0") -> list[Send]:
        return self.event(vit, EmbedsReady(encode.encode_id, encode.grid_thw[2], *self._worked()))

    def restored(self, restore: Restore, vit: str = "vit:0") -> list[Send]:
        return self.event(vit, EmbedsReady(restore.encode_id, restore.num_rows, *self._worked()))

    def _worked(self) -> tuple[float, float]:
        """Begin and end of what media workers and ViTs do: the second before they answer, which they do at once."""
        return self.now_s - 1.0, self.now_s

    def encode_failed(self, encode: Encode | Restore, error: Any, vit: str = "vit:0") -> list[Send]:
        return self.event(vit, EncodeFailed(encode.encode_id, error))

    def make_ready(self, name: str) -> list[Send]:
        """From NeedMedia to EmbedsReady in one go, on media:0 and vit:0."""
        (encode,) = messages(self.pixels(name), Encode)
        return self.embeds(encode)

    def make_ready_on(self, media: str, name: str) -> list[Send]:
        """As make_ready, on another media worker; returns everything sent meanwhile."""
        sends = self.pixels(name, media)
        (encode,) = messages(sends, Encode)
        return sends + self.embeds(encode)

    # ------------------------------------------------------------ steps

    def advance(self) -> list[StepPlan]:
        return messages(self._checked(self.state.advance(self.now_s)), StepPlan, "llm:0")

    def result(
        self,
        *token_ids: int,
        duration_ms: float = 1.0,
        failed: tuple[int, ...] = (),
        reason: Literal["out_of_memory", "grammar"] = "out_of_memory",
        logprobs: tuple[TokenLogprobs | None, ...] = (),
    ) -> list[Send]:
        """The oldest step in flight ends; rows beyond those given sample token 7."""
        step = self.state.llm.in_flight[0]
        num_samples = sum(row.sample for index, row in enumerate(step.rows) if index not in failed)
        tokens = (*token_ids, *[7] * num_samples)[:num_samples]
        lost = tuple(FailedRow(row, reason) for row in failed)
        return self.event("llm:0", StepResult(step.plan.step, tokens, duration_ms, lost, logprobs))

    def run(self, *, num_steps: int = 1000) -> dict[str, list[TokenOutput]]:
        """Steps until nothing can run; every sampled token is 7.  Returns the outputs by request."""
        outputs: dict[str, list[TokenOutput]] = {}
        for _ in range(num_steps):
            self.advance()
            if not self.state.llm.in_flight:
                break
            for batch in messages(self.result(), TokenBatch):
                for output in batch.outputs:
                    outputs.setdefault(output.request_id, []).append(output)
        return outputs


def outputs_of(sends: Iterable[Send]) -> list[TokenOutput]:
    return [output for batch in messages(sends, TokenBatch) for output in batch.outputs]


def error_of(sends: Iterable[Send]) -> tuple[int, str | None]:
    """Status and code of the one error in these sends."""
    (error,) = [output.error for output in outputs_of(sends) if output.error is not None]
    return error.status, error.code


def needs(sends: Iterable[Send]) -> list[tuple[str, str, str]]:
    """(request, image, media worker) of each NeedMedia."""
    return [(need.request_id, need.mm_hash, need.media) for need in messages(sends, NeedMedia)]

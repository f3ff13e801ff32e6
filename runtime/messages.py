"""Every message between the processes of a request's way, grouped by sender and receiver.

What the supervisor and its actors say to each other is in control_messages.py.

All are frozen msgspec Structs; a channel's type is the union of what its receiver handles (`EdgeInbox`, ...).  No
field is ever a pickle, a path from a client or a device handle from a client.  Sizes: token ids are ints, `grid_thw`
counts patches, row and page numbers count rows of `[out_hidden_size]` in an EmbeddingSlab.

The life of one request:  Submit -> (NeedMedia -> Decode or DecodeFrames -> PixelsReady -> Encode -> EmbedsReady)* ->
StepPlan -> StepResult -> TokenBatch ... and exactly one terminal TokenOutput (finish_reason or error), or an Abort from
the edge instead.
"""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

from vlmrt.runtime.errors import WireError
from vlmrt.runtime.questions import CacheKind
from vlmrt.runtime.timeline import Span

PROTOCOL_VERSION = 4

RequestId = NewType("RequestId", str)
MmHash = NewType("MmHash", str)  # 128 bits or more, hexadecimal: content and every option that changes the rows
ActorName = NewType("ActorName", str)  # "edge:0", "media:0", "scheduler:0", "vit:0", "llm:0"
Epoch = NewType("Epoch", int)  # the incarnation of an actor; grows with every restart

FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of the messages: the tag names the type on the wire."""


# ---------------------------------------------------------------- shared parts


class ArenaRef(msgspec.Struct, frozen=True, array_like=True):
    """Pixels in a media worker's arena.  Valid for that worker's epoch only, until FreePixels."""

    arena: ActorName
    epoch: Epoch
    offset: int
    num_bytes: int


class MediaItem(msgspec.Struct, frozen=True, array_like=True):
    """One image of a prompt, or one temporal group of a clip: what it is and where its rows go."""

    mm_hash: MmHash
    start: int  # index of its first placeholder token in the prompt
    num_tokens: int
    grid_thw: tuple[int, int, int]  # patches along time, height, width
    uuid: str = ""  # the client's name for it, under which a later request may leave out the bytes
    has_bytes: bool = True  # whether the edge can answer NeedMedia; False: named by uuid alone
    time_offset: int = 0  # positions along time from its clip's first group
    continues: bool = False  # goes on with the clip of the item before it, right behind which it lies


class LogitBias(msgspec.Struct, frozen=True, array_like=True):
    """What is added to a token's logit while the output is shorter than `before` tokens; several of a token add up."""

    token_id: int
    value: float  # -inf: the token cannot be chosen
    before: int = 2**31 - 1


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen.  Every default is resolved by the edge; a rank reads nothing else."""

    temperature: float = 1.0  # 0: argmax
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0  # int64; the edge draws one where the client gave none
    logit_bias: tuple[LogitBias, ...] = ()
    num_logprobs: int = -1  # -1: none; else the chosen token's logprob and those of so many likeliest tokens
    grammar: str = ""  # what the output must match, as llguidance reads it; empty: anything


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities by the model's own logits: before bias, penalties, temperature, grammar."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the likeliest, best first


class StopRule(msgspec.Struct, frozen=True, array_like=True):
    """When a request ends by token; stop strings are the edge's."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # eos ids included unless ignore_eos


# ---------------------------------------------------------------- edge -> scheduler


class Submit(Message, frozen=True):
    """A new request.  Answered by TokenOutputs, the last of which is terminal."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...]  # in prompt order
    rope_delta: int
    sampling: Sampling
    stop: StopRule
    cache_salt: str = ""
    priority: int = 0  # smaller runs earlier
    lookup_id: int = 0  # of the LookUpMedia whose findings it uses, which keep their rows until here; 0: of none


class LookUpMedia(Message, frozen=True):
    """What is known of media that a client names and leaves out.  Answered by MediaFound, same lookup_id.

    What is found stays cached until a Submit of the same edge names the lookup_id, or ForgetLookUp.
    """

    lookup_id: int  # of this edge, from 1 on
    cache_salt: str
    uuids: tuple[str, ...]


class ForgetLookUp(Message, frozen=True):
    """No request comes of that lookup."""

    lookup_id: int


class ResetCache(Message, frozen=True):
    """Forget what that cache holds and no request uses.  Answered by CacheReset, same reset_id."""

    reset_id: int  # of this edge
    kind: CacheKind


class Abort(Message, frozen=True):
    """The edge needs no more of this request (client gone, stop string found, timeout); it has ended it itself."""

    request_id: RequestId


class MediaUnsent(Message, frozen=True):
    """The answer to a NeedMedia that the edge could not forward to that incarnation of a media worker: ask again."""

    request_id: RequestId
    mm_hash: MmHash


# ---------------------------------------------------------------- scheduler -> edge


class NeedMedia(Message, frozen=True):
    """Hand this item's encoded bytes to that media worker.  May come at any time before the request's end."""

    request_id: RequestId
    mm_hash: MmHash
    media: ActorName
    epoch: Epoch  # of that worker: an edge that knows another incarnation sends it nothing


class KnownMedia(msgspec.Struct, frozen=True, array_like=True):
    mm_hash: MmHash
    num_tokens: int
    grid_thw: tuple[int, int, int]


class MediaFound(Message, frozen=True):
    """By uuid, in the order they were asked for; None: send the bytes."""

    lookup_id: int
    items: tuple[KnownMedia | None, ...]


class CacheReset(Message, frozen=True):
    """That cache holds nothing any more but what requests use."""

    reset_id: int


class Usage(msgspec.Struct, frozen=True, array_like=True):
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request; terminal when finish_reason or error is set."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    error: WireError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # as many as token_ids, or none where they are not asked for
    spans: tuple[Span, ...] = ()  # known since the last ones: with the first token, and with the end


class TokenBatch(Message, frozen=True):
    """All news of one step for one edge."""

    outputs: tuple[TokenOutput, ...]


# ---------------------------------------------------------------- edge -> media


class Decode(Message, frozen=True):
    """Decode one image and resize it to target_size.  Answered to the scheduler: PixelsReady or DecodeFailed."""

    mm_hash: MmHash
    encoded: bytes
    size: tuple[int, int]  # width, height found by the edge in the header, after EXIF orientation
    target_size: tuple[int, int]  # width, height
    scheduler_epoch: Epoch  # who asked for it; kept for that incarnation, if this worker has not heard of it yet


class Probe(Message, frozen=True):
    """What is in this clip?  Answered to the edge: Probed, same probe_id."""

    probe_id: int  # of this edge
    encoded: bytes


class FrameGroup(msgspec.Struct, frozen=True, array_like=True):
    """The frames of one temporal group: as many as the model's temporal patch size."""

    mm_hash: MmHash
    frame_indices: tuple[int, ...]  # in the order in which the clip shows its frames


class DecodeFrames(Message, frozen=True):
    """Decode these groups of one clip, in this order, and resize their frames to target_size.

    Answered to the scheduler group by group, each as soon as it is ready: PixelsReady or DecodeFailed.
    """

    encoded: bytes
    size: tuple[int, int]  # width, height, as Probed
    target_size: tuple[int, int]  # width, height
    groups: tuple[FrameGroup, ...]
    scheduler_epoch: Epoch  # as Decode's


# ---------------------------------------------------------------- media -> edge


class ClipInfo(msgspec.Struct, frozen=True, array_like=True):
    """What sampling and resizing a clip depend on, counted and not taken from its header."""

    width: int  # of its frames as shown: turned as the file says
    height: int
    num_frames: int
    fps: float  # on average
    duration_s: float  # num_frames / fps


class Probed(Message, frozen=True):
    """Either what is in the clip, or why it cannot be decoded."""

    probe_id: int
    clip: ClipInfo | None = None
    error: WireError | None = None


# ---------------------------------------------------------------- media -> scheduler


class PixelsReady(Message, frozen=True):
    """uint8 pixels [t, height, width, 3] lie in the arena until FreePixels."""

    mm_hash: MmHash
    pixels: ArenaRef
    shape: tuple[int, int, int, int]
    begin_s: float  # when its decoder was called and came back, by the monotonic clock
    end_s: float


class DecodeFailed(Message, frozen=True):
    mm_hash: MmHash
    error: WireError


# ---------------------------------------------------------------- scheduler -> media


class FreePixels(Message, frozen=True):
    pixels: tuple[ArenaRef, ...]


# ---------------------------------------------------------------- scheduler -> vit


class Encode(Message, frozen=True):
    """Encode one image into these pages of the ViT's slab.  Answered by EmbedsReady or EncodeFailed, same encode_id."""

    encode_id: int
    mm_hash: MmHash
    grid_thw: tuple[int, int, int]
    pixels: ArenaRef
    shape: tuple[int, int, int, int]
    pages: tuple[int, ...]  # row r lies in pages[r // page_rows] at r % page_rows
    host_pages: tuple[int, ...] = ()  # of the ViT's host memory, where the rows are kept as well; (): they are not
    more_follow: bool = False  # other images are being decoded: those of one request come within a millisecond


class Restore(Message, frozen=True):
    """Copy an image's rows from host memory into these pages of the slab.  Answered as Encode is, same encode_id."""

    encode_id: int
    mm_hash: MmHash
    num_rows: int
    host_pages: tuple[int, ...]
    pages: tuple[int, ...]


class CancelEncode(Message, frozen=True):
    """Nobody waits for this encode.  It is answered all the same: it ran, or EncodeFailed with code "cancelled"."""

    encode_id: int


# ---------------------------------------------------------------- vit -> scheduler


class EmbedsReady(Message, frozen=True):
    """The rows are complete on the device; sent once the host has seen the encode end."""

    encode_id: int
    num_rows: int
    begin_s: float  # of its batch, or of its restore, by the monotonic clock
    end_s: float


class EncodeFailed(Message, frozen=True):
    encode_id: int
    error: WireError


# ---------------------------------------------------------------- scheduler -> llm ranks


class HostSlabExport(msgspec.Struct, frozen=True, tag="host"):
    """An EmbeddingSlab in a memfd, fetched by name from the supervisor's descriptor server."""

    memory: str
    num_pages: int
    page_rows: int
    width: int
    dtype: Literal["float32", "bfloat16", "float16"]


class CudaSlabExport(msgspec.Struct, frozen=True, tag="cuda"):
    """An EmbeddingSlab in device memory: the CUDA IPC handle of its one allocation, and the device that holds it."""

    handle: bytes
    device: int
    num_pages: int
    page_rows: int
    width: int
    dtype: Literal["float32", "bfloat16", "float16"]


SlabExport = HostSlabExport | CudaSlabExport


class AttachSlab(Message, frozen=True):
    """Map this slab; later StepPlans on this channel refer to it."""

    vit: ActorName
    epoch: Epoch
    slab: SlabExport


class DetachSlab(Message, frozen=True):
    """That incarnation is gone: unmap its slab once the steps before this message are done."""

    vit: ActorName
    epoch: Epoch


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A request enters a slot.  After a preemption token_ids holds what was generated so far as well."""

    slot: int
    request_id: RequestId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    media: tuple[MediaItem, ...]
    rope_delta: int
    sampling: Sampling
    block_ids: tuple[int, ...]  # the blocks that the prefix cache provides, in order


class EmbedSlice(msgspec.Struct, frozen=True, array_like=True):
    """num_rows rows of one image, from first_row on, replace hidden states from token `offset` of the StepRow on."""

    vit: ActorName
    epoch: Epoch
    pages: tuple[int, ...]  # all pages of the image
    first_row: int
    num_rows: int
    offset: int


class StepRow(msgspec.Struct, frozen=True, array_like=True):
    """Run tokens [start, start + num_tokens) of this slot's sequence; new_block_ids extend its block table first."""

    slot: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    sample: bool  # the row's last token's logits choose the next token, which the rank appends to the sequence itself
    embeds: tuple[EmbedSlice, ...] = ()


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """The keys and values of one block, between the KV cache and a rank's host memory."""

    block_id: int
    host_block_id: int


class StepPlan(Message, frozen=True):
    """One step for every rank: save, load, release slots, admit, run the rows (decode rows, num_tokens == 1, first).

    A plan may run a token that the plan before it samples: the rank feeds it itself.  It may load and have no rows.
    """

    step: int
    release: tuple[int, ...]
    admit: tuple[NewSequence, ...]
    rows: tuple[StepRow, ...]
    saves: tuple[BlockCopy, ...] = ()  # to host memory, of blocks that this plan gives away
    loads: tuple[BlockCopy, ...] = ()  # from host memory; the rows of this plan may read them


# ---------------------------------------------------------------- llm rank 0 -> scheduler


class FailedRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of the plan whose sequence is lost."""

    row: int
    reason: Literal["out_of_memory", "grammar"]  # found no memory even alone; its grammar came to no next token


class StepResult(Message, frozen=True):
    """The step is complete on the device: its embedding rows are copied, its tokens sampled."""

    step: int
    token_ids: tuple[int, ...]  # one for every row with sample=True that has not failed, in row order
    duration_ms: float  # of this step alone: not its wait behind the step before it
    failed: tuple[FailedRow, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # as token_ids, None where not asked for; (): nobody asked


# ---------------------------------------------------------------- inboxes: the unions each process decodes

EdgeInbox = NeedMedia | MediaFound | CacheReset | TokenBatch | Probed
MediaInbox = Decode | DecodeFrames | Probe | FreePixels
SchedulerInbox = (
    Submit
    | Abort
    | LookUpMedia
    | ForgetLookUp
    | ResetCache
    | MediaUnsent
    | PixelsReady
    | DecodeFailed
    | EmbedsReady
    | EncodeFailed
    | StepResult
)
VitInbox = Encode | Restore | CancelEncode
LlmInbox = AttachSlab | DetachSlab | StepPlan

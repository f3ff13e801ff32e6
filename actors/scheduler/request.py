"""The Request record and its statuses."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import pairwise

from vlmrt.actors.scheduler.request_trace import RequestTrace
from vlmrt.runtime.messages import ActorName, MediaItem, MmHash, RequestId, Sampling, StopRule, Usage

OrderKey = tuple[int, int]  # (priority, arrival): smaller runs earlier; unique
MediaKey = tuple[int, int, int]  # the request's OrderKey and where in its prompt the item begins


class Status(enum.Enum):
    WAITING = "waiting"  # no slot, no blocks: new, or preempted
    RUNNING = "running"  # has a slot and blocks
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """One accepted request.  `token_ids` holds confirmed tokens only: the prompt and what StepResults brought."""

    request_id: RequestId
    edge: ActorName
    key: OrderKey
    token_ids: list[int]
    num_prompt_tokens: int
    media: tuple[MediaItem, ...]
    rope_delta: int
    sampling: Sampling
    stop: StopRule
    cache_salt: str
    max_tokens: int  # of output; within what the model's length and the KV cache hold
    trace: RequestTrace
    media_end: int = field(init=False)  # index behind the last placeholder token

    status: Status = Status.WAITING
    run: int = 0  # grows with every admission, so that rows planned before a preemption are recognised
    slot: int = -1
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids
    num_sent_blocks: int = 0  # of block_ids, those that the plans so far have told the ranks of
    host_block_ids: list[int] = field(default_factory=list)  # to load behind block_ids; pinned
    num_found_tokens: int = 0  # at the admission to this run, in either memory: known, or still to be loaded
    num_inserted_blocks: int = 0  # blocks already offered to the prefix cache, or taken from it
    num_computed_tokens: int = 0  # their keys and values are in the KV cache: confirmed by StepResult
    num_planned_tokens: int = 0  # includes those of steps in flight
    num_pending_samples: int = 0  # tokens that steps in flight will sample
    num_consumed_items: int = 0  # media items wholly computed
    wanted_media: dict[MmHash, MediaKey] = field(default_factory=dict)  # whose rows it still has to read
    awaits_media: bool = False  # waiting, and nothing can run before the next EmbedsReady of a wanted item
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache at the first admission
    num_yields: int = 0  # times it gave its place to a younger request while it waited for media
    num_recoveries: int = 0  # times it lost its KV cache to a dead TP group
    named_media: frozenset[MmHash] = field(init=False)  # named by uuid: its edge has no bytes of them
    clips: dict[MmHash, MmHash] = field(init=False)  # every group of a clip -> the first of that clip

    def __post_init__(self) -> None:
        named = {item.mm_hash for item in self.media if not item.has_bytes}
        self.named_media = frozenset(named.difference(item.mm_hash for item in self.media if item.has_bytes))
        self.media_end = self.media[-1].start + self.media[-1].num_tokens if self.media else 0
        self.clips = {}
        for before, item in pairwise(self.media):
            if item.continues:
                first = self.clips.setdefault(before.mm_hash, before.mm_hash)
                self.clips.setdefault(item.mm_hash, first)

    @property
    def num_covered_tokens(self) -> int:
        """Tokens whose images need no rows: they are computed, or found and about to be loaded."""
        return max(self.num_computed_tokens, self.num_found_tokens)

    def is_in_run(self, run: int) -> bool:
        return self.status is Status.RUNNING and self.run == run

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_fully_planned(self) -> bool:
        """The steps in flight bring its last token at the latest."""
        return len(self.token_ids) - self.num_prompt_tokens + self.num_pending_samples >= self.max_tokens

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_cached_tokens or 0, self.num_output_tokens)

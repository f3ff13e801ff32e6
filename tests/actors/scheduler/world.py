"""A whole service around one State, in one thread: every message order that the channels allow, and every death.

Channels are first in, first out per pair of incarnations; which one delivers next is drawn.  Messages to
the dead are lost; messages of the dead are delivered until the scheduler is told, then dropped.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from tests.actors.scheduler.fakes import (
    BYTES_PER_PATCH,
    IMAGE_TOKEN,
    VOCABULARY,
    FakeLlm,
    FakeMedia,
    FakeVit,
    fake_logprobs,
    num_rows_of,
    stop_rule,
    tokens_alone,
)
from tests.actors.scheduler.invariants import check_invariants, check_nothing_is_held
from tests.support import make_config
from vlmrt.actors.scheduler.state import Send, State
from vlmrt.runtime.config import ModelOptions, ParallelOptions, SchedulingOptions
from vlmrt.runtime.control_messages import Capabilities, EdgeReady, LlmReady, MediaReady, PeerDown, PeerUp, VitReady
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    ArenaRef,
    Decode,
    DecodeFrames,
    Epoch,
    FinishReason,
    ForgetLookUp,
    FrameGroup,
    HostSlabExport,
    LookUpMedia,
    MediaFound,
    MediaItem,
    MediaUnsent,
    Message,
    MmHash,
    NeedMedia,
    RequestId,
    Sampling,
    StepPlan,
    Submit,
    TokenBatch,
    TokenLogprobs,
)

PAGE_ROWS = 2
SCHEDULER = ActorName("scheduler:0")
FATAL_CODES = {"media": "media_worker_died", "vit": "vision_worker_died", "llm": "llm_group_died"}


@dataclass(frozen=True)
class Sizes:
    """How tight everything is."""

    num_blocks: int = 24
    num_host_blocks: int = 0
    max_loads: int = 64  # of a plan
    block_size: int = 4
    num_pages: int = 8
    num_host_pages: int = 0
    arena_bytes: int = 30_000
    max_num_seqs: int = 4
    max_waiting: int = 20
    max_num_batched_tokens: int = 12
    itl_target_ms: float | None = None
    max_model_len: int = 70
    tp: int = 1
    num_vits: int = 2
    num_media: int = 2
    num_edges: int = 2
    prefix_caching: bool = True
    embedding_caching: bool = True
    by_name: float = 0.0  # how likely an image is left out and named; at most 0.8
    clips: float = 0.0  # how likely a picture is a clip instead
    no_memory: float = 0.0  # how likely a row of a step finds no memory
    no_restore: float = 0.0  # how likely a ViT fails to restore an image


@dataclass
class Client:
    """A request as its edge knows it."""

    submit: Submit
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_open: bool = True
    num_cached_tokens: int = 0
    lookup_id: int = 0  # asked before its Submit, which waits for the answer


class Incarnation:
    """A process with its two channels: what the scheduler sent it, what it sent to whom."""

    def __init__(self, name: ActorName, epoch: Epoch) -> None:
        self.name, self.epoch = name, epoch
        self.is_alive = True
        self.inbox: deque[Message] = deque()
        self.outbox: deque[Message] = deque()  # to the scheduler
        self.receive: Callable[[Message], None] = self.inbox.append
        self.media: dict[ActorName, Epoch] = {}  # an edge's: the media workers it believes to be alive
        self.media_news: deque[tuple[ActorName, Epoch, bool]] = deque()  # what it has not been told of them yet

    def hear(self) -> None:
        """The next news of a media worker."""
        name, epoch, is_alive = self.media_news.popleft()
        if is_alive:
            self.media[name] = epoch
        elif self.media.get(name) == epoch:
            del self.media[name]


class World:
    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self.rng = random.Random(seed)
        self.request_rng = random.Random(seed + 1)  # its own, so that requests do not depend on what happens to them
        self.name_rng = random.Random(seed + 2)  # which images are named and sent without their bytes
        self.state = State(
            make_config(
                model=ModelOptions(directory="", served_names=("fake",), max_model_len=sizes.max_model_len),
                scheduling=SchedulingOptions(
                    max_num_seqs=sizes.max_num_seqs,
                    max_waiting=sizes.max_waiting,
                    max_num_batched_tokens=sizes.max_num_batched_tokens,
                    itl_target_ms=sizes.itl_target_ms,
                    block_size=sizes.block_size,
                    prefix_caching=sizes.prefix_caching,
                    embedding_caching=sizes.embedding_caching,
                ),
                parallel=ParallelOptions(tp=sizes.tp),
            )
        )
        self.state.planner.limits = dataclasses.replace(self.state.limits, max_loads=sizes.max_loads)
        self.now_s = 0.0
        self.incarnations: dict[tuple[ActorName, Epoch], Incarnation] = {}
        self.alive: dict[ActorName, Epoch] = {}
        self.last_epoch: dict[ActorName, Epoch] = {}
        self.known: dict[ActorName, Epoch] = {}  # to the scheduler
        self.news: deque[PeerUp | PeerDown] = deque()  # for the scheduler
        self.medias: dict[tuple[ActorName, Epoch], FakeMedia] = {}
        self.vits: dict[tuple[ActorName, Epoch], FakeVit] = {}
        self.llms: dict[Epoch, FakeLlm] = {}
        self.submits: list[Submit] = []
        self.clients: dict[RequestId, Client] = {}
        self.edge_of: dict[RequestId, tuple[ActorName, Epoch]] = {}
        self.num_deaths: dict[str, int] = {"media": 0, "vit": 0, "llm": 0, "edge": 0}
        self.advance_is_due = False
        self.num_steps = 0
        self.num_lookups = 0
        self.num_named = 0  # images submitted without their bytes
        for name in self.names():
            self.revive(name)

    def names(self) -> list[ActorName]:
        sizes = self.sizes
        counts = (("edge", sizes.num_edges), ("media", sizes.num_media), ("vit", sizes.num_vits), ("llm", 1))
        return [ActorName(f"{kind}:{index}") for kind, count in counts for index in range(count)]

    # ------------------------------------------------------------ births and deaths

    def revive(self, name: ActorName) -> None:
        """A new incarnation of an actor, or of the whole TP group for llm:0."""
        if name in self.alive:
            return
        epoch = Epoch(self.last_epoch.get(name, 0) + 1)
        sizes, kind = self.sizes, name.partition(":")[0]
        if kind == "llm":
            llm = self.llms[epoch] = FakeLlm(
                sizes.tp,
                epoch,
                sizes.num_blocks,
                sizes.num_host_blocks,
                sizes.block_size,
                sizes.max_num_seqs,
                lambda message: self.incarnations[ActorName("llm:0"), epoch].outbox.append(message),
                lambda vit, vit_epoch: self.vits[vit, vit_epoch],
                lambda: self.rng.random() < sizes.no_memory,
            )
            for rank in range(sizes.tp):
                ready = LlmReady(sizes.num_blocks + rank, sizes.num_host_blocks + rank)
                incarnation = self._begin(ActorName(f"llm:{rank}"), epoch, ready)
                incarnation.receive = lambda message, rank=rank: llm.receive(rank, message)  # type: ignore[misc]
            return
        if kind == "edge":
            self._begin(name, epoch, EdgeReady())
        elif kind == "media":
            incarnation = self._begin(name, epoch, MediaReady(sizes.arena_bytes))
            self.medias[name, epoch] = FakeMedia(name, epoch, sizes.arena_bytes, incarnation.outbox.append)
        else:
            slab = HostSlabExport(f"slab/{name}/{epoch}", sizes.num_pages, PAGE_ROWS, 8, "float32")
            incarnation = self._begin(name, epoch, VitReady(slab, sizes.num_host_pages))
            self.vits[name, epoch] = FakeVit(
                name,
                epoch,
                sizes.num_pages,
                sizes.num_host_pages,
                PAGE_ROWS,
                incarnation.outbox.append,
                self._pixels_of,
                lambda: self.rng.random() < sizes.no_restore,
            )

    def _begin(self, name: ActorName, epoch: Epoch, capabilities: Capabilities) -> Incarnation:
        incarnation = self.incarnations[name, epoch] = Incarnation(name, epoch)
        self.alive[name] = self.last_epoch[name] = epoch
        self.news.append(PeerUp(name, epoch, "ipc:///nowhere", capabilities))
        if isinstance(capabilities, MediaReady):
            self._tell_edges(name, epoch, True)
        elif isinstance(capabilities, EdgeReady):
            incarnation.media = {name: epoch for name, epoch in self.alive.items() if name.startswith("media")}
        return incarnation

    def _tell_edges(self, media: ActorName, epoch: Epoch, is_alive: bool) -> None:
        for (name, _), incarnation in self.incarnations.items():
            if name.startswith("edge"):
                incarnation.media_news.append((media, epoch, is_alive))

    def kill(self, name: ActorName) -> None:
        if name not in self.alive:
            return
        kind = name.partition(":")[0]
        self.num_deaths[kind] += 1
        names = [ActorName(f"llm:{rank}") for rank in range(self.sizes.tp)] if kind == "llm" else [name]
        for each in names:
            epoch = self.alive.pop(each)
            self.incarnations[each, epoch].is_alive = False
            self.news.append(PeerDown(each, epoch))
        if kind == "media":
            self._tell_edges(name, epoch, False)
        if kind == "edge":
            for request_id, edge in self.edge_of.items():
                if edge == (name, epoch):
                    self.clients[request_id].is_open = False

    def _pixels_of(self, ref: ArenaRef) -> MmHash | None:
        if self.alive.get(ref.arena) != ref.epoch:
            return None
        return self.medias[ref.arena, ref.epoch].pixels[ref]  # a KeyError: freed before its encode was answered

    # ------------------------------------------------------------ the scheduler

    def post(self, sends: list[Send]) -> None:
        check_invariants(self.state)
        batched: set[ActorName] = set()
        for peer, message in sends:
            if isinstance(message, StepPlan):
                assert len(message.loads) <= self.sizes.max_loads
            if isinstance(message, TokenBatch):
                assert peer not in batched, "one TokenBatch per edge and event"
                batched.add(peer)
            incarnation = self.incarnations.get((peer, self.known.get(peer, Epoch(0))))
            if incarnation is not None and incarnation.is_alive:
                incarnation.inbox.append(message)

    def deliver_news(self) -> None:
        peer = self.news.popleft()
        if isinstance(peer, PeerUp):
            self.known[peer.actor] = peer.epoch
            sends = self.state.on_peer_up(peer, self.now_s)
        else:
            if self.known.get(peer.actor) == peer.epoch:
                del self.known[peer.actor]
            sends = self.state.on_peer_down(peer, self.now_s)
        self.advance_is_due = True
        self.post(sends)

    def deliver_to_scheduler(self, incarnation: Incarnation) -> None:
        message = incarnation.outbox.popleft()
        if self.known.get(incarnation.name) == incarnation.epoch:
            self.post(self.state.on_event(incarnation.name, message, self.now_s))  # type: ignore[arg-type]
            self.advance_is_due = True

    def advance(self) -> None:
        self.advance_is_due = False
        self.now_s += 0.001
        self.post(self.state.advance(self.now_s))

    def reset_a_cache(self) -> None:
        state = self.state
        reset = self.rng.choice((state.reset_prefix_cache, state.reset_embedding_cache))
        self.post(reset(self.now_s))

    # ------------------------------------------------------------ edges

    def submit(self, submit: Submit, edge: ActorName) -> None:
        if edge in self.alive:
            client = self.clients[submit.request_id] = Client(submit)
            self.edge_of[submit.request_id] = (edge, self.alive[edge])
            outbox = self.incarnations[edge, self.alive[edge]].outbox
            named = tuple(dict.fromkeys(item.uuid for item in submit.media if not item.has_bytes))
            if named:
                self.num_lookups += 1
                client.lookup_id = self.num_lookups
                outbox.append(LookUpMedia(client.lookup_id, submit.cache_salt, named))
            else:
                outbox.append(submit)

    def abort(self, request_id: RequestId) -> None:
        client = self.clients[request_id]
        if client.is_open:
            client.is_open = False
            is_submitted = client.lookup_id in (0, client.submit.lookup_id)
            message = Abort(request_id) if is_submitted else ForgetLookUp(client.lookup_id)
            self.incarnations[self.edge_of[request_id]].outbox.append(message)

    def _submit_found(self, outbox: deque[Message], found: MediaFound) -> None:
        """The request whose lookup this answers: what is not known by name is sent."""
        client = next(client for client in self.clients.values() if client.lookup_id == found.lookup_id)
        if not client.is_open:
            return
        named = dict.fromkeys(item.uuid for item in client.submit.media if not item.has_bytes)
        known = dict(zip(named, found.items, strict=True))
        media = []
        for item in client.submit.media:
            answer = known.get(item.uuid)
            if answer is None:
                media.append(msgspec.structs.replace(item, has_bytes=True))
            else:
                assert (answer.mm_hash, answer.num_tokens, answer.grid_thw) == (
                    item.mm_hash,
                    item.num_tokens,
                    item.grid_thw,
                )
                media.append(item)
                self.num_named += not item.has_bytes
        client.submit = msgspec.structs.replace(client.submit, media=tuple(media), lookup_id=found.lookup_id)
        outbox.append(client.submit)

    def _edge_receives(self, incarnation: Incarnation, message: Message) -> None:
        if isinstance(message, NeedMedia):
            client = self.clients[message.request_id]
            if not client.is_open:
                return
            epoch = message.epoch
            if incarnation.media.get(message.media) != epoch:
                incarnation.outbox.append(MediaUnsent(message.request_id, message.mm_hash))
            else:
                sent = [item for item in client.submit.media if item.has_bytes]
                item = next(item for item in sent if item.mm_hash == message.mm_hash)
                size = (item.grid_thw[1], item.grid_thw[2])
                decode: Message = Decode(item.mm_hash, b"", size, size, Epoch(1))
                if item.mm_hash.startswith("clip"):
                    decode = DecodeFrames(b"", size, size, (FrameGroup(item.mm_hash, (0, 1)),), Epoch(1))
                self.incarnations[message.media, epoch].inbox.append(decode)
            return
        if isinstance(message, MediaFound):
            self._submit_found(incarnation.outbox, message)
            return
        assert isinstance(message, TokenBatch)
        for output in message.outputs:
            assert self.edge_of[output.request_id] == (incarnation.name, incarnation.epoch)
            client = self.clients[output.request_id]
            if not client.is_open:
                continue  # aborted meanwhile; a second end is noticed by _check_client
            client.token_ids += output.token_ids
            client.logprobs += output.logprobs
            assert output.usage.num_output_tokens == len(client.token_ids)
            assert output.usage.num_prompt_tokens == len(client.submit.prompt_token_ids)
            client.num_cached_tokens = output.usage.num_cached_tokens
            if output.finish_reason is not None or output.error is not None:
                client.is_open = False
                client.finish_reason = output.finish_reason
                client.error = None if output.error is None else output.error.code
                self._check_client(client)
            else:
                assert output.token_ids

    def _check_client(self, client: Client) -> None:
        """Its tokens are those it would have got alone, each with its log-probability, and errors have a cause."""
        sizes, submit = self.sizes, client.submit
        wanted = client.token_ids if submit.sampling.num_logprobs >= 0 else []
        assert client.logprobs == [fake_logprobs(token_id, at) for at, token_id in enumerate(wanted)]
        num_prompt_tokens = len(submit.prompt_token_ids)
        room = min(sizes.max_model_len, sizes.num_blocks * sizes.block_size) - num_prompt_tokens
        expected, reason = tokens_alone(submit, max(1, min(submit.stop.max_tokens, room)))
        if client.error is None:
            assert (client.token_ids, client.finish_reason) == (expected, reason)
            assert client.num_cached_tokens % sizes.block_size == 0
            assert client.num_cached_tokens < num_prompt_tokens
            assert sizes.prefix_caching or client.num_cached_tokens == 0
            return
        assert client.token_ids == expected[: len(client.token_ids)]
        causes = {
            "too_many_requests": True,
            "context_length_exceeded": room < 1,
            "bad_image": any(item.mm_hash.startswith("bad") for item in submit.media),
            "image_too_large": any(
                item.num_tokens > min(sizes.num_pages * PAGE_ROWS, sizes.arena_bytes // BYTES_PER_PATCH)
                for item in submit.media
            ),
            "out_of_memory": sizes.no_memory > 0,
            "media_not_cached": any(not item.has_bytes for item in submit.media),
            "no_pixels": self.num_deaths["media"] >= 2,
            **{code: self.num_deaths[kind] >= 2 for kind, code in FATAL_CODES.items()},
        }
        assert causes.get(client.error), f"{submit.request_id} failed with {client.error}"

    # ------------------------------------------------------------ what may happen next

    def choices(self) -> list[Callable[[], object]]:
        """Everything that could happen now without anybody dying or asking for anything new."""
        choices: list[Callable[[], object]] = []
        if self.news:
            choices.append(self.deliver_news)
        if self.advance_is_due:
            choices.append(self.advance)
        for (name, epoch), incarnation in self.incarnations.items():
            announced = self.known.get(name, Epoch(0))
            if incarnation.outbox and (incarnation.is_alive <= (announced == epoch)):
                choices.append(lambda one=incarnation: self.deliver_to_scheduler(one))  # type: ignore[misc]
            if incarnation.inbox and incarnation.is_alive:
                choices.append(lambda one=incarnation: self._deliver(one))  # type: ignore[misc]
            if incarnation.media_news and incarnation.is_alive:
                choices.append(incarnation.hear)
        for key, media in self.medias.items():
            if media.queue and self.incarnations[key].is_alive:
                choices.append(media.work)
        for key, vit in self.vits.items():
            if vit.queue and self.incarnations[key].is_alive:
                choices.append(lambda vit=vit: vit.work(self.rng.randrange(len(vit.queue))))  # type: ignore[misc]
        llm = self.llms.get(self.alive.get(ActorName("llm:0"), Epoch(0)))
        if llm is not None and any(llm.queues):
            choices.append(llm.work)
        return choices

    def _deliver(self, incarnation: Incarnation) -> None:
        message = incarnation.inbox.popleft()
        kind, key = incarnation.name.partition(":")[0], (incarnation.name, incarnation.epoch)
        if kind == "edge":
            self._edge_receives(incarnation, message)
        elif kind == "media":
            self.medias[key].receive(message)
        elif kind == "vit":
            self.vits[key].receive(message)
        else:
            incarnation.receive(message)

    def step(self) -> bool:
        """Let one drawn thing happen.  False if nothing got on."""
        choices = self.choices()
        self.rng.shuffle(choices)
        return any(choice() is not False for choice in choices)

    def drain(self) -> None:
        """Everybody lives and nothing new comes: every request must end, and nothing stay behind."""
        for name in self.names():
            self.revive(name)
        for _ in range(200):
            while self.step():
                pass
            if self.state.wake_at_s is None:
                break
            self.now_s = max(self.now_s, self.state.wake_at_s)
            self.advance()
        still_open = [client.submit.request_id for client in self.clients.values() if client.is_open]
        assert not still_open, f"{still_open} never end; the scheduler has {list(self.state.requests)}"
        check_nothing_is_held(self.state)
        for key, media in self.medias.items():
            if self.incarnations[key].is_alive:
                assert not media.pixels, "pixels nobody frees"

    # ------------------------------------------------------------ random requests

    def random_submit(self) -> Submit:
        """Few beginnings, few images and second turns, so that caches hit; now and then something impossible."""
        rng, sizes = self.request_rng, self.sizes
        salt = rng.choice(("", "", "tenant"))
        token_ids, media = self._beginning(random.Random(rng.randrange(3)), rng.randrange(4))
        if self.submits and rng.random() < 0.3:
            first = rng.choice(self.submits)
            if len(first.prompt_token_ids) < sizes.max_model_len // 2:
                answer, _ = tokens_alone(first, min(first.stop.max_tokens, 12))
                token_ids = [*first.prompt_token_ids, *answer]
                media, salt = list(first.media), first.cache_salt
        token_ids += [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(0 if token_ids else 1, 9))]
        if rng.random() < 0.02:
            token_ids += [2] * sizes.max_model_len
        submit = Submit(
            RequestId(f"r{len(self.submits)}"),
            tuple(token_ids),
            tuple(self._named(item) for item in media),
            0,
            Sampling(seed=(seed := rng.randrange(2)), num_logprobs=seed - 1),
            stop_rule(rng.choice((1, 2, 5, 12, 30, 100)), rng.choice((0, 0, 3, 8))),
            cache_salt=salt,
            priority=rng.choice((0, 0, 0, 1)),
        )
        self.submits.append(submit)
        return submit

    def _named(self, item: MediaItem) -> MediaItem:
        """Given a name, or called by it."""
        if item.mm_hash.startswith("clip"):
            return item
        draw = self.name_rng.random()
        has_name, has_bytes = draw < 0.8, draw >= self.sizes.by_name
        return msgspec.structs.replace(item, uuid=f"u-{item.mm_hash}" if has_name else "", has_bytes=has_bytes)

    def _beginning(self, story: random.Random, num_parts: int) -> tuple[list[int], list[MediaItem]]:
        """The first parts of one of a few stories; a picture may be another one."""
        token_ids: list[int] = []
        media: list[MediaItem] = []
        for _ in range(num_parts):
            token_ids += [story.randrange(1, VOCABULARY) for _ in range(story.randrange(1, 9))]
            has_image, draw, index = story.random() < 0.6, story.random(), story.randrange(6)
            if self.request_rng.random() < 0.2:
                draw, index = self.request_rng.random(), self.request_rng.randrange(6)
            if has_image and self.sizes.clips and self.request_rng.random() < self.sizes.clips:
                groups = clip_items(f"clip{index}", len(token_ids), 1 + index % 3)
                media += groups
                token_ids += [IMAGE_TOKEN] * sum(item.num_tokens for item in groups)
            elif has_image:
                mm_hash, grid_thw = self._image(draw, index)
                media.append(MediaItem(mm_hash, len(token_ids), num_rows_of(grid_thw), grid_thw))
                token_ids += [IMAGE_TOKEN] * num_rows_of(grid_thw)
        return token_ids, media

    def _image(self, draw: float, index: int) -> tuple[MmHash, tuple[int, int, int]]:
        if draw < 0.02:
            return MmHash("bad0"), (1, 2, 3)
        if draw < 0.03:
            return MmHash("huge"), (1, 1, self.sizes.num_pages * PAGE_ROWS + 1)
        return MmHash(f"image{index}"), ((1, 1, 1), (1, 2, 2), (1, 1, 3), (1, 3, 3), (1, 2, 4), (1, 2, 7))[index]


def clip_items(name: str, start: int, num_groups: int) -> list[MediaItem]:
    """The groups of a clip, each of 2 rows."""
    grid_thw = (1, 1, 2)
    num_rows = num_rows_of(grid_thw)
    return [
        MediaItem(
            MmHash(f"{name}.{group}"),
            start + group * num_rows,
            num_rows,
            grid_thw,
            time_offset=group,
            continues=group > 0,
        )
        for group in range(num_groups)
    ]


def run_world(sizes: Sizes, seed: int, num_requests: int, *, deaths: bool = True, aborts: bool = True) -> World:
    """Random requests, aborts, deaths and message orders; then peace, in which everything must come to its end."""
    world = World(sizes, seed)
    rng = world.rng
    while len(world.submits) < num_requests:
        draw = rng.random()
        if draw < 0.03:
            world.submit(world.random_submit(), ActorName(f"edge:{rng.randrange(sizes.num_edges)}"))
        elif aborts and draw < 0.033 and world.clients:
            world.abort(rng.choice(list(world.clients)))
        elif deaths and draw < 0.037:
            world.kill(rng.choice(world.names()))
        elif draw < 0.05:
            world.revive(rng.choice(world.names()))
        elif draw < 0.051:
            world.reset_a_cache()
        else:
            world.step()
        world.now_s += 0.0005
    world.drain()
    return world

"""Life cycle of every request: events in, sends out.  No I/O, no clock, no torch.

Events change the books and start media work at once; `advance` plans steps.  Whatever happens, an accepted request gets
exactly one terminal TokenOutput unless its edge aborts it, and gives back its blocks, slot, rows and pixels at its end.
"""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple, assert_never

from vlmrt.actors.scheduler.block_pool import BlockPool
from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.embed_cache import EmbedCache, Slab
from vlmrt.actors.scheduler.host_blocks import HostBlocks
from vlmrt.actors.scheduler.llm_group import LlmGroup
from vlmrt.actors.scheduler.media_aliases import LookUps, MediaAliases
from vlmrt.actors.scheduler.media_work import MediaWork
from vlmrt.actors.scheduler.pacing import Pacing
from vlmrt.actors.scheduler.policy import Limits, Planner, Step
from vlmrt.actors.scheduler.prefix_cache import PrefixCache, extend_block_hashes
from vlmrt.actors.scheduler.request import Request, Status
from vlmrt.actors.scheduler.request_trace import RequestTrace
from vlmrt.runtime.config import Config
from vlmrt.runtime.control_messages import EdgeReady, LlmReady, MediaReady, PeerDown, PeerUp, SchedulerReady, VitReady
from vlmrt.runtime.errors import RequestError, WireError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    AttachSlab,
    CacheReset,
    DecodeFailed,
    DetachSlab,
    EmbedsReady,
    EncodeFailed,
    Epoch,
    FinishReason,
    ForgetLookUp,
    LookUpMedia,
    MediaFound,
    MediaUnsent,
    Message,
    PixelsReady,
    RequestId,
    ResetCache,
    SchedulerInbox,
    StepResult,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
    Usage,
)

_ROW_ERRORS = {  # by FailedRow.reason
    "out_of_memory": WireError(
        503,
        "the GPU has no memory left for a step of this request; lower --max-num-batched-tokens or "
        "--gpu-memory-fraction",
        "out_of_memory",
    ),
    "grammar": WireError(
        400,
        "the response_format or tools of this request came to a state with no possible next token; simplify the "
        "schema, pattern or grammar, or leave out what contradicts it, such as a logit_bias",
        "grammar_error",
    ),
}


class Send(NamedTuple):
    peer: ActorName
    message: Message


class State:
    """The scheduler's whole state.  Every method returns what to send, in order."""

    def __init__(self, config: Config) -> None:
        scheduling = config.scheduling
        self.limits = Limits(
            max_num_seqs=scheduling.max_num_seqs,
            max_waiting=scheduling.max_waiting,
            max_num_batched_tokens=scheduling.max_num_batched_tokens,
            max_model_len=config.model.max_model_len,
            block_size=scheduling.block_size,
        )
        self.prefix_caching = scheduling.prefix_caching
        self.counters = Counters()
        self.requests: dict[RequestId, Request] = {}
        self.edges: dict[ActorName, Epoch] = {}
        self.llm = LlmGroup(config.parallel.tp)
        self.embeds = EmbedCache(enabled=scheduling.embedding_caching)
        self.media = MediaWork(self.embeds, self._send, self._request_of, self.counters)
        self.aliases = MediaAliases()
        self.lookups = LookUps()
        self.planner = Planner(
            self.limits,
            self._empty_kv(0, 0),
            self.embeds,
            self.media.want,
            self.counters,
            Pacing(scheduling.itl_target_ms, scheduling.block_size),
        )
        self._now_s = 0.0  # of the event that is being applied
        self._num_arrivals = 0
        self._sends: list[Send] = []
        self._outputs: dict[ActorName, list[TokenOutput]] = {}

    # ------------------------------------------------------------ what comes in

    def on_event(self, sender: ActorName, message: SchedulerInbox, now_s: float) -> list[Send]:
        self._now_s = now_s
        match message:
            case StepResult():
                self._on_step_result(sender, message)
            case Submit():
                self._on_submit(sender, message)
            case LookUpMedia():
                self._on_lookup(sender, message)
            case ForgetLookUp():
                self.media.let_go(self.lookups.end(sender, message.lookup_id))
            case ResetCache():
                reset = self.reset_prefix_cache if message.kind == "prefix" else self.reset_embedding_cache
                return [*reset(now_s), Send(sender, CacheReset(message.reset_id))]
            case Abort():
                self._on_abort(sender, message)
            case EmbedsReady():
                self._on_embeds_ready(sender, message)
            case PixelsReady():
                self.media.on_pixels(sender, message)
            case MediaUnsent():
                self.media.on_unsent(message.mm_hash, message.request_id, now_s)
            case DecodeFailed():
                self.media.on_decode_failed(message.mm_hash, sender, message.error)
            case EncodeFailed():
                self.media.on_encode_failed(sender, message.encode_id, message.error)
            case _:
                assert_never(message)
        return self._settle(now_s)

    def on_peer_up(self, peer: PeerUp, now_s: float) -> list[Send]:
        """A new incarnation; one of the same name that is still in the books is gone."""
        self._now_s = now_s
        name, capabilities = peer.actor, peer.capabilities
        known = self._epoch_of(name)
        if known is not None:
            self._forget_peer(name, known)
        match capabilities:
            case MediaReady():
                self.media.add_worker(name, peer.epoch, capabilities.arena_bytes)
            case VitReady():
                self.embeds.add_slab(name, peer.epoch, capabilities.slab, capabilities.num_host_pages)
                if self.llm.is_up:
                    self._attach(self.embeds.slabs[name])
            case LlmReady():
                if self.llm.rank_up(name, peer.epoch, capabilities):
                    self._on_llm_up()
            case EdgeReady():
                self.edges[name] = peer.epoch
            case SchedulerReady():
                pass
        return self._settle(now_s)

    def on_peer_down(self, peer: PeerDown, now_s: float) -> list[Send]:
        self._now_s = now_s
        if self._epoch_of(peer.actor) == peer.epoch:
            self._forget_peer(peer.actor, peer.epoch)
        return self._settle(now_s)

    def advance(self, now_s: float) -> list[Send]:
        """Plan as many steps as may be in flight and have something to run."""
        self._now_s = now_s
        while self.llm.has_room and self.requests:
            step = self.planner.plan(self.llm.next_step)
            if step is None:
                break
            self.llm.next_step += 1
            self.llm.in_flight.append(step)
            self.embeds.lend(self.llm.epoch, step.plan.step, step.entries)
            self.counters.steps += 1
            self._trace_step(step)
            for rank in self.llm.names:
                self._send(rank, step.plan)
        return self._settle(now_s)

    @property
    def wake_at_s(self) -> float | None:
        """When to call advance although nothing has come in; None: not needed."""
        return self.media.wake_at_s

    def reset_prefix_cache(self, now_s: float) -> list[Send]:
        """Forget the keys and values of all tokens, on the GPU and in host memory, that no request is using."""
        self.planner.kv.reset()
        return self._settle(now_s)

    def reset_embedding_cache(self, now_s: float) -> list[Send]:
        """Forget the rows of all images that no request is using, in both tiers, and the names given to images."""
        self.embeds.reset()
        self.aliases.clear()
        return self._settle(now_s)

    def give_up_edge(self, edge: ActorName, now_s: float) -> list[Send]:
        """An edge is behind with news of its requests: end them."""
        self._now_s = now_s
        error = WireError(503, "the server was too busy to deliver the answer; try again", "edge_busy", None, 1)
        for request in [request for request in self.requests.values() if request.edge == edge]:
            self._fail(request, error)
        return self._settle(now_s)

    # ------------------------------------------------------------ figures

    def totals(self) -> dict[str, int]:
        """Counters by the names of the metrics."""
        counters = self.counters
        return {
            "prefix_cache_queries_total": counters.prompt_tokens if self.prefix_caching else 0,
            "prefix_cache_hits_total": counters.prompt_tokens_cached,
            "prefix_cache_evictions_total": counters.block_evictions,
            "prefix_cache_host_hits_total": counters.prompt_tokens_host_cached,
            "prefix_cache_host_evictions_total": counters.host_block_evictions,
            "embedding_cache_queries_total": counters.embed_hits + counters.embed_host_hits + counters.embed_misses,
            "embedding_cache_hits_total": counters.embed_hits,
            "embedding_cache_evictions_total": self.embeds.num_evictions,
            "embedding_cache_host_hits_total": counters.embed_host_hits,
            "embedding_cache_host_evictions_total": self.embeds.num_host_evictions,
            "media_lookups_total": counters.media_lookups,
            "media_lookup_hits_total": counters.media_lookup_hits,
            "preemptions_total": counters.preemptions,
            "recomputations_total": counters.recoveries,
            "prompt_tokens_total": counters.prompt_tokens,
            "generation_tokens_total": counters.output_tokens,
        }

    def gauges(self) -> dict[str, float]:
        kv, block_bytes = self.planner.kv, self.llm.block_bytes
        pool = kv.pool
        slabs = self.embeds.slabs.values()
        books = [slab.books for slab in slabs]
        num_pages = sum(book.num_pages for book in books)
        return {
            "requests_running": len(self.planner.running),
            "requests_waiting": len(self.planner.waiting),
            "kv_cache_usage_ratio": 1 - pool.num_free / pool.num_blocks if pool.num_blocks else 0.0,
            "prefix_cache_bytes": len(kv) * block_bytes,
            "prefix_cache_host_bytes": len(kv.host) * block_bytes,
            "embedding_cache_usage_ratio": 1 - sum(book.num_free for book in books) / num_pages if num_pages else 0.0,
            "embedding_cache_bytes": sum(slab.num_ready_pages * slab.page_bytes for slab in slabs),
            "embedding_cache_host_bytes": sum(slab.host.num_copy_pages * slab.page_bytes for slab in slabs),
            "media_aliases": len(self.aliases),
        }

    # ------------------------------------------------------------ what goes out

    def _send(self, peer: ActorName, message: Message) -> None:
        self._sends.append(Send(peer, message))

    def _request_of(self, request_id: RequestId) -> Request:
        return self.requests[request_id]

    def _settle(self, now_s: float) -> list[Send]:
        """Let media work go on, end the requests it failed, and hand out everything there is to send."""
        self.media.pump(now_s)
        while self.media.failures:
            request_ids, error = self.media.failures.pop()
            for request_id in request_ids:
                if request_id in self.requests:
                    self._fail(self.requests[request_id], error)
            self.media.pump(now_s)
        for edge, outputs in self._outputs.items():
            self._send(edge, TokenBatch(tuple(outputs)))
        self._outputs = {}
        sends, self._sends = self._sends, []
        return sends

    def _put_output(self, edge: ActorName, output: TokenOutput) -> None:
        outputs = self._outputs.get(edge)
        if outputs is None:
            outputs = self._outputs[edge] = []
        outputs.append(output)

    # ------------------------------------------------------------ a request begins

    def _on_lookup(self, edge: ActorName, lookup: LookUpMedia) -> None:
        """Answer with what can be had without its bytes; its rows stay until the lookup ends."""
        items = [self.aliases.find(lookup.cache_salt, uuid) for uuid in lookup.uuids]
        items = [item if item is not None and self.media.is_known(item.mm_hash) else None for item in items]
        found = tuple(item.mm_hash for item in items if item is not None)
        if self.lookups.begin(edge, lookup.lookup_id, found):
            for mm_hash in found:
                self.embeds.hold(mm_hash)
        else:
            items = [None] * len(items)
        self.counters.media_lookups += len(items)
        self.counters.media_lookup_hits += sum(item is not None for item in items)
        self._send(edge, MediaFound(lookup.lookup_id, tuple(items)))

    def _on_submit(self, edge: ActorName, submit: Submit) -> None:
        self._begin(edge, submit)
        self.media.let_go(self.lookups.end(edge, submit.lookup_id))  # its request reads and holds the rows by now

    def _begin(self, edge: ActorName, submit: Submit) -> None:
        try:
            request = self._make_request(edge, submit)
        except RequestError as error:
            self.counters.requests_refused += 1
            usage = Usage(len(submit.prompt_token_ids), 0, 0)
            self._put_output(edge, TokenOutput(submit.request_id, (), usage, error=error.to_wire()))
            return
        self.counters.requests += 1
        for item in submit.media:
            if item.uuid and item.has_bytes:
                self.aliases.register(submit.cache_salt, item)
        self.requests[request.request_id] = request
        self.planner.enqueue(request)
        self.media.hold(request)
        self.planner.kv.touch(self.planner.look_up(request))

    def _make_request(self, edge: ActorName, submit: Submit) -> Request:
        """Raises: RequestError if it is refused."""
        num_open, max_open = len(self.requests), self.limits.max_num_seqs + self.limits.max_waiting
        if submit.request_id in self.requests:
            raise RequestError(
                f"request_id {submit.request_id} is in use", param="request_id", code="duplicate_request"
            )
        if num_open >= max_open:
            message = f"{num_open} requests are running or waiting, and {max_open} is the limit; try again later"
            raise RequestError(message, status=429, code="too_many_requests", retry_after_s=1)
        num_tokens = len(submit.prompt_token_ids)
        if num_tokens == 0:
            raise RequestError("the prompt has no tokens; it needs at least 1", param="messages", code="empty_prompt")
        end = 0
        for item in submit.media:
            if item.start < end or item.num_tokens < 1 or item.start + item.num_tokens > num_tokens:
                message = f"media tokens {item.start}..{item.start + item.num_tokens} do not lie in order in the prompt"
                raise RequestError(message, param="messages", code="bad_media_span")
            if item.time_offset < 0 or (item.continues and not (0 < end == item.start)):
                message = f"media tokens from {item.start} on do not go on with a clip right before them"
                raise RequestError(message, param="messages", code="bad_media_span")
            end = item.start + item.num_tokens
        self._num_arrivals += 1
        request = Request(
            request_id=submit.request_id,
            edge=edge,
            key=(submit.priority, self._num_arrivals),
            token_ids=list(submit.prompt_token_ids),
            num_prompt_tokens=num_tokens,
            media=submit.media,
            rope_delta=submit.rope_delta,
            sampling=submit.sampling,
            stop=submit.stop,
            cache_salt=submit.cache_salt,
            max_tokens=max(1, submit.stop.max_tokens),
            trace=RequestTrace(self._now_s),
        )
        self._fit(request)
        try:
            self._extend_hashes(request)
        except OverflowError as error:
            raise RequestError(f"a token id of the prompt is out of range: {error}", param="messages") from error
        return request

    def _fit(self, request: Request) -> None:
        """Cap max_tokens so that the request fits even alone.  Raises: RequestError if not even one token would."""
        room, what = self.limits.max_model_len, "the model's maximum length"
        num_kv_tokens = self.planner.kv.pool.num_blocks * self.limits.block_size
        if self.llm.is_up and num_kv_tokens < room:
            room, what = num_kv_tokens, "the KV cache"
        if len(request.token_ids) + 1 > room:
            raise RequestError(
                f"the prompt has {len(request.token_ids)} tokens and at least 1 more is to come; {what} holds {room}",
                code="context_length_exceeded",
                param="messages",
            )
        request.max_tokens = min(request.max_tokens, room - request.num_prompt_tokens)

    def _extend_hashes(self, request: Request) -> None:
        if self.prefix_caching:
            extend_block_hashes(
                request.block_hashes, request.token_ids, request.media, request.cache_salt, self.limits.block_size
            )

    # ------------------------------------------------------------ a request gets on

    def _on_embeds_ready(self, vit: ActorName, message: EmbedsReady) -> None:
        arrived = self.media.on_embeds_ready(vit, message)
        if arrived is None:
            return
        for request_id in arrived.readers:
            request = self.requests[request_id]
            request.awaits_media = False
            file = request.clips.get(arrived.mm_hash, arrived.mm_hash)
            request.trace.on_media(arrived.mm_hash, file, arrived.spans, self._now_s)

    def _trace_step(self, step: Step) -> None:
        """For requests that have no token yet, a step is news."""
        for load in step.loads:
            load.request.trace.on_planned(self._now_s)
        for row in step.rows[step.num_decode_rows :]:
            request, trace = row.request, row.request.trace
            trace.on_planned(self._now_s)
            if trace.has_unread:
                for item in request.media:
                    if item.start >= request.num_planned_tokens:
                        break
                    trace.on_read(item.mm_hash, self._now_s)

    def _on_step_result(self, sender: ActorName, result: StepResult) -> None:
        in_flight = self.llm.in_flight
        if sender != self.llm.names[0] or not in_flight or in_flight[0].plan.step != result.step:
            self.counters.ignored_messages += 1
            return
        step = in_flight.popleft()
        failed = {failure.row: failure.reason for failure in result.failed}
        num_samples = sum(row.sample for index, row in enumerate(step.rows) if index not in failed)
        if len(result.token_ids) != num_samples:
            raise ValueError(f"step {result.step} samples {num_samples} tokens, its result has {len(result.token_ids)}")
        if len(result.logprobs) not in (0, num_samples):
            raise ValueError(
                f"step {result.step} has {num_samples} tokens, and {len(result.logprobs)} log-probabilities"
            )
        self.embeds.end_step(self.llm.epoch, result.step)
        if not failed and not step.loads:  # what loads take is neither decoding nor prefill
            self.planner.pacing.observe(step.num_decode_rows, step.num_prefill_tokens, result.duration_ms)
        for load in step.loads:
            self.planner.kv.host.unpin(load.host_block_ids)
            if load.is_current:
                self._on_tokens(load.request, len(load.host_block_ids) * self.limits.block_size)
        tokens = zip(result.token_ids, result.logprobs or repeat(None), strict=False)
        for index, row in enumerate(step.rows):
            if index in failed:
                if row.is_current:
                    self._fail(row.request, _ROW_ERRORS[failed[index]])
                continue
            token_id, logprobs = next(tokens) if row.sample else (None, None)
            if row.is_current:
                self._on_row(row.request, row.num_tokens, token_id, logprobs)
            elif row.sample:
                self.counters.discarded_tokens += 1

    def _on_row(self, request: Request, num_tokens: int, token_id: int | None, logprobs: TokenLogprobs | None) -> None:
        """A row of a request that is still in the run it was planned for."""
        self._on_tokens(request, num_tokens)
        if token_id is None:
            return
        request.num_pending_samples -= 1
        request.token_ids.append(token_id)
        self.counters.output_tokens += 1
        num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
        found = () if logprobs is None else (logprobs,)
        if token_id in request.stop.stop_token_ids and num_output_tokens >= request.stop.min_tokens:
            self._finish(request, "stop", (token_id,), found)
        elif num_output_tokens >= request.max_tokens:
            self._finish(request, "length", (token_id,), found)
        else:
            usage = Usage(request.num_prompt_tokens, request.num_cached_tokens or 0, num_output_tokens)
            if num_output_tokens > 1:
                output = TokenOutput(request.request_id, (token_id,), usage, logprobs=found)
            else:
                request.trace.on_first_token(self._now_s)
                spans = request.trace.take()
                output = TokenOutput(request.request_id, (token_id,), usage, logprobs=found, spans=spans)
            self._put_output(request.edge, output)

    def _on_tokens(self, request: Request, num_tokens: int) -> None:
        """The keys and values of its next tokens are there: computed, or loaded."""
        num_computed_tokens = request.num_computed_tokens = request.num_computed_tokens + num_tokens
        if num_computed_tokens // self.limits.block_size > request.num_inserted_blocks:
            self._insert_blocks(request)
        if num_computed_tokens - num_tokens < request.media_end:
            self._consume_media(request)

    def _insert_blocks(self, request: Request) -> None:
        """Offer newly full blocks to the prefix cache: all their tokens are confirmed and computed."""
        first, last = request.num_inserted_blocks, request.num_computed_tokens // self.limits.block_size
        request.num_inserted_blocks = last
        if self.prefix_caching:
            self._extend_hashes(request)
            for block in range(first, last):
                self.planner.kv.insert(request.block_hashes[block], request.block_ids[block])

    def _consume_media(self, request: Request) -> None:
        """Let go of the rows that the KV cache has taken in."""
        before = request.num_consumed_items
        while request.num_consumed_items < len(request.media):
            item = request.media[request.num_consumed_items]
            if item.start + item.num_tokens > request.num_computed_tokens:
                break
            request.num_consumed_items += 1
        if request.num_consumed_items > before:
            self.media.want(request, request.num_covered_tokens)

    # ------------------------------------------------------------ a request ends

    def _end(self, request: Request) -> None:
        del self.requests[request.request_id]
        self.planner.end(request)
        self.media.want_nothing(request)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        if reason == "stop":
            self.counters.requests_stopped += 1
        else:
            self.counters.requests_cut += 1
        request.trace.on_first_token(self._now_s)  # where it is the last as well
        spans = request.trace.take()
        output = TokenOutput(request.request_id, token_ids, request.usage, reason, logprobs=logprobs, spans=spans)
        self._put_output(request.edge, output)
        self._end(request)

    def _fail(self, request: Request, error: WireError) -> None:
        self.counters.requests_failed += 1
        if not request.num_output_tokens:
            request.trace.on_failed(self._now_s)
        spans = request.trace.take()
        self._put_output(request.edge, TokenOutput(request.request_id, (), request.usage, error=error, spans=spans))
        self._end(request)

    def _on_abort(self, edge: ActorName, abort: Abort) -> None:
        request = self.requests.get(abort.request_id)
        if request is None or request.edge != edge:
            self.counters.ignored_messages += 1
            return
        self.counters.requests_aborted += 1
        self._end(request)

    def _abort_all(self, edge: ActorName) -> None:
        for request in [request for request in self.requests.values() if request.edge == edge]:
            self.counters.requests_aborted += 1
            self._end(request)

    # ------------------------------------------------------------ peers come and go

    def _epoch_of(self, name: ActorName) -> Epoch | None:
        if name in self.edges:
            return self.edges[name]
        if name in self.media.workers:
            return self.media.workers[name].epoch
        if name in self.embeds.slabs:
            return self.embeds.slabs[name].epoch
        return self.llm.epoch_of(name)

    def _forget_peer(self, name: ActorName, epoch: Epoch) -> None:
        if name in self.edges:
            del self.edges[name]
            self.media.let_go(self.lookups.drop_edge(name))
            self._abort_all(name)
        elif name in self.media.workers:
            self.media.drop_worker(name)
        elif name in self.embeds.slabs:
            self.media.drop_vit(name)
            if self.llm.is_up:
                for rank in self.llm.names:
                    self._send(rank, DetachSlab(name, epoch))
        elif self.llm.rank_down(name, epoch):
            self._on_llm_down()

    def _attach(self, slab: Slab) -> None:
        for rank in self.llm.names:
            self._send(rank, AttachSlab(slab.vit, slab.epoch, slab.export))

    def _empty_kv(self, num_blocks: int, num_host_blocks: int) -> PrefixCache:
        host = HostBlocks(num_host_blocks, self.counters)
        return PrefixCache(BlockPool(num_blocks), host, self.counters, enabled=self.prefix_caching)

    def _on_llm_up(self) -> None:
        """Every request begins with an empty KV cache, whose size may be news."""
        self.planner.kv = self._empty_kv(self.llm.num_blocks, self.llm.num_host_blocks)
        for slab in self.embeds.slabs.values():
            self._attach(slab)
        for request in list(self.requests.values()):
            try:
                self._fit(request)
            except RequestError as error:
                if request.num_output_tokens:  # begun on a group with a larger KV cache
                    self._finish(request, "length")
                else:
                    self._fail(request, error.to_wire())

    def _on_llm_down(self) -> None:
        """Rows in the slabs live on; what was computed is lost, once per request without harm."""
        self.embeds.drop_borrower(self.llm.epoch)
        self.llm.in_flight.clear()
        for request in self.planner.forget_kv(self._empty_kv(0, 0)):
            request.num_recoveries += 1
            self.counters.recoveries += 1
            if request.num_recoveries > 1:
                assert request.status is Status.WAITING
                message = "the language model's processes died twice while this request was running"
                self._fail(request, WireError(500, message, "llm_group_died"))

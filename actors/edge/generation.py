"""Prompts -> requests to the scheduler -> news of their choices, as one answer that succeeds or fails whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec
from msgspec import Struct

from vlmrt.actors.edge.choice import Choice, ChoiceRule, Piece
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.identify import SentMedium
from vlmrt.actors.edge.open_requests import RETRY_AFTER_S, OpenRequest
from vlmrt.actors.edge.prompt import Prompt
from vlmrt.actors.edge.responses import ChatUsage, chat_usage
from vlmrt.actors.edge.scheduler_link import SchedulerLink
from vlmrt.actors.edge.timelines import OpenTimeline
from vlmrt.runtime.config import SchedulingOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import ActorName, RequestId, Submit, TokenOutput, Usage
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.timeline import Span

LLM = ActorName("llm:0")


class Generation(Struct, frozen=True):
    """One prompt that the scheduler can run, and what is asked of it."""

    prompt: Prompt
    rule: ChoiceRule  # its sampling is that of the first choice; the others' seeds follow
    num_choices: int = 1
    media: tuple[SentMedium, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    lookup_id: int = 0


class Generator:
    """Runs generations, with the scheduler behind this link."""

    def __init__(
        self, link: SchedulerLink, vocabulary: Vocabulary, scheduling: SchedulingOptions, metrics: Metrics
    ) -> None:
        self._link = link
        self._vocabulary = vocabulary
        self._max_open = scheduling.max_num_seqs + scheduling.max_waiting
        self._metrics = metrics

    @contextmanager
    def run(self, answer_id: str, generations: Sequence[Generation], timeline: OpenTimeline) -> Iterator[Answer]:
        """The answer is under way inside the block; what has not ended when the block does is aborted.

        Raises: RequestError 503 where the scheduler is not up or does not take more; 429 where it has no room for all
        choices, 400 where it never has.
        """
        self.check_room(sum(generation.num_choices for generation in generations))
        with ExitStack() as requests:
            answer = Answer(answer_id, generations, self._link, self._vocabulary, requests, self._metrics, timeline)
            timeline.count = answer.count
            try:
                yield answer
            finally:
                timeline.count = None
                answer.count()

    def check_room(self, num_choices: int) -> None:
        """Refuse what the scheduler would refuse only after some of an answer's requests have begun.

        Raises: RequestError 429, or 400 where waiting would not help.
        """
        if num_choices > self._max_open:
            raise RequestError(
                f"n asks for {num_choices} choices in all, more than the {self._max_open} that the server takes",
                param="n",
                code="invalid_value",
            )
        num_open = self._link.num_open
        if num_choices > 1 and num_open + num_choices > self._max_open:
            raise RequestError(
                f"{num_open} requests are open and {self._max_open} is the limit: no room for {num_choices} choices",
                status=429,
                code="too_many_requests",
                retry_after_s=RETRY_AFTER_S,
            )


class Answer:
    """All choices of all prompts of one request, numbered in that order.

    The first choice of a prompt is submitted at once; the others when its first token has come, so that they find the
    prompt in the prefix cache.
    """

    def __init__(
        self,
        answer_id: str,
        generations: Sequence[Generation],
        link: SchedulerLink,
        vocabulary: Vocabulary,
        requests: ExitStack,
        metrics: Metrics,
        timeline: OpenTimeline,
    ) -> None:
        self.answer_id = answer_id
        self._link = link
        self._vocabulary = vocabulary
        self._requests = requests
        self._metrics = metrics
        self._timeline = timeline
        self._inter_token_latency = metrics.histogram("inter_token_latency_seconds")
        self._news = asyncio.Event()
        self._num_ended = 0
        self._error: RequestError | None = None  # that ends the answer
        self.num_choices = 0
        self._firsts: list[_Run] = []
        self._runs: list[_Run] = []
        timeline.answer_id = answer_id
        timeline.num_media = sum(len(generation.prompt.media) for generation in generations)
        timeline.usage = Usage(sum(len(each.prompt.token_ids) for each in generations), 0, 0)
        for generation in generations:
            metrics.observe("request_params_n", generation.num_choices)
            metrics.observe("request_params_max_tokens", generation.rule.stop.max_tokens)
            first = self._begin(generation, self.num_choices, 0)
            self._firsts.append(first)
            self.num_choices += generation.num_choices

    @property
    def ended(self) -> bool:
        return self._num_ended == self.num_choices

    @property
    def usage(self) -> ChatUsage:
        """So far: every prompt once, the outputs of all choices."""
        prompts = [first.generation.prompt for first in self._firsts]
        return chat_usage(
            self._counts,
            num_image_tokens=sum(prompt.num_image_tokens for prompt in prompts),
            num_video_tokens=sum(prompt.num_video_tokens for prompt in prompts),
        )

    @property
    def time_to_first_token_s(self) -> float | None:
        """Since the request arrived; None before that token."""
        first_s = self._timeline.first_token_s
        return None if first_s is None else first_s - self._timeline.arrived_s

    @property
    def request_ids(self) -> list[RequestId]:
        """At the scheduler, of the choices that have begun."""
        return [run.request.request_id for run in self._runs]

    @property
    def _counts(self) -> Usage:
        return Usage(
            num_prompt_tokens=sum(len(first.generation.prompt.token_ids) for first in self._firsts),
            num_cached_tokens=sum(first.num_cached_tokens for first in self._firsts),
            num_output_tokens=sum(run.choice.num_tokens for run in self._runs),
        )

    def count(self) -> None:
        """The timeline is told what has come of it so far."""
        self._timeline.usage = self._counts
        self._timeline.max_gap_s = max((run.max_gap_s for run in self._runs), default=0.0)

    def elapsed_ms(self) -> int:
        """Since the request arrived."""
        return int((time.monotonic() - self._timeline.arrived_s) * 1000)

    def fail(self, error: RequestError) -> None:
        """End the answer with an error."""
        self._error = self._error or error
        for run in self._runs:
            run.request.fail(error)

    async def news(self) -> list[Piece]:
        """What new tokens of one or more choices let out, which may be nothing yet.

        Raises: RequestError of the first choice that failed.
        """
        while True:
            self._news.clear()
            pieces: list[Piece] = []
            has_news = False
            for run in list(self._runs):
                if not run.choice.ended and (outputs := run.request.take()):
                    has_news = True
                    num_before = run.choice.num_tokens
                    piece = run.take(outputs)
                    self._measure(run, run.choice.num_tokens - num_before)
                    if piece is not None:
                        pieces.append(piece)
                    self._after(run, piece)
            if has_news:
                if self.ended:
                    self._measure_end()
                return pieces
            await self._news.wait()

    def _begin(self, generation: Generation, first_index: int, number: int) -> _Run:
        """Submit choice `number` of a generation."""
        index = first_index + number
        is_last = number == generation.num_choices - 1
        sampling = generation.rule.sampling
        submit = Submit(
            request_id=RequestId(f"{self.answer_id}-{index}" if index else self.answer_id),
            prompt_token_ids=generation.prompt.token_ids,
            media=generation.prompt.media,
            rope_delta=generation.prompt.rope_delta,
            sampling=msgspec.structs.replace(sampling, seed=_wrapped(sampling.seed + number)) if number else sampling,
            stop=generation.rule.stop,
            cache_salt=generation.cache_salt,
            priority=generation.priority,
            lookup_id=generation.lookup_id if is_last else 0,  # until then, what was looked up stays
        )
        record = partial(self._timeline.extend, choice=index) if index else self._timeline.extend
        opened = self._link.submit(submit, generation.media, self._news, record, begun=number > 0)
        request = self._requests.enter_context(opened)
        run = _Run(generation, Choice(index, generation.rule, self._vocabulary), request)
        if not number:
            run.followers = range(1, generation.num_choices)
        self._runs.append(run)
        return run

    def _after(self, run: _Run, piece: Piece | None) -> None:
        """What the first token, or the end, of a choice entails."""
        if piece is not None and piece.finish_reason is not None:
            self._num_ended += 1
            self._link.abort(run.request)  # where a stop string ended it
            self._metrics.add("request_success_total", finished_reason=piece.finish_reason)
            self._conclude(run, piece.finish_reason)
        if run.followers:
            if self._error is not None:
                raise self._error  # these would not hear of it
            followers, run.followers = run.followers, range(0)
            for number in followers:
                self._begin(run.generation, run.choice.index, number)

    def _conclude(self, run: _Run, finish_reason: str) -> None:
        """A choice has ended well; where a stop string ended it, the scheduler does not say what its decoding took."""
        timeline = self._timeline
        timeline.outcome = timeline.outcome or finish_reason
        num_tokens, index = run.choice.num_tokens, run.choice.index
        self._metrics.observe("request_generation_tokens", num_tokens)
        if run.last_token_s > run.first_token_s:
            span = Span("decode", LLM, run.first_token_s, run.last_token_s, f"choice {index}" if index else "")
            timeline.add(span)
            self._metrics.observe("request_time_per_output_token_seconds", span.duration_s / (num_tokens - 1))

    def _measure_end(self) -> None:
        """All choices have ended well."""
        metrics = self._metrics
        metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._timeline.arrived_s)
        metrics.observe("request_prompt_tokens", self._counts.num_prompt_tokens)
        metrics.observe("request_max_num_generation_tokens", max(run.choice.num_tokens for run in self._runs))

    def _measure(self, run: _Run, num_tokens: int) -> None:
        """So many new tokens of a choice have come."""
        if not num_tokens:
            return
        now_s = time.monotonic()
        if run.last_token_s:
            gap_s = now_s - run.last_token_s
            self._inter_token_latency.observe(gap_s / num_tokens)
            if gap_s > run.max_gap_s:
                run.max_gap_s = gap_s
        else:
            run.first_token_s = now_s
            timeline = self._timeline
            if timeline.first_token_s is None:
                timeline.first_token_s = now_s
                self._metrics.observe("time_to_first_token_seconds", now_s - timeline.arrived_s)
        run.last_token_s = now_s


class _Run:
    """One choice and the request that makes it."""

    def __init__(self, generation: Generation, choice: Choice, request: OpenRequest) -> None:
        self.generation = generation
        self.choice = choice
        self.request = request
        self.followers = range(0)  # choices of its prompt that are submitted when its first token has come
        self.num_cached_tokens = 0
        self.first_token_s = 0.0  # of the monotonic clock; 0: none has come
        self.last_token_s = 0.0
        self.max_gap_s = 0.0

    def take(self, outputs: Sequence[TokenOutput]) -> Piece | None:
        self.num_cached_tokens = outputs[-1].usage.num_cached_tokens
        return self.choice.take(outputs)


def _wrapped(seed: int) -> int:
    """As an int64."""
    return (seed + 2**63) % 2**64 - 2**63

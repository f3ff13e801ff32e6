"""The edge process: HTTP in front, the scheduler and the media workers behind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import hdrs, web

import vlmrt
from vlmrt.actors.edge.answer_form import AnswerForms
from vlmrt.actors.edge.anthropic_api import MessagesEndpoint
from vlmrt.actors.edge.app import MAX_LINE_BYTES, AppCollaborators, build_app
from vlmrt.actors.edge.bad_http import EdgeRunner
from vlmrt.actors.edge.chat import ChatEndpoint
from vlmrt.actors.edge.chat_prompt import ChatPrompts
from vlmrt.actors.edge.clip_prober import ClipProber
from vlmrt.actors.edge.completions import CompletionEndpoint
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.fetch import MediaFetcher, Resolve
from vlmrt.actors.edge.generation import Generator
from vlmrt.actors.edge.grammar import GrammarChecker, load_grammar_tokenizer
from vlmrt.actors.edge.health import Health
from vlmrt.actors.edge.identify import ImageIdentifier
from vlmrt.actors.edge.identify_clip import ClipIdentifier
from vlmrt.actors.edge.open_answers import OpenAnswers
from vlmrt.actors.edge.open_requests import MediaBudget
from vlmrt.actors.edge.prompt import PromptBuilder, load_prompt_builder
from vlmrt.actors.edge.responder import Responder
from vlmrt.actors.edge.responses_api import ResponsesEndpoint
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.edge.scheduler_link import SchedulerLink, unavailable
from vlmrt.actors.edge.served_model import ServedModel, system_fingerprint
from vlmrt.actors.edge.span_export import TimelineExporter, check_endpoint, collector_exporter
from vlmrt.actors.edge.timelines import Timelines
from vlmrt.actors.edge.tokenization import TokenizationEndpoint
from vlmrt.actors.edge.tools import CALL_BEGIN, CALL_END, call_tags
from vlmrt.actors.models.config import (
    CheckpointError,
    GenerationDefaults,
    ImageProcessing,
    ModelConfig,
    VideoProcessing,
)
from vlmrt.actors.models.registry import (
    load_generation_defaults,
    load_image_processing,
    load_model_config,
    load_video_processing,
)
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import Capabilities, EdgeReady, PeerDown, PeerUp, ServiceStatus
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import ActorName, EdgeInbox, Probed
from vlmrt.runtime.questions import CancelRequest, Finding, FindTimeline, ListRequests, Question, TimelineFound
from vlmrt.runtime.service_stats import StatsHistory
from vlmrt.runtime.timeline import Timeline

NUM_THREADS = 2  # hashing, tokenizing long prompts, base64
BACKLOG = 1024
PROBE_PATIENCE = 2  # times what a media worker may take for a clip: others may be before it
WRITE_TIMEOUT_S = 30.0  # a client that lets one write wait this long is cut
CLOSE_S = 1.0  # for answers that are being written when everything else has ended


class EdgeActor:
    """Serves HTTP on the socket that the supervisor bound."""

    def __init__(
        self, context: ActorContext, *, resolve: Resolve | None = None, write_timeout_s: float = WRITE_TIMEOUT_S
    ) -> None:
        self._context = context
        self._resolve = resolve
        self._write_timeout_s = write_timeout_s
        self._link = SchedulerLink(context.outbox)
        self._open_answers = OpenAnswers()
        probe_timeout_s = PROBE_PATIENCE * context.config.video.group_timeout_s
        self._prober = ClipProber(context.outbox, context.metrics, probe_timeout_s)
        self._stats = StatsHistory()
        self._exporter: TimelineExporter | None = None
        self.timelines = Timelines(context.name, context.metrics, self._export)
        self._health = Health(context.config.supervision.heartbeat_timeout_s)
        self._budget = MediaBudget(context.config.server.max_media_mib << 20)
        self._executor = ThreadPoolExecutor(NUM_THREADS, "edge")
        self._grammar_thread = ThreadPoolExecutor(
            1, "grammar"
        )  # a compilation cannot be stopped, nor may it be waited for
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None

    @property
    def num_open_requests(self) -> int:
        return self._link.num_open

    @property
    def media_bytes_in_flight(self) -> int:
        """Bytes of bodies and encoded media that open requests hold."""
        return self._budget.used_bytes

    @property
    def routes(self) -> list[tuple[str, str]]:
        """(method, path) of all that is served; GET stands for HEAD too."""
        assert self._runner is not None
        resources = self._runner.app.router.resources()
        return [
            (route.method, resource.canonical)
            for resource in resources
            for route in resource
            if route.method != hdrs.METH_HEAD
        ]

    async def start(self) -> Capabilities:
        """Load tokenizer and template, then accept connections.  Raises: StartupError."""
        if self._context.listen_socket is None:
            raise StartupError("the edge has no listening socket")
        self._begin_telemetry()
        loop = asyncio.get_running_loop()
        app = build_app(await loop.run_in_executor(self._executor, self._load))
        self._runner = EdgeRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            shutdown_timeout=CLOSE_S,
        )
        await self._runner.setup()
        self._site = web.SockSite(self._runner, self._context.listen_socket, backlog=BACKLOG)
        await self._site.start()
        return EdgeReady()

    def _begin_telemetry(self) -> None:
        """Raises: StartupError where spans are to be sent and cannot be."""
        config, version = self._context.config, vlmrt.__version__
        model, endpoint = config.model.served_names[0], config.server.otlp_endpoint
        self._context.metrics.set("server_info", 1, device=config.parallel.device, model=model, version=version)
        if endpoint:
            check_endpoint(endpoint)
            exporter = collector_exporter(endpoint)
            self._exporter = TimelineExporter(exporter, model=model, version=version, actor=self._context.name)

    def _export(self, timeline: Timeline) -> None:
        if self._exporter is not None:
            self._exporter.export(timeline)

    def _load(self) -> AppCollaborators:
        config = self._context.config
        directory = Path(config.model.directory)
        try:
            model = load_model_config(directory)
            processing = load_image_processing(directory)
            video = load_video_processing(directory)
            generation = load_generation_defaults(directory)
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        if config.model.generation_config == "none":
            generation = GenerationDefaults()
        prompts = load_prompt_builder(directory, model, config.model.max_model_len, config.model.chat_template)
        return self._collaborators(model, processing, video, generation, prompts)

    def _collaborators(
        self,
        model: ModelConfig,
        processing: ImageProcessing,
        video: VideoProcessing,
        generation: GenerationDefaults,
        prompts: PromptBuilder,
    ) -> AppCollaborators:
        config, metrics, executor = self._context.config, self._context.metrics, self._executor
        vocabulary = Vocabulary(prompts.tokenizer, always_shown=(CALL_BEGIN, CALL_END))
        eos_token_ids = tuple(dict.fromkeys((*generation.eos_token_ids, *model.eos_token_ids)))
        file = Path(config.model.directory) / "tokenizer.json"
        tokenizer = load_grammar_tokenizer(file, model.text.vocab_size, eos_token_ids)
        checker = GrammarChecker(tokenizer, self._grammar_thread)
        forms = AnswerForms(checker, call_tags(prompts.tokenizer))
        generator = Generator(self._link, vocabulary, config.scheduling, metrics)
        responder = Responder(
            config.server,
            self._link,
            self._budget,
            generator,
            self._open_answers,
            self.timelines,
            metrics,
            self._write_timeout_s,
        )
        identity = f"{config.model.directory}@{config.model.revision}"
        chat_prompts = ChatPrompts(
            MediaFetcher(config.server, executor, self._resolve, video=config.video),
            ImageIdentifier(processing, identity, config.server.max_pixels),
            ClipIdentifier(video, processing, model.vision.tokens_per_second, identity, config.video, self._prober),
            prompts,
            executor,
            metrics,
            limit_images=config.server.limit_images,
            limit_videos=config.video.limit_videos,
        )
        sampling = SamplingDefaults(generation, eos_token_ids, model.text.vocab_size)
        served = ServedModel(
            names=config.model.served_names,
            fingerprint=system_fingerprint(config, processing, generation, prompts.template_source),
            max_model_len=config.model.max_model_len,
        )
        chat = ChatEndpoint(responder, chat_prompts, sampling, served, vocabulary, forms)
        return AppCollaborators(
            config=config,
            model=served,
            chat=chat,
            responses=ResponsesEndpoint(responder, chat, served),
            messages=MessagesEndpoint(responder, chat, chat_prompts, self._link, self._budget, served),
            completions=CompletionEndpoint(responder, prompts, executor, sampling, served, vocabulary, forms),
            tokenization=TokenizationEndpoint(
                responder, self._budget, self._link, chat_prompts, prompts, executor, sampling, served
            ),
            link=self._link,
            health=self._health,
            stats=self._stats,
            metrics=metrics,
        )

    async def peer_up(self, peer: PeerUp) -> None:
        self._link.peer_up(peer)
        self._prober.peer_up(peer)

    async def peer_down(self, peer: PeerDown) -> None:
        self._link.peer_down(peer)
        self._prober.peer_down(peer)

    async def status(self, status: ServiceStatus) -> None:
        self._health.update(status)
        self._stats.add(status)
        self._link.draining = status.draining
        self._context.metrics.set("media_bytes_in_flight", self._budget.used_bytes)
        self._context.metrics.set("requests_preparing", self.timelines.num_preparing)
        self._link.retry_unsent()

    async def handle(self, message: EdgeInbox, sender: ActorName) -> None:
        match message:
            case Probed():
                self._prober.take(message)
            case _:
                self._link.handle(message)

    async def answer(self, question: Question) -> Finding | None:
        match question:
            case ListRequests():
                return self._open_answers.shown()
            case CancelRequest():
                return self._open_answers.cancel(question.id)
            case FindTimeline():
                return TimelineFound(self.timelines.find(question.id))
            case _:
                return None

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new; let open requests finish for grace_s, then end them with an error."""
        self._health.draining = True
        self._link.close()
        site, self._site = self._site, None
        if site is not None:
            await site.stop()
        await self._link.drain(grace_s)
        self._link.fail_all(unavailable("the server is shutting down"))
        await self._link.drain(CLOSE_S)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._exporter is not None:
            await self._exporter.close(CLOSE_S)
        for executor in (self._executor, self._grammar_thread):
            executor.shutdown(wait=False, cancel_futures=True)

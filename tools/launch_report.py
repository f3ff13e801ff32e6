"""What `vlmrt launch` prints: stages and weight progress while it starts, one ready block, a line for each loss."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.registry import load_generation_defaults, load_image_processing
from vlmrt.actors.vit.engines.engine_files import MAX_FRAME_PATCHES
from vlmrt.runtime.config import Config
from vlmrt.runtime.messages import ActorName, Capabilities, Epoch, LlmReady
from vlmrt.tools import demo
from vlmrt.tools.loading_bars import LoadingBars, amount_text

PICTURE = Path(__file__).parent / "red-circle.png"
QUESTION = "What color is the circle?"


class LaunchReport:
    """An observer of the supervisor that writes for a person: bars on a terminal, plain lines in a pipe."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        self._config = config
        self._model = model
        self._num_kv_blocks = 0
        self._num_kv_host_blocks = 0
        self._sharing = ""
        self._was_ready = False
        self._began_s = time.monotonic()
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._line(f"vlmrt: starting {config.model.served_names[0]} on {self._place()}")
        self._bars = LoadingBars(self._console)

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        self._bars.show(actor, stage, done, total)
        if not self._console.is_terminal and done in (0, total):
            self._line(f"  {actor}: {stage} {amount_text(stage, done, total)}")

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        if isinstance(capabilities, LlmReady):
            self._num_kv_blocks = capabilities.num_blocks
            self._num_kv_host_blocks = capabilities.num_host_blocks
        self._line(f"  {actor} is up after {time.monotonic() - self._began_s:.1f} s")

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        self._line(f"vlmrt: {actor} is down: {reason}")

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        self._began_s = time.monotonic()
        self._line(f"vlmrt: {actor} restarts" + (f" in {delay_s:.1f} s" if delay_s else ""))

    def gpu_sharing(self, how: str) -> None:
        self._sharing = how
        if self._was_ready:
            self._line(f"vlmrt: GPU sharing set up anew: {how}")

    def ready(self, url: str, start_s: float) -> None:
        self._bars.stop()
        if self._was_ready:
            self._line(f"vlmrt: ready again after {start_s:.1f} s")
            return
        self._was_ready = True
        for line in self._ready_block(url, start_s):
            self._line(line)

    def stopping(self, reason: str) -> None:
        self._bars.stop()
        self._line(f"vlmrt: stopping: {reason}")

    def failed(self, message: str) -> None:
        self._bars.stop()
        print(f"vlmrt: error: {message}", file=sys.stderr, flush=True)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._console.file.flush()

    def _place(self) -> str:
        parallel = self._config.parallel
        ranks = f"tp {parallel.tp}, {parallel.num_vits} ViT" + ("s" if parallel.num_vits > 1 else "")
        return f"{parallel.device} in {parallel.dtype} ({ranks})"

    def _ready_block(self, url: str, start_s: float) -> list[str]:
        config = self._config
        model, limits, server = config.model, config.scheduling, config.server
        num_kv_tokens = self._num_kv_blocks * limits.block_size
        fetching = ", ".join(server.allowed_media_domains) or "off"
        block = [
            "",
            f"  vlmrt is ready at {url}  (after {start_s:.1f} s)",
            f"  model      {model.served_names[0]} ({self._model.model_type}); {self._other_names()}",
            f"  device     {self._place()}",
            f"  vision     {self._vision()}",
            f"  context    {model.max_model_len} tokens; KV cache {num_kv_tokens} tokens, "
            f"prefix caching {'on' if limits.prefix_caching else 'off'}",
            *self._host_tiers(),
            f"  limits     {limits.max_num_seqs} running, {limits.max_waiting} waiting, "
            f"{server.limit_images} images and {config.video.limit_videos} videos per request, "
            f"{server.max_body_mib} MiB per body",
            f"  sampling   {self._sampling()}",
            f"  media      data URLs; http(s) {fetching}; files {server.allowed_media_root or 'off'}",
            f"  API key    {self._keys()}",
        ]
        if self._sharing:
            block.insert(block.index(f"  device     {self._place()}") + 1, f"  sharing    {self._sharing}")
        if not server.api_keys and not server.is_local:
            block.append(
                f"  warning    {server.host} can be reached from other machines, and without an API key all of them "
                "may use the server (--api-key-file)"
            )
        if num_kv_tokens < model.max_model_len:
            block.append(
                f"  note       the KV cache holds fewer tokens than the context: longer requests than {num_kv_tokens} "
                "tokens are refused (--kv-cache-gib)"
            )
        max_pixels = MAX_FRAME_PATCHES * self._model.vision.patch_size**2
        largest = load_image_processing(Path(model.directory)).max_pixels
        if config.parallel.vit_engine != "torch" and largest > max_pixels:
            block.append(
                f"  note       {config.parallel.vit_engine} takes images of up to {max_pixels} pixels after resizing; "
                f"the model allows {largest}, and what is between fails"
            )
        if Path(model.directory) == demo.CHECKPOINT:
            block.append(
                "  note       this is the demo model: a toy that knows coloured shapes, counts and short texts on "
                "pictures, and nothing else"
            )
        return [*block, "", "  Try it:", "", self._curl(url), ""]

    def _other_names(self) -> str:
        others = [json.dumps(name, ensure_ascii=False) for name in (*self._config.model.served_names[1:], "model")]
        return f"the name {others[0]} works too" if len(others) == 1 else f"the names {', '.join(others)} work too"

    def _keys(self) -> str:
        keys = self._config.server.api_keys
        if not keys:
            return "none: whoever reaches the address may use it"
        tenants = {key.tenant for key in keys if key.tenant}
        counts = [_count(len(keys), "key"), *([_count(len(tenants), "tenant")] if tenants else [])]
        return f"on ({', '.join(counts)})"

    def _vision(self) -> str:
        parallel = self._config.parallel
        if parallel.vit_engine_directory is None:
            return parallel.vit_engine
        return f"{parallel.vit_engine}, from {parallel.vit_engine_directory}"

    def _host_tiers(self) -> list[str]:
        """A line about what is kept in host memory; none if nothing is."""
        memory, tiers = self._config.memory, []
        if self._num_kv_host_blocks:
            num_tokens = self._num_kv_host_blocks * self._config.scheduling.block_size
            tiers.append(f"KV cache {num_tokens} tokens ({memory.kv_host_cache_gib:g} GiB per rank)")
        if memory.embedding_host_cache_gib:
            tiers.append(f"images {memory.embedding_host_cache_gib:g} GiB per ViT")
        return [f"  host tier  {', '.join(tiers)}"] if tiers else []

    def _sampling(self) -> str:
        if self._config.model.generation_config == "none":
            return "OpenAI's defaults (--generation-config none)"
        defaults = load_generation_defaults(Path(self._config.model.directory))
        fields = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = [f"{name} {getattr(defaults, name):g}" for name in fields if getattr(defaults, name) is not None]
        return (", ".join(given) or "OpenAI's defaults") + (" from generation_config.json" if given else "")

    def _curl(self, url: str) -> str:
        picture = base64.b64encode(PICTURE.read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        body = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]}
        key = ' -H "authorization: Bearer $VLMRT_API_KEY"' if self._config.server.api_keys else ""
        return f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")

"""What a person should know of a service that is ready: (label, text) for each line of the block."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.registry import load_generation_defaults, load_image_processing
from vlmrt.actors.vit.engines.engine_files import MAX_FRAME_PATCHES
from vlmrt.runtime.config import Config
from vlmrt.runtime.control_messages import LlmReady
from vlmrt.tools import demo
from vlmrt.tools.chat.command import URL as CHAT_URL

PICTURE = Path(__file__).parent / "red-circle.png"
QUESTION = "What color is the circle?"
GIB = 1 << 30

Entry = tuple[str, str]


class Started(NamedTuple):
    """What only the actors know, once they are up."""

    llm: LlmReady
    gpu_sharing: str = ""  # empty: no GPU is shared


def ready_entries(config: Config, model: ModelConfig, url: str, started: Started) -> list[Entry]:
    """In the order of the block.  Labels are unique but for warnings and notes."""
    options, server = config.model, config.server
    fetching = ", ".join(server.allowed_media_domains) or "off"
    return [
        ("model", f"{options.served_names[0]} ({model.model_type}); {_other_names(config)}"),
        ("device", place(config)),
        *([("sharing", started.gpu_sharing)] if started.gpu_sharing else []),
        ("vision", _vision(config)),
        ("context", f"{options.max_model_len} tokens per request"),
        ("KV cache", _kv_cache(config, started.llm)),
        ("images", _images(config)),
        ("limits", _limits(config)),
        ("sampling", _sampling(config)),
        ("media", f"data URLs; http(s) {fetching}; files {server.allowed_media_root or 'off'}"),
        ("API key", _keys(config)),
        *_changed(config),
        ("chat", _chat(config, url)),
        ("figures", f"vlmrt admin top, vlmrt admin stats; {url}/metrics for Prometheus"),
        *_warnings(config, model, started.llm),
    ]


def place(config: Config) -> str:
    parallel = config.parallel
    ranks = f"tp {parallel.tp}, {_count(parallel.num_vits, 'ViT')}"
    return f"{parallel.device} in {parallel.dtype} ({ranks})"


def example(config: Config, url: str) -> str:
    """A command that asks about a picture, to be pasted."""
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    body = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]}
    key = ' -H "authorization: Bearer $VLMRT_API_KEY"' if config.server.api_keys else ""
    return f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def _other_names(config: Config) -> str:
    others = [json.dumps(name, ensure_ascii=False) for name in (*config.model.served_names[1:], "model")]
    return f"the name {others[0]} works too" if len(others) == 1 else f"the names {', '.join(others)} work too"


def _vision(config: Config) -> str:
    parallel = config.parallel
    if parallel.vit_engine_directory is None:
        return parallel.vit_engine
    return f"{parallel.vit_engine}, from {parallel.vit_engine_directory}"


def _kv_cache(config: Config, llm: LlmReady) -> str:
    scheduling, per_rank = config.scheduling, " per rank" if config.parallel.tp > 1 else ""
    text = (
        f"{llm.num_blocks * scheduling.block_size} tokens ({_gib(llm.num_blocks * llm.block_bytes)}{per_rank}), "
        f"prefix caching {'on' if scheduling.prefix_caching else 'off'}"
    )
    if llm.num_host_blocks:
        gib = f"{config.memory.kv_host_cache_gib:g} GiB{per_rank}"
        text += f"; in host memory {llm.num_host_blocks * scheduling.block_size} tokens ({gib})"
    return text


def _images(config: Config) -> str:
    memory, per_vit = config.memory, " per ViT" if config.parallel.num_vits > 1 else ""
    text = f"{_gib(memory.embedding_cache_gib * GIB)} of encoded images{per_vit}"
    if memory.embedding_host_cache_gib:
        text += f"; in host memory {memory.embedding_host_cache_gib:g} GiB{per_vit}"
    return text + ("" if config.scheduling.embedding_caching else ", none kept for other requests")


def _limits(config: Config) -> str:
    scheduling, server = config.scheduling, config.server
    return (
        f"{scheduling.max_num_seqs} running, {scheduling.max_waiting} waiting, "
        f"{server.limit_images} images and {config.video.limit_videos} videos per request, "
        f"{server.max_body_mib} MiB per body"
    )


def _sampling(config: Config) -> str:
    if config.model.generation_config == "none":
        return "OpenAI's defaults (--generation-config none)"
    defaults = load_generation_defaults(Path(config.model.directory))
    fields = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = [f"{name} {getattr(defaults, name):g}" for name in fields if getattr(defaults, name) is not None]
    return (", ".join(given) or "OpenAI's defaults") + (" from generation_config.json" if given else "")


def _keys(config: Config) -> str:
    keys = config.server.api_keys
    if not keys:
        return "none: whoever reaches the address may use it"
    tenants = {key.tenant for key in keys if key.tenant}
    counts = [_count(len(keys), "key"), *([_count(len(tenants), "tenant")] if tenants else [])]
    return f"on ({', '.join(counts)})"


def _chat(config: Config, url: str) -> str:
    command = "vlmrt chat" if url == CHAT_URL else f"vlmrt chat --url {url}"
    return f"{url}/ in a browser; {command}" if config.server.page else command


def _changed(config: Config) -> list[Entry]:
    """Where options came from that the command line does not show; none if it shows all."""
    elsewhere = [origin for origin in config.origins.values() if origin not in ("default", "flag")]
    return [("options", "flags, " + ", ".join(dict.fromkeys(elsewhere)) + " (--show-config)")] if elsewhere else []


def _warnings(config: Config, model: ModelConfig, llm: LlmReady) -> Iterator[Entry]:
    server, num_kv_tokens = config.server, llm.num_blocks * config.scheduling.block_size
    if not server.api_keys and not server.is_local:
        yield (
            "warning",
            f"{server.host} can be reached from other machines, and without an API key all of them may use the server "
            "(--api-key-file)",
        )
    if num_kv_tokens < config.model.max_model_len:
        yield (
            "note",
            f"the KV cache holds fewer tokens than the context: longer requests than {num_kv_tokens} tokens are "
            "refused (--kv-cache-gib)",
        )
    max_pixels = MAX_FRAME_PATCHES * model.vision.patch_size**2
    largest = load_image_processing(Path(config.model.directory)).max_pixels
    if config.parallel.vit_engine != "torch" and largest > max_pixels:
        yield (
            "note",
            f"{config.parallel.vit_engine} takes images of up to {max_pixels} pixels after resizing; the model allows "
            f"{largest}, and what is between fails",
        )
    if Path(config.model.directory) == demo.CHECKPOINT:
        yield (
            "note",
            "this is the demo model: a toy that knows coloured shapes, counts and short texts on pictures, and nothing "
            "else",
        )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")

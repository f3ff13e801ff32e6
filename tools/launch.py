"""`vlmrt launch`: arguments -> checked Config -> a running service.

Everything that can be found wrong without loading a weight is found here, in one line, before a process is spawned.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vlmrt.actors.edge.span_export import check_endpoint
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError, ImageProcessing, ModelConfig, VideoProcessing
from vlmrt.actors.models.registry import (
    check_tensor_parallel,
    load_generation_defaults,
    load_image_processing,
    load_model_config,
    load_video_processing,
)
from vlmrt.runtime.admin_keys import server_keys
from vlmrt.runtime.config import (
    AdminOptions,
    Config,
    Device,
    Dtype,
    MemoryOptions,
    ModelOptions,
    ParallelOptions,
    SchedulingOptions,
    ServerOptions,
    SupervisionOptions,
    VideoOptions,
)
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_memory import available_gib
from vlmrt.runtime.logs import LAUNCH_LOGGER, set_up_logging
from vlmrt.runtime.supervisor import Supervisor
from vlmrt.tools.api_keys import read_api_keys
from vlmrt.tools.devices import num_cuda_devices
from vlmrt.tools.host_tiers import check_host_memory, embedding_host_cache_gib, kv_host_cache_gib
from vlmrt.tools.launch_report import LaunchReport, LoggedReport
from vlmrt.tools.model_source import locate_model
from vlmrt.tools.vit_engines import build_engine_files, engine_directory

MAX_DEFAULT_MODEL_LEN = 32768
DEFAULT_EMBEDDING_CACHE_GIB = {"cpu": 0.25, "cuda": 2.0}
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MAX_VIDEO_MIB = 256  # what a message between processes holds
SUPERVISOR = "supervisor"  # in log lines, where others have the name of an actor
GIB = 1 << 30
MIB = 1 << 20


class Preset(NamedTuple):
    """What --preset stands for."""

    itl_target_ms: float | None  # on a GPU: a step on a CPU takes longer than any such target by itself
    max_num_batched_tokens: dict[Device, int]


# A GPU's long steps are bounded by the target where somebody reads along, and by nothing where nobody does.
PRESETS = {
    "interactive": Preset(30.0, {"cpu": 1024, "cuda": 4096}),
    "throughput": Preset(None, {"cpu": 8192, "cuda": 8192}),
}
DEFAULT_MAX_NUM_SEQS: dict[Device, int] = {"cpu": 64, "cuda": 256}


def launch(arguments: argparse.Namespace, origins: Mapping[str, str]) -> int:
    """Serve until a signal.  Returns the exit status.  origins: see Config."""
    set_up_logging(arguments.log_level, arguments.log_format, SUPERVISOR)
    try:
        config, model = build_config(arguments, origins)
        build_engine_files(config)
        report = (LoggedReport if config.log_format == "json" else LaunchReport)(config, model)
        return asyncio.run(Supervisor(config, report, num_gpus=num_cuda_devices()).run())
    except (StartupError, CheckpointError) as error:
        message = f"{error}{_whence(str(error), origins)}"
        if arguments.log_format == "json":
            logging.getLogger(LAUNCH_LOGGER).error("%s", message)
        else:
            print(f"vlmrt: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _whence(message: str, origins: Mapping[str, str]) -> str:
    """Where the option that an error begins with was said, if that was not the command line."""
    option = re.match(r"--([a-z0-9-]+)", message)
    origin = origins.get(option[1], "default") if option is not None else "default"
    return "" if origin in ("default", "flag") else f" (from {origin})"


def build_config(arguments: argparse.Namespace, origins: Mapping[str, str] | None = None) -> tuple[Config, ModelConfig]:
    """Resolve what was left out and check what was given.

    Raises: StartupError or CheckpointError, one line naming the flag or file, its value and the bound.
    """
    directory = locate_model(arguments.model, arguments.revision)
    model = load_model_config(directory)
    processing = load_image_processing(directory)
    video_processing = load_video_processing(directory)
    load_generation_defaults(directory)
    check_tensor_parallel(model, arguments.tp)
    check_weight_files(directory)
    check_texts(directory, arguments.chat_template)
    if arguments.max_video_mib > MAX_VIDEO_MIB:
        raise StartupError(f"--max-video-mib {arguments.max_video_mib}: at most {MAX_VIDEO_MIB}")
    device, dtype = resolve_device(arguments.device, arguments.dtype, arguments.tp, model)
    config = Config(
        model=model_options(arguments, directory, model),
        server=server_options(arguments),
        video=VideoOptions(
            reader=arguments.video_reader,
            limit_videos=arguments.limit_videos,
            max_mib=arguments.max_video_mib,
            max_duration_s=arguments.max_video_s,
            max_frames=arguments.max_video_frames,
        ),
        scheduling=SchedulingOptions(
            max_num_seqs=arguments.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device],
            max_waiting=arguments.max_waiting,
            max_num_batched_tokens=arguments.max_num_batched_tokens
            or PRESETS[arguments.preset].max_num_batched_tokens[device],
            itl_target_ms=itl_target_ms(arguments.itl_target_ms, arguments.preset, device),
            prefix_caching=not arguments.no_prefix_caching,
            embedding_caching=not arguments.no_embedding_caching,
        ),
        memory=memory_options(arguments, model, processing, video_processing, device, dtype),
        parallel=parallel_options(
            arguments,
            device,
            dtype,
            engine_directory(arguments.vit_engine, arguments.engine_cache, directory, model, processing, device, dtype),
        ),
        supervision=SupervisionOptions(
            shutdown_grace_s=arguments.shutdown_grace_s,
            start_timeout_s=arguments.start_timeout_s,
            fault_hooks=arguments.fault_hooks,
        ),
        admin=admin_options(arguments),
        log_level=arguments.log_level,
        log_format=arguments.log_format,
        origins=dict(origins or {}),
    )
    check_host_memory(config, available_gib())
    return config, model


def check_texts(directory: Path, chat_template: str | None) -> None:
    if not (directory / "tokenizer.json").is_file():
        raise StartupError(f"{directory / 'tokenizer.json'}: missing; vlmrt reads the fast tokenizer's file")
    if chat_template is not None and not Path(chat_template).is_file():
        raise StartupError(f"--chat-template {chat_template}: no such file")
    if chat_template is None and not any((directory / name).is_file() for name in CHAT_TEMPLATE_FILES):
        raise StartupError(
            f"{directory}: no chat template ({', '.join(CHAT_TEMPLATE_FILES)}); give --chat-template FILE"
        )


def resolve_device(device: str, dtype: str, tp: int, model: ModelConfig) -> tuple[Device, Dtype]:
    num_gpus = num_cuda_devices() if device != "cpu" else 0
    if device == "cuda" and num_gpus == 0:
        raise StartupError("--device cuda: no CUDA device is visible to the driver")
    chosen: Device = "cuda" if num_gpus else "cpu"
    if chosen == "cuda" and tp > num_gpus:
        raise StartupError(f"--tp {tp}: more ranks than visible CUDA devices ({num_gpus})")
    if dtype == "float32" or (dtype == "auto" and chosen == "cpu"):
        return chosen, "float32"
    return chosen, "bfloat16"


def itl_target_ms(asked: float | None, preset: str, device: Device) -> float | None:
    """As asked, where 0 means none; else the preset's, on a GPU."""
    if asked is not None:
        return asked or None
    return PRESETS[preset].itl_target_ms if device == "cuda" else None


def model_options(arguments: argparse.Namespace, directory: Path, model: ModelConfig) -> ModelOptions:
    longest = model.text.max_position_embeddings
    max_model_len = arguments.max_model_len or min(longest, MAX_DEFAULT_MODEL_LEN)
    if max_model_len > longest:
        raise StartupError(f"--max-model-len {max_model_len}: the model's max_position_embeddings is {longest}")
    given = arguments.served_model_name or [arguments.model.rstrip("/") if arguments.model else "vlmrt-demo"]
    names = tuple(dict.fromkeys(given))
    if not all(name.isprintable() and name.strip() for name in names):
        raise StartupError("--served-model-name: a name must not be empty, nor hold control characters")
    return ModelOptions(
        directory=str(directory),
        served_names=names,
        revision=arguments.revision,
        max_model_len=max_model_len,
        chat_template=arguments.chat_template,
        generation_config=arguments.generation_config,
    )


def server_options(arguments: argparse.Namespace) -> ServerOptions:
    root = arguments.allowed_media_root
    if root is not None and not Path(root).is_dir():
        raise StartupError(f"--allowed-media-root {root}: no such directory")
    if arguments.otlp_endpoint:
        check_endpoint(arguments.otlp_endpoint)
    return ServerOptions(
        host=arguments.host,
        port=arguments.port,
        max_body_mib=arguments.max_body_mib,
        request_timeout_s=arguments.request_timeout_s,
        limit_images=arguments.limit_images,
        max_pixels=arguments.max_pixels,
        allowed_media_domains=tuple(arguments.allowed_media_domains),
        allowed_media_root=None if root is None else str(Path(root).resolve()),
        cors_origins=tuple(arguments.cors_origins),
        admin_routes=arguments.admin_routes,
        page=not arguments.no_page,
        log_requests=arguments.log_requests,
        metrics_compat=arguments.metrics_compat,
        otlp_endpoint=arguments.otlp_endpoint or "",
        api_keys=read_api_keys(arguments.api_key, arguments.api_key_file, os.environ),
    )


def admin_options(arguments: argparse.Namespace) -> AdminOptions:
    options = AdminOptions(
        address=arguments.admin_address,
        keys=arguments.admin_keys,
        token_file=arguments.admin_token_file,
        profile_directory=str(Path(arguments.profile_dir).resolve()),
    )
    server_keys(options)  # the supervisor reads them once more, and keeps them to itself
    return options


def memory_options(
    arguments: argparse.Namespace,
    model: ModelConfig,
    processing: ImageProcessing,
    video: VideoProcessing,
    device: Device,
    dtype: Dtype,
) -> MemoryOptions:
    """The slab and the arena must each hold the largest image and group of frames that the checkpoint's limits allow.

    A group has as many rows as an image of one of its frames.
    """
    merged = processing.patch_size * processing.merge_size
    row_bytes = model.vision.out_hidden_size * (4 if dtype == "float32" else 2)
    max_pixels = max(processing.max_pixels, video.max_pixels)
    image_bytes = -(-max_pixels // merged**2) * row_bytes
    slab_gib = arguments.embedding_cache_gib or max(DEFAULT_EMBEDDING_CACHE_GIB[device], 1.25 * image_bytes / GIB)
    if slab_gib * GIB < image_bytes:
        raise StartupError(
            f"--embedding-cache-gib {slab_gib:g}: the largest image of this model (max_pixels {max_pixels}) "
            f"needs {image_bytes / GIB:.3f}"
        )
    arena_mib = arguments.pixel_arena_mib
    group_pixels = max(processing.max_pixels, video.temporal_patch_size * video.max_pixels)
    if arena_mib * MIB < 3 * group_pixels:
        raise StartupError(
            f"--pixel-arena-mib {arena_mib}: the largest image or pair of frames of this model ({group_pixels} pixels) "
            f"needs {-(-3 * group_pixels // MIB)}"
        )
    return MemoryOptions(
        kv_cache_gib=arguments.kv_cache_gib,
        num_kv_blocks=arguments.num_kv_blocks,
        kv_host_cache_gib=kv_host_cache_gib(arguments),
        embedding_cache_gib=slab_gib,
        embedding_host_cache_gib=embedding_host_cache_gib(arguments, device),
        pixel_arena_mib=arena_mib,
        media_worker_mib=arguments.media_worker_mib,
        vit_engine_gib=arguments.vit_engine_gib,
        gpu_memory_fraction=arguments.gpu_memory_fraction,
    )


def parallel_options(
    arguments: argparse.Namespace, device: Device, dtype: Dtype, vit_engine_directory: str | None
) -> ParallelOptions:
    cores = len(os.sched_getaffinity(0))
    return ParallelOptions(
        device=device,
        dtype=dtype,
        tp=arguments.tp,
        num_vits=arguments.num_vits or max(1, num_cuda_devices() if device == "cuda" else 1),
        num_media_workers=arguments.media_workers,
        llm_threads=arguments.llm_threads or max(1, cores // arguments.tp),
        vit_threads=arguments.vit_threads,
        vit_engine=arguments.vit_engine,
        vit_engine_directory=vit_engine_directory,
        vit_quantum_ms=arguments.vit_quantum_ms,
        gpu_sharing=arguments.gpu_sharing,
        vit_sm_percent=arguments.vit_sm_percent,
    )

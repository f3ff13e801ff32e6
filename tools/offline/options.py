"""The engine's options as keyword arguments: the names, checks and defaults of `vlmrt launch`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn, TypedDict

from vlmrt.tools.arguments import Parser
from vlmrt.tools.engine_options import add_engine


class EngineOptions(TypedDict, total=False):
    """`vlmrt launch --help` says what each does; None is as left out."""

    revision: str
    served_model_name: Sequence[str]
    max_model_len: int | None
    chat_template: str | os.PathLike[str] | None
    generation_config: Literal["auto", "none"]
    tp: int
    device: Literal["auto", "cuda", "cpu"]
    dtype: Literal["auto", "float32", "bfloat16"]
    num_vits: int | None
    media_workers: int
    video_reader: Literal["auto", "decord", "av"]
    vit_engine: Literal["torch", "onnxruntime", "tensorrt"]
    engine_cache: str | os.PathLike[str] | None
    vit_engine_gib: float
    llm_threads: int | None
    vit_threads: int
    vit_quantum_ms: float
    gpu_sharing: Literal["auto", "mps", "time-slice"]
    vit_sm_percent: int
    kv_cache_gib: float | None
    num_kv_blocks: int | None
    kv_host_cache_gib: float
    embedding_cache_gib: float | None
    embedding_host_cache_gib: float | None
    pixel_arena_mib: int
    media_worker_mib: int
    gpu_memory_fraction: float
    no_prefix_caching: bool
    no_embedding_caching: bool
    max_num_seqs: int | None
    preset: Literal["interactive", "throughput"]
    itl_target_ms: float | None
    max_num_batched_tokens: int | None
    limit_images: int
    limit_videos: int
    max_pixels: int
    max_video_mib: int
    max_video_s: float
    max_video_frames: int
    allowed_media_domains: Sequence[str]
    allowed_media_root: str | os.PathLike[str] | None
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    shutdown_grace_s: float
    start_timeout_s: float


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def command_line(model: str | os.PathLike[str] | None, options: Mapping[str, object]) -> list[str]:
    """What `vlmrt launch` would be given.

    Raises: TypeError for a name that is no option, ValueError for a value that the command line refuses.
    """
    words = [] if model is None else [f"--model={os.fspath(model)}"]
    for name, value in options.items():
        if name not in EngineOptions.__annotations__:
            raise TypeError(
                f"{name!r} is no option of the engine; there are {', '.join(EngineOptions.__annotations__)}"
            )
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    parser = _Parser(add_help=False)
    add_engine(parser)
    parser.parse_args(words)
    return words


def engine_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Those among parsed arguments."""
    return {name: getattr(arguments, name) for name in EngineOptions.__annotations__}

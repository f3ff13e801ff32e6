"""The frozen config tree: checked once at start, handed to every process, never changed.

Sizes are in the unit that ends the name.  What a user may leave out is resolved before this tree is built
(tools/launch.py); the one None left, the KV cache's size, is decided by the LLM ranks, which alone know what memory
is free.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
GpuSharingChoice = Literal["auto", "mps", "time-slice"]
VitEngine = Literal["torch", "onnxruntime", "tensorrt"]


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    directory: str  # local directory, resolved
    served_names: tuple[str, ...]  # the first is reported; "model" answers always
    revision: str = ""  # part of every mm_hash
    max_model_len: int = 4096
    chat_template: str | None = None  # path of a template that replaces the checkpoint's
    generation_config: Literal["auto", "none"] = "auto"


class ServerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_mib: int = 64
    max_media_mib: int = 512  # encoded bytes of all open requests together
    request_timeout_s: float = 600.0
    limit_images: int = 64  # per request
    max_pixels: int = 100_000_000  # of one encoded image, before resizing
    allowed_media_domains: tuple[
        str, ...
    ] = ()  # host, IP, CIDR or "*", each with an optional :port; empty: no fetching
    allowed_media_root: str | None = None
    media_fetch_timeout_s: float = 10.0
    max_fetch_mib: int = 32
    cors_origins: tuple[str, ...] = ()
    admin_routes: bool = False  # cache resets by HTTP


class SchedulingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_num_seqs: int = 64  # running at once
    max_waiting: int = 256  # more are refused with 429
    max_num_batched_tokens: int = 1024  # tokens of one step
    itl_target_ms: float | None = None  # of a step that decodes, by bounding its prefill tokens; None: no bound
    block_size: int = 16  # tokens of one KV block
    prefix_caching: bool = True
    embedding_caching: bool = True


class MemoryOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kv_cache_gib: float | None = None  # None: a share of what is free, decided by the ranks
    num_kv_blocks: int | None = None  # overrides kv_cache_gib; for tests of preemption
    kv_host_cache_gib: float = 0.0  # of host memory per rank, for KV blocks that were evicted; 0: none
    embedding_cache_gib: float = 0.25
    embedding_host_cache_gib: float = 0.0  # of host memory per ViT, for rows of images; 0: none
    vit_engine_gib: float = 8.0  # of a GPU, for all that ONNX Runtime takes, or for TensorRT's workspace
    page_rows: int = 16  # rows of one slab page
    pixel_arena_mib: int = 256  # per media worker
    gpu_memory_fraction: float = 0.92


class ParallelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device: Device = "cpu"
    dtype: Dtype = "float32"
    tp: int = 1
    num_vits: int = 1
    num_media_workers: int = 1
    num_edges: int = 1
    llm_threads: int = 1  # torch threads of one rank
    vit_threads: int = 1
    max_patches_per_batch: int = 8192  # of one ViT forward: fills a GPU; twice as many make the first image wait
    vit_engine: VitEngine = "torch"
    vit_engine_directory: str | None = None  # of the exported tower, where the engine is not torch
    vit_quantum_ms: float = 8.0  # of tower work that a GPU is given at once
    gpu_sharing: GpuSharingChoice = "auto"  # where a ViT and a rank share a GPU; auto: MPS if it can be had
    vit_sm_percent: int = 80  # of the SMs of a GPU that a ViT shares under MPS


class SupervisionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    heartbeat_s: float = 0.5
    heartbeat_timeout_s: float = 30.0
    start_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    max_restarts: int = 10  # within restart_period_s, for one actor or group; one more ends the service
    restart_period_s: float = 60.0
    shutdown_grace_s: float = 10.0
    fault_hooks: bool = False  # tests only: see runtime/faults.py


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ModelOptions
    server: ServerOptions = ServerOptions()
    scheduling: SchedulingOptions = SchedulingOptions()
    memory: MemoryOptions = MemoryOptions()
    parallel: ParallelOptions = ParallelOptions()
    supervision: SupervisionOptions = SupervisionOptions()
    log_level: str = "info"

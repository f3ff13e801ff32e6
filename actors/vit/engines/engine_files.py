"""Towers in other engines' formats on disk: what they were made of names them, so each is built once (no torch).

A directory in the cache is complete or not there: it is filled under another name and renamed. What is in it is trusted
as the package's own code is, so the cache is for its owner alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from vlmrt.actors.models.checkpoint_files import WeightFiles, flat_name
from vlmrt.actors.models.config import VisionConfig
from vlmrt.runtime.config import Dtype
from vlmrt.runtime.errors import StartupError

Format = Literal["onnx", "tensorrt"]
ONNX_FILE = "tower.onnx"  # its weights are beside it
TENSORRT_FILE = "tower.engine"
ABOUT_FILE = "about.json"
FORM = 1  # of what the exported graph takes and gives; counted up when that changes
NATIVE_OPSET = 23  # the first with Attention
PLAIN_OPSET = 18  # attention in products and a softmax
MAX_FRAME_PATCHES = 16384  # of one image: a mask has the square of the longest row's length, here 256 MiB
READ_BYTES = 1 << 22


class EngineSpec(msgspec.Struct, frozen=True):
    """What a tower in some format depends on; equal specs mean the same file."""

    format: Format
    model_type: str
    weights: str  # see weights_hash
    vision: VisionConfig
    dtype: Dtype
    opset: int
    versions: dict[str, str]  # of the packages that make it
    device: str = ""  # "": any
    max_patches: int = 0  # of one call; 0: any number
    form: int = FORM

    @property
    def name(self) -> str:
        key = hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()
        return f"{self.format}-{self.dtype}-{key[:20]}"


def weights_hash(files: WeightFiles) -> str:
    """SHA-256 of a checkpoint's vision tower: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    entries = sorted((flat_name(name), entry) for name, entry in files.tensors.items())
    for name, entry in entries:
        if not name.startswith("visual."):
            continue
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
        first, last = entry.offsets
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(first)
            while first < last:
                part = stream.read(min(READ_BYTES, last - first))
                if not part:
                    raise StartupError(f"{entry.file}: ends before tensor {name}")
                digest.update(part)
                first += len(part)
    return digest.hexdigest()


def versions_of(packages: tuple[str, ...], extra: str, option: str) -> dict[str, str]:
    """Raises: StartupError naming the extra that brings a package which is missing."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise StartupError(
                f"{option}: the package {package} is not installed; pip install 'vlmrt[{extra}]'"
            ) from None
    return versions


def default_cache() -> Path:
    """$XDG_CACHE_HOME/vlmrt/engines."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "vlmrt" / "engines"


def is_built(directory: Path) -> bool:
    return (directory / ABOUT_FILE).is_file()


def build_once(cache: Path, spec: EngineSpec, build: Callable[[Path], None]) -> Path:
    """The directory of a tower; build fills it if nobody has, while others wait.

    Raises: StartupError if the cache cannot be written; whatever build raises.
    """
    directory = cache / spec.name
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(cache):
            if is_built(directory):
                return directory
            for stale in cache.glob("building-*"):  # of a process that was killed: the lock is ours
                shutil.rmtree(stale)
            unfinished = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
            try:
                build(unfinished)
                write_about(unfinished, spec)
                unfinished.rename(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StartupError(f"--engine-cache {cache}: cannot be written: {error}") from None
    return directory


def write_about(directory: Path, spec: EngineSpec) -> None:
    (directory / ABOUT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(spec)) + b"\n")


def read_about(directory: Path) -> EngineSpec:
    """Raises: StartupError if this is no directory of a tower."""
    try:
        return msgspec.json.decode((directory / ABOUT_FILE).read_bytes(), type=EngineSpec)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartupError(f"{directory / ABOUT_FILE}: cannot be read: {error}") from None


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    descriptor = os.open(cache / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

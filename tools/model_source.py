"""Where a model's files are: the demo model, a local directory as it is, or a snapshot of a hub repository."""

from __future__ import annotations

import re
from pathlib import Path

from vlmrt.runtime.errors import StartupError
from vlmrt.tools import demo

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt"]


def locate_model(model: str | None, revision: str) -> Path:
    """The local directory of a model; a hub id is downloaded first, with progress bars.

    Raises: StartupError, one line that says what was looked for and why it is not there.
    """
    if model is None:
        return demo.CHECKPOINT
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise StartupError(f"--model {model}: a file, where a directory with config.json is expected")
    if not HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise StartupError(f"--model {model}: no such directory, and not a hub id like Qwen/Qwen2-VL-2B-Instruct")
    return download(model, revision)


def download(hub_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=WANTED))
    except (
        Exception
    ) as error:  # the hub client raises a tree of its own, with network errors of several libraries in it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(f"--model {hub_id}: no such directory, and the hub gave no snapshot: {reason}") from error

"""Throw-away environments, one per version of a client: built from a list of pinned packages, kept until it changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent / "environments"
BUILT = ROOT / ".build" / "clients"
BUILD_TIMEOUT_S = 900
SHOWN_CHARS = 2000


class CannotBuild(Exception):
    """pip could not install the packages of an environment."""


def names() -> list[str]:
    return sorted(file.stem for file in LISTS.glob("*.txt"))


def suite_of(name: str) -> str:
    return name.partition("-")[0]


def outcomes_of(name: str) -> Path:
    """Where the last run in this environment wrote what came out."""
    return BUILT / f"{name}.json"


def python_of(packages: Path, built: Path = BUILT) -> Path:
    """The interpreter of the environment of this list, built unless it is there.

    Packages are taken as listed, without asking what they depend on: the list is complete.
    Raises: CannotBuild with pip's words.
    """
    directory = built / packages.stem
    python, record = directory / "bin" / "python", directory / "packages.txt"
    if record.exists() and record.read_text() == packages.read_text():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(directory)])
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-r", str(packages)])
    shutil.copyfile(packages, record)
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{' '.join(command)} took longer than {BUILD_TIMEOUT_S} s") from None
    if done.returncode:
        raise CannotBuild(f"{' '.join(command)}:\n{done.stderr[-SHOWN_CHARS:]}")

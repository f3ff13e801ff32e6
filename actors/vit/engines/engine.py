"""What every engine of the vision tower does: pixels -> rows, in quanta that leave the device to others in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]  # [t, height, width, 3], resized
GridThw = tuple[int, int, int]
Run = TypeVar("Run")


class VisionEngine(Protocol[Run]):
    """One loaded tower.  Run is a batch on its way through it.

    Any number may be prepared, but from a run's first quantum to its rows no other may take one.
    """

    def prepare(self, images: Sequence[Pixels], grids: Sequence[GridThw]) -> Run:
        """Bring the pixels to the device and cut them into patches; they are not read after this returns."""
        ...

    def run_quantum(self, run: Run) -> bool:
        """Issue the next layers and wait until at most a quantum of work is left undone; True after the last layer."""
        ...

    def rows(self, run: Run) -> Tensor:
        """[sum of t * h * w / merge_size**2, out_hidden_size], images in order, of a run whose layers are done."""
        ...


def pixels_on(device: torch.device, images: Sequence[Pixels]) -> list[Tensor]:
    """One copy of them all: the arena's pixels are read-only and leave with the answer."""
    sizes = [image.size for image in images]
    staged = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, image in zip(staged.split(sizes), images, strict=True):  # type: ignore[no-untyped-call]
        np.copyto(place.numpy().reshape(image.shape), image)
    places = staged.to(device, non_blocking=True).split(sizes)  # type: ignore[no-untyped-call]
    return [place.view(image.shape) for place, image in zip(places, images, strict=True)]

"""Programmatic dependent launch: a kernel is placed on the GPU while the one in front of it still runs.

A kernel that takes PDL calls gdc_launch_dependents first, so that the next is placed as soon as all of its own programs
are, and gdc_wait before it reads what a kernel of the step has written and before it writes anything at all.

Why that keeps the order of the stream. gdc_wait in kernel k + 1 returns when k has completed and its writes are
visible. Every program of k waits for k - 1 itself, also one that has nothing to do and returns early, so k cannot
complete before k - 1 has: past its wait, k + 1 stands behind all kernels in front, however many were placed at once.
Hence it may also write what k - 1 reads. A kernel without PDL, cuBLAS's or torch's, starts when the one in front has
completed, and gdc_wait behind it waits for all of it.

What is read before the wait has no such order: in a chain of these kernels any number of those in front may still run.
That is for weights alone, which nothing writes within a step. Whoever changes them in the stream has a kernel without
PDL, or the host's synchronisation, between that and the step.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch adds to its arguments: PDL for the kernel, and the launch's own attribute where the GPU has it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}

"""What it takes to compile a kernel without a GPU and without its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton


class CompileSpec(NamedTuple):
    """One specialisation of a kernel as the server launches it.

    A module of this folder publishes its own through `compile_specs() -> list[CompileSpec]`.
    """

    name: str  # unique among all modules
    kernel: triton.JITFunction
    # Run-time parameters: "*bf16" a pointer (taken as aligned to 16 bytes, as torch allocates), "i32" or "fp32" a
    # scalar, "i32:16" one that is a multiple of 16, "tensordesc<bf16[128, 64]>" a descriptor and its block. A parameter
    # that is specialised to 1 or None is a constexpr.
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]  # but PDL, which goes by the GPU
    num_warps: int
    num_stages: int
    capabilities: tuple[int, ...] = (80, 90)  # those that it is served on

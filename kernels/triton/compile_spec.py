"""What compiling one kernel ahead of time takes."""

from typing import NamedTuple

import triton


class CompileSpec(NamedTuple):
    """One specialisation of a kernel, as a launch on the device would ask for it."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int

"""What the offline compile test needs to know of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import triton


class CompileSpec(NamedTuple):
    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int

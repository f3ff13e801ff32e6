"""Registers, spills and shared memory of every Triton kernel, compiled for sm_80 and sm_90 without a GPU.

With --record the table becomes the one that the tests hold the kernels to.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vlmrt.kernels.triton
from vlmrt.kernels.triton.compile_spec import CompileSpec

RECORD = Path(__file__).parent.parent / "results" / "kernel_resources.json"


class Resources(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # per thread
    spilled_bytes: int  # per thread, of local memory
    shared_bytes: int  # per program
    num_warps: int


def published_specs() -> Iterator[CompileSpec]:
    """The specs of every module of kernels/triton that has compile_specs()."""
    for module in pkgutil.iter_modules(vlmrt.kernels.triton.__path__, "vlmrt.kernels.triton."):
        compile_specs = getattr(importlib.import_module(module.name), "compile_specs", None)
        if compile_specs is not None:
            yield from compile_specs()


def compiled_resources(spec: CompileSpec, capability: int) -> Resources:
    names = list(spec.kernel.arg_names)
    constexprs = dict(spec.constexprs)
    if "PDL" in names:
        constexprs["PDL"] = capability >= 90
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind, _, multiple = ("constexpr" if name in constexprs else spec.signature[name]).partition(":")
        signature[name] = kind
        if multiple or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", int(multiple or 16)]]
    source = ASTSource(spec.kernel, signature, constexprs, attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, spec.num_warps)


def all_resources() -> dict[str, Resources]:
    """Resources by "name sm_NN"."""
    return {
        f"{spec.name} sm_{capability}": compiled_resources(spec, capability)
        for spec in published_specs()
        for capability in spec.capabilities
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    options = parser.parse_args()
    found = all_resources()
    document = json.dumps({name: resources._asdict() for name, resources in sorted(found.items())}, indent=1)
    if options.json:
        print(document)
        return
    if options.record:
        RECORD.write_text(document + "\n")
    print(f"{'kernel':56} {'registers':>9} {'spilled B':>9} {'shared B':>9} {'warps':>5}")
    for name, resources in found.items():
        registers, spilled, shared, warps = resources
        print(f"{name:56} {registers:9} {spilled:9} {shared:9} {warps:5}")


if __name__ == "__main__":
    main()

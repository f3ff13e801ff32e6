"""Whether an op is being recorded into a graph that leaves torch, where only torch's own operators may be."""

import torch


def is_traced() -> bool:
    return torch.compiler.is_compiling()

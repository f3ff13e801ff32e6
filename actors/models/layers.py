"""Tensor-parallel linear, embedding and norm layers: plain parameters, filled through targets()."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrt.kernels.linear import linear


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its group; the default is a group of one, which communicates nothing."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' columns side by side: [R, N] -> [R, size * N]."""
        if self.size == 1:
            return x
        rows, columns = x.shape
        gathered = x.new_empty(self.size * rows, columns)
        # torch 2.13 renames it and warns about the old name, which is all that torch 2.11 has
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(gathered, x.contiguous(), group=self.group)
        return gathered.view(self.size, rows, columns).transpose(0, 1).reshape(rows, self.size * columns)


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of a checkpoint goes: all of it, or the part of one dimension that is this rank's."""

    into: Tensor  # a view of a parameter
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    dim: int | None = None  # dimension that ranks share; None: every rank holds all of it
    start: int = 0  # this rank's first index in dim; it takes as many as there are, up to into's size

    @property
    def stop(self) -> int:
        """Past this rank's last index in dim; less than into's size beyond start where into is padded."""
        assert self.dim is not None
        return min(self.start + self.into.shape[self.dim], self.shape[self.dim])


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class MergedColumnLinear(nn.Module):
    """Several projections of one input as one product, each split by output rows over the ranks.

    Shapes: [T, in_features] -> [T, sum of the parts' sizes / tp.size], the parts in order.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.tp = tp
        rows = sum(parts.values()) // tp.size
        self.weight = parameter(rows, in_features, dtype=dtype, device=device)
        self.bias = parameter(rows, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the projection, the bias that it still lacks), for an operation that adds a bias on its way.

        On a CPU the bias is in it: there the product adds it for less than another pass would.
        """
        if x.device.type == "cpu":
            return self(x), None
        return linear(x, self.weight), self.bias

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """The parts' tensors; prefix is the path of the module they are children of, with its dot."""
        first = 0
        for name, size in self.parts.items():
            rows = size // self.tp.size
            start = self.tp.rank * rows
            weight = self.weight[first : first + rows]
            yield f"{prefix}{name}.weight", Target(weight, (size, self.weight.shape[1]), 0, start)
            if self.bias is not None:
                yield f"{prefix}{name}.bias", Target(self.bias[first : first + rows], (size,), 0, start)
            first += rows


class RowLinear(nn.Module):
    """A projection split by input columns over the ranks; its output is summed over them.

    Shapes: [T, in_features / tp.size] -> [T, out_features]. No bias: none of the families has one here.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter(out_features, in_features // tp.size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(linear(x, self.weight))

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """prefix is the path of this module, with its dot."""
        rows, columns = self.weight.shape
        shape = (rows, columns * self.tp.size)
        yield f"{prefix}weight", Target(self.weight, shape, 1, self.tp.rank * columns)


class Linear(nn.Module):
    """A projection that every rank, or a tower that is not split, holds whole."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        return whole_targets(self, prefix)


class VocabParallelEmbedding(nn.Module):
    """Token embeddings and, with logits(), the output head: vocabulary rows split over the ranks, padded to divide.

    The two are one module because a tied checkpoint has one table for both.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = tp
        rows = -(-vocab_size // tp.size)
        self.start = tp.rank * rows
        self.weight = parameter(rows, hidden_size, dtype=dtype, device=device)
        if tp.size * rows != vocab_size:
            self.weight.zero_()

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, vocab_size] in the weights' dtype, gathered from all ranks."""
        return self.tp.all_gather(linear(hidden, self.weight))[:, : self.vocab_size]

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        shape = (self.vocab_size, self.weight.shape[1])
        yield f"{prefix}weight", Target(self.weight, shape, 0, self.start)


class Norm(nn.Module):
    """The parameters of a normalisation: a weight and, for LayerNorm, a bias."""

    def __init__(self, size: int, eps: float, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(size, dtype=dtype, device=device)
        self.bias = parameter(size, dtype=dtype, device=device) if bias else None

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        return whole_targets(self, prefix)


def whole(into: Tensor) -> Target:
    """All of a tensor of the checkpoint, which has into's shape."""
    return Target(into, tuple(into.shape))


def whole_targets(module: nn.Module, prefix: str) -> Iterator[tuple[str, Target]]:
    """Every parameter of a module under its own name, held whole."""
    for name, value in module.named_parameters():
        yield f"{prefix}{name}", whole(cast(Tensor, value))

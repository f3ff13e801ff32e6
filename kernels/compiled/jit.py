"""How kernels become machine code: compiled once per machine, for one signature each, when they are imported."""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")

# What lets sums and products go into vector registers. Not among them: nnan and ninf, for NaN and inf have to arrive.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


def compiled(num_integers: int, num_floats: int = 0) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A function of that many int64 (addresses, sizes, strides), then float64 parameters, compiled for nothing else.

    The machine code is kept in __pycache__ beside the source or, where that cannot be written, in the user's cache
    directory (NUMBA_CACHE_DIR overrides both); where there is neither, every process compiles for itself. A cached
    kernel does not notice that a function it calls, in another file, has changed: touch the kernel's file.
    """
    signature = types.void(*[types.int64] * num_integers, *[types.float64] * num_floats)

    def compile_or_load(function: Callable[P, None]) -> Callable[P, None]:
        try:
            return _njit(function, [signature], cache=True, fastmath=FAST_MATH)
        except (RuntimeError, OSError):  # no directory for the cache, or none with room
            return _njit(function, [signature], fastmath=FAST_MATH)

    return compile_or_load


def called(function: Callable[P, R]) -> Callable[P, R]:
    """A function for kernels to call, which becomes a part of them."""
    return _njit(function, fastmath=FAST_MATH)


def called_strictly(function: Callable[P, R]) -> Callable[P, R]:
    """As called, its operations in the order in which they are written, save that a * b + c may be rounded once."""
    return _njit(function, fastmath={"contract"})


def _njit(function: Callable[P, R], *signatures: list[Any], **options: Any) -> Callable[P, R]:
    return njit(*signatures, nogil=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]


class Floats(Protocol):
    """Float32 in memory, by index; there is no check of bounds."""

    def __getitem__(self, index: int) -> np.float32: ...

    def __setitem__(self, index: int, value: np.float32) -> None: ...


class Integers(Protocol):
    """Integers in memory, by index; there is no check of bounds."""

    def __getitem__(self, index: int) -> int: ...

    def __setitem__(self, index: int, value: int) -> None: ...


def _memory(element: Any) -> Any:
    """A function of an address and an index: the memory from that element on.

    Kernels take addresses, not arrays: a NumPy view of a tensor takes 5 us to make and to hand over, an address 0.4 us.
    """

    def memory(_typing: Any, address: Any, start: Any) -> Any:
        pointer = types.CPointer(element)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            first = builder.inttoptr(arguments[0], context.get_value_type(pointer))
            return builder.gep(first, [arguments[1]])

        return pointer(types.int64, types.int64), generate

    return intrinsic(memory)


floats: Callable[[int, int], Floats] = _memory(types.float32)
ints: Callable[[int, int], Integers] = _memory(types.int32)
longs: Callable[[int, int], Integers] = _memory(types.int64)

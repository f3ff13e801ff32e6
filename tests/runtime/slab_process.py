"""One side of a CudaSlab without torch: `python -m tests.runtime.slab_process`, told line by line what to do.

create          -> the export, msgpack in hexadecimal      open EXPORT  -> "open", after closing what was open
write PAGE SEED -> the checksum of what was written        read PAGE    -> the checksum of what is there
sms             -> how many SMs this process may use       close        -> "closed"
"""

from __future__ import annotations

import sys
import zlib

import msgspec
import numpy as np

from vlmrt.runtime.cuda_ipc import CudaSlab, _call, _cudart
from vlmrt.runtime.messages import CudaSlabExport

NUM_PAGES = 1024
PAGE_ROWS = 16
WIDTH = 1536
PAGE_BYTES = PAGE_ROWS * WIDTH * 2


class Side:
    def __init__(self) -> None:
        self._slab: CudaSlab | None = None
        self._page = np.empty(PAGE_BYTES, np.uint8)

    def do(self, command: str, *arguments: str) -> str:
        cudart = _cudart()
        match command:
            case "create":
                self._slab = CudaSlab.create(0, num_pages=NUM_PAGES, page_rows=PAGE_ROWS, width=WIDTH, dtype="bfloat16")
                return msgspec.msgpack.encode(self._slab.export()).hex()
            case "open":
                self._close()
                export = msgspec.msgpack.decode(bytes.fromhex(arguments[0]), type=CudaSlabExport)
                self._slab = CudaSlab.open(0, export)
                return "open"
            case "write":
                self._page[:] = np.random.default_rng(int(arguments[1])).integers(0, 256, PAGE_BYTES, np.uint8)
                kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
                _call(cudart, "cudaMemcpy", self._address(arguments[0]), self._page.ctypes.data, PAGE_BYTES, kind)
                _call(cudart, "cudaDeviceSynchronize")
            case "read":
                kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
                _call(cudart, "cudaMemcpy", self._page.ctypes.data, self._address(arguments[0]), PAGE_BYTES, kind)
            case "sms":
                _call(cudart, "cudaFree", 0)  # makes the context
                attribute = cudart.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
                return str(_call(cudart, "cudaDeviceGetAttribute", attribute, 0))
            case _:
                self._close()
                return "closed"
        return str(zlib.crc32(self._page.data))

    def _address(self, page: str) -> int:
        assert self._slab is not None
        return self._slab._address + int(page) * PAGE_BYTES

    def _close(self) -> None:
        if self._slab is not None:
            self._slab.close()
            self._slab = None


def main() -> None:
    side = Side()
    for line in sys.stdin:
        print(side.do(*line.split()), flush=True)


if __name__ == "__main__":
    main()

"""A projection: rows times a weight, and a bias; also with the SwiGLU gate of its halves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrt.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from vlmrt.kernels.tracing import is_traced

MAX_FEW_ROWS = 32

# (least columns N, most rows T) that the Triton kernels serve; for the rest cuBLAS is as fast. Microseconds of cuBLAS
# and ours on an H100 on both sides of the table's edges, 2B: K = 1536 (down: 8960), 7B: K = 3584:
#   T  2  N   1536  5.3 and  3.3 (down 14.1 and 10.7)    N   3584  12.0 and  10.5    N   4608  14.4 and 13.4
#   T  4  N   1536  5.3 and  5.0 (down 14.0 and 20.4)    N   3584  11.9 and  13.6    N   4608  14.3 and 16.6
#   T 64  N 151936   206 and 173                         N 152064   464 and   380
STREAMED = ((32768, 64), (1536, 2))
# The same of gated products, N being half of the weight's rows. cuBLAS is followed by silu_and_mul, 2.5 more:
#   T  2  N   8960  23.0 and 21.3    N  18944   113 and  94
#   T 16  N   8960  23.3 and 23.9    N  18944   116 and  96
#   T 32  N   8960  24.2 and 26.1    N  18944   117 and 108
#   T 64  N   8960  24.7 and 27.3    N  18944   125 and 104
STREAMED_GATED = ((16384, 64), (8192, 16), (1536, 2))


def is_streamed(num_rows: int, num_columns: int, K: int, is_gated: bool = False) -> bool:
    """Whether a product of the GPU is served by the Triton kernels; K % 16: they load 16 bytes of aligned rows."""
    table = STREAMED_GATED if is_gated else STREAMED
    most_rows = next((rows for columns, rows in table if num_columns >= columns), 0)
    return 1 <= num_rows <= most_rows and K % 16 == 0


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Shapes: x [T, K] contiguous, weight [N, K], bias [N] -> [T, N], same dtype.

    On a CPU, for a few rows of float32, the product is taken as weight @ x.T: MKL then goes along the weight, which is
    what there is to read, and shares it out among threads by its rows (the projections of 6 layers of width 256 and 768
    at 8 rows on an AMD EPYC: 5.6 ms instead of 6.5 on one core, 4.2 instead of 6.0 on two).

    On a GPU, a few rows without bias are served by Triton where is_streamed (x may then have any strides). weight must
    not be written by the kernels of the step, as a model's is not: it is read before they have ended.
    """
    if bias is None and _takes_stream(x, weight, weight.shape[0]):
        from vlmrt.kernels.triton.decode_linear import decode_linear

        return decode_linear(x, weight)
    is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if is_float32_on_cpu and not is_traced() and 1 < x.shape[0] <= MAX_FEW_ROWS:
        product = torch.mm(weight, x.t()).t().contiguous()
        return product if bias is None else product.add_(bias)
    return F.linear(x, weight, bias)


def gated_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul_reference(linear_reference(x, weight))


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of x @ weight.T.

    Shapes: x [T, K], weight [2F, K], the gate's rows first -> [T, F], same dtype. As to the GPU, see linear.
    Raises: ValueError if weight has an odd number of rows.
    """
    if weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows, expected an even number")
    if _takes_stream(x, weight, weight.shape[0] // 2, is_gated=True):
        from vlmrt.kernels.triton.decode_linear import decode_linear

        return decode_linear(x, weight, is_gated=True)
    return silu_and_mul(linear(x, weight))


def _takes_stream(x: Tensor, weight: Tensor, num_columns: int, is_gated: bool = False) -> bool:
    return (
        x.device.type == "cuda"
        and x.dim() == 2
        and is_streamed(x.shape[0], num_columns, x.shape[1], is_gated)
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)  # others have less shared memory than is asked for
    )

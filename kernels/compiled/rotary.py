"""Rotation of heads on a CPU, in float32."""

from torch import Tensor

from vlmrt.kernels.compiled.jit import Floats, called_strictly, compiled, floats


def rotate_on_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, stride = with_whole_tokens(x)
    cos, sin = cos.contiguous(), sin.contiguous()
    num_tokens, num_heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    if num_tokens:
        addresses = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        _rotate(*addresses, stride, num_tokens, num_heads, head_dim)
    return out


def with_whole_tokens(x: Tensor) -> tuple[Tensor, int]:
    """x [T, H, D] if each token's H * D elements are neighbours, else a copy in which they are; tokens' stride."""
    stride, head_stride, element_stride = x.stride()
    if element_stride == 1 and head_stride == x.shape[2]:
        return x, stride
    x = x.contiguous()
    return x, x.stride(0)


@called_strictly
def rotate_heads(x: Floats, cos: Floats, sin: Floats, out: Floats, num_heads: int, head_dim: int) -> None:
    """Rotate one token's heads."""
    half = head_dim // 2
    for start in range(0, num_heads * head_dim, head_dim):
        middle = start + half
        for i in range(half):
            first, second = x[start + i], x[middle + i]
            out[start + i] = second * sin[i] + first * cos[i]
            out[middle + i] = first * sin[half + i] + second * cos[half + i]


@compiled(8)
def _rotate(
    x: int, cos: int, sin: int, out: int, x_stride: int, num_tokens: int, num_heads: int, head_dim: int
) -> None:
    for token in range(num_tokens):
        angles = token * head_dim
        heads, rotated = floats(x, token * x_stride), floats(out, token * num_heads * head_dim)
        rotate_heads(heads, floats(cos, angles), floats(sin, angles), rotated, num_heads, head_dim)

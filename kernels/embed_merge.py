"""Image rows written over the placeholder rows of the hidden states."""

from torch import Tensor


def embed_merge_reference(hidden: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    merged = hidden.clone()
    merged[positions] = rows.to(hidden.dtype)
    return merged


def embed_merge(hidden: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Overwrite hidden[positions[i]] with rows[i], in place.

    Shapes: hidden [T, H], rows [R, H], positions int64 [R], no position twice. rows are cast to hidden's dtype.
    hidden's columns lie side by side.
    Raises: ValueError if the numbers of rows and positions, or the widths, differ.
    """
    if rows.shape != (positions.shape[0], hidden.shape[1]):
        raise ValueError(
            f"rows have shape {list(rows.shape)}, expected {[positions.shape[0], hidden.shape[1]]}: "
            "one row of hidden's width per position"
        )
    if hidden.device.type == "cuda":
        from vlmrt.kernels.triton.embed_merge import embed_merge_triton

        embed_merge_triton(hidden, rows, positions)
    else:
        hidden.index_copy_(0, positions, rows.to(hidden.dtype))

"""Products with a matrix of any float dtype, in float32, a block of rows at a time.

L: rows, S: columns, B: columns of a thin block. A float32 copy of the entire matrix would take memory, and
every pass over it would miss the cache; a block of rows stays in the cache. A GPU does not profit from small
blocks and gets the matrix in one.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from svdconvert.linalg.gemm import add_matmul_f32, matmul_f32

# Elements per block: 1.5 MB in float32. A block of 2 MB or more would be allocated in separate huge pages,
# and the gaps between them make the heap grow during a run.
_BLOCK = 3 << 17
_WHOLE = 1 << 21  # elements of a float32 matrix that need no blocks: it stays in the last cache
_PANEL = 2048  # columns
_TINY = 1e-30
_LOW_BLOCK = 1 << 21  # elements per block in bfloat16: 4 MB, which the second product finds in the cache


def row_blocks(matrix_LS: Tensor) -> Iterator[slice]:
    """Slices of rows that bound the float32 copies of a large matrix."""
    rows = matrix_LS.shape[0]
    step = rows_of_a_block(matrix_LS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def rows_of_a_block(matrix_LS: Tensor) -> int:
    """The number of rows in a block of this matrix; at least one."""
    return _rows(matrix_LS, _BLOCK)


def rows_at_once(rows: int, columns: int) -> int:
    """The same for a matrix of this shape that is not in memory yet."""
    return max(1, min(rows, _BLOCK // max(1, columns)))


def _rows(matrix_LS: Tensor, elements: int) -> int:
    rows, columns = matrix_LS.shape
    return max(1, min(rows, elements // max(1, columns)) if matrix_LS.device.type == "cpu" else rows)


def _is_transposed(matrix_LS: Tensor) -> bool:
    return matrix_LS.stride(0) == 1 and matrix_LS.stride(1) > 1


def in_float32(matrix_LS: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows in float32); views if the matrix is float32 and small or its rows are contiguous."""
    if matrix_LS.dtype == torch.float32 and matrix_LS.numel() <= _WHOLE:
        yield slice(0, len(matrix_LS)), matrix_LS
        return
    wide = _is_transposed(matrix_LS)
    for rows in row_blocks(matrix_LS):
        # Columns of the stored matrix are copied as they lie: each product would copy a view again.
        yield rows, matrix_LS.T[:, rows].float().contiguous().T if wide else matrix_LS[rows].float()


def times(matrix_LS: Tensor, thin_SB: Tensor) -> Tensor:
    """W X in float32, (L, B)."""
    if _is_transposed(matrix_LS):
        return _transposed_times(matrix_LS.T, thin_SB)
    product_LB = thin_SB.new_empty(matrix_LS.shape[0], thin_SB.shape[1])
    for rows, part in in_float32(matrix_LS):
        product_LB[rows] = matmul_f32(part, thin_SB)
    return product_LB


def _transposed_times(stored_SL: Tensor, thin_SB: Tensor) -> Tensor:
    """stored^T X, summed over blocks of rows as stored, because contiguous rows are quicker to convert.

    One panel of columns after another, so that a block has many rows and the sum stays in the cache.
    """
    product_BL = thin_SB.new_zeros(thin_SB.shape[1], stored_SL.shape[1])
    width = _PANEL if stored_SL.device.type == "cpu" else stored_SL.shape[1]
    panels = zip(torch.split(stored_SL, width, 1), torch.split(product_BL, width, 1), strict=True)
    for stored_SP, sum_BP in panels:
        for rows in row_blocks(stored_SP):
            add_matmul_f32(sum_BP, thin_SB[rows].T.contiguous(), stored_SP[rows].float())
    return product_BL.T


def gram_times(matrix_LS: Tensor, thin_SB: Tensor) -> Tensor:
    """W^T W X in float32, (S, B): both products while a block of rows is in the cache."""
    if _is_transposed(matrix_LS):
        sum_SB = torch.zeros_like(thin_SB)
        for _, part in in_float32(matrix_LS):
            add_matmul_f32(sum_SB, part.T, matmul_f32(part, thin_SB))
        return sum_SB
    sum_BS = thin_SB.new_zeros(thin_SB.shape[1], thin_SB.shape[0])
    for _, part in in_float32(matrix_LS):
        # Y^T W is up to 1.5 times as fast as W^T Y.
        add_matmul_f32(sum_BS, matmul_f32(part, thin_SB).T.contiguous(), part)
    return sum_BS.T


def low_gram_times(low_LS: Tensor, thin_SB: Tensor) -> Tensor:
    """`gram_times` for a matrix in a narrow dtype, with products in that dtype and their sums in float32.

    Each product has the matrix as it is stored, and the thin block with contiguous rows: W^T Y would take
    twice as long as Y^T W, because oneDNN first makes a transposed copy of W (AMX, AVX512-BF16).
    """
    thin_BS = thin_SB.to(low_LS.dtype).T.contiguous()
    if _is_transposed(low_LS):
        return _low_gram_times_wide(low_LS.T, thin_BS).T
    sum_BS = torch.zeros(thin_BS.shape, device=thin_BS.device)
    for part in torch.split(low_LS, _rows(low_LS, _LOW_BLOCK)):
        sum_BS += linear(part, thin_BS).T.contiguous() @ part
    return sum_BS.T


def _low_gram_times_wide(low_SL: Tensor, thin_BS: Tensor) -> Tensor:
    """X^T V V^T in float32, (B, S), for a matrix V of shape (S, L) as it is stored."""
    parts = torch.split(low_SL, _rows(low_SL, _LOW_BLOCK))
    product_BL = torch.zeros(len(thin_BS), low_SL.shape[1], device=thin_BS.device)
    for part, thin in zip(parts, torch.split(thin_BS, len(parts[0]), 1), strict=True):
        product_BL += thin.contiguous() @ part
    low_BL = product_BL.to(low_SL.dtype)
    return torch.cat([linear(part, low_BL) for part in parts]).float().T


def low_gram(low_LS: Tensor) -> Tensor:
    """W^T W in float32, (S, S), of a matrix in bfloat16 on a GPU: exact products, sums in float32."""
    return torch.mm(low_LS.T, low_LS, out_dtype=torch.float32)


def gram(matrix_LS: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T W in float32 or float64, (S, S)."""
    sum_SS = matrix_LS.new_zeros(matrix_LS.shape[1], matrix_LS.shape[1], dtype=dtype)
    for _, part in in_float32(matrix_LS):
        wide = part.to(dtype)
        add_matmul_f32(sum_SS, wide.T, wide)
    return sum_SS


def total_energy(matrix_LS: Tensor) -> float:
    """||W||_F^2."""
    stored = matrix_LS.T if _is_transposed(matrix_LS) else matrix_LS
    return energy_of(part for _, part in in_float32(stored))


def energy_of(parts: Iterable[Tensor]) -> float:
    """The sum of all squares of float32 blocks: along memory in float32, and of these sums in float64.

    A single float32 sum over a large matrix would be wrong by 5e-4.
    """
    norms = [torch.linalg.vector_norm(part, dim=1 if part.stride(1) == 1 else 0) for part in parts]
    return float(torch.cat(norms).double().square().sum()) if norms else 0.0


def held_by_float32(energy: float) -> bool:
    """True if a sum of squares of this size neither overflows nor loses digits in float32."""
    return _TINY < energy < 1.0 / _TINY


def energy_outside(matrix_LS: Tensor, left_LB: Tensor, right_BS: Tensor) -> float:
    """||W - left right||_F^2."""
    return energy_of(part - matmul_f32(left_LB[rows], right_BS) for rows, part in in_float32(matrix_LS))

"""Elements of rows in the order of their magnitudes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_kit.methods.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor


def ascending(rows: Tensor) -> Tensor:
    """Return, for each row, its columns from the smallest magnitude to the largest.

    Of equal magnitudes the lower column comes first. The order of one row does not depend on the
    others.

    Args:
        rows: (rows, columns), float32 or float64, contiguous; stays as it is.

    Returns:
        (rows, columns), int64.
    """
    magnitudes = rows.abs()
    order = _by_float32(magnitudes.to(torch.float32))
    if rows.dtype == torch.float64:
        _mend(order, magnitudes)
    return order


def _by_float32(magnitudes: Tensor) -> Tensor:
    """Sort pairs of magnitude and column, each packed into one integer: no slow argsort.

    The bits of floats that are not negative are in the order of the floats.
    """
    packed = torch.empty(magnitudes.shape, dtype=torch.int64).copy_(magnitudes.view(torch.int32))
    packed.bitwise_left_shift_(32).bitwise_or_(torch.arange(magnitudes.shape[1]))
    packed.numpy().sort(axis=-1)
    return packed.bitwise_and_(2**32 - 1)


def _mend(order: Tensor, magnitudes: Tensor) -> None:
    """Sort the rows again in which float64 magnitudes were equal in float32, and are not."""
    sorted_ = torch.gather(magnitudes, 1, order)
    for row in (sorted_[:, 1:] < sorted_[:, :-1]).any(1).nonzero()[:, 0].tolist():
        mended = np.argsort(magnitudes[row].numpy(), kind="stable")
        order[row].copy_(torch.from_numpy(mended))

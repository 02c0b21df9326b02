"""Sums of what ranks have made of rows, as the backend adds them."""

from torch import Tensor

from reprise.distributed import communicator


def combine(
    y: Tensor,
    rows_ids: Tensor,
    ids: Tensor,
    first: int,
    count: int,
    stride: int,
    out: Tensor,
    group: str,
) -> None:
    """In the compute dtype and in the backend's order, which differs from rank to rank."""
    communicator(group).reduce_scatter(y, out)

from torch import Tensor

from reprise.distributed import communicator


def all_reduce(x: Tensor, group: str) -> None:
    """Replace ``x`` by the sum of every rank's, the same bits on each.

    Args:
        x: Any shape, contiguous; every rank has the same.
        group: Name of the ranks' group, see :class:`reprise.distributed.Group`.
    """
    communicator(group).all_reduce(x)


def all_reduce_add(partial: Tensor, residual: Tensor, group: str) -> None:
    """Add the sum of every rank's ``partial`` to ``residual``, which all ranks have alike.

    The sum is rounded to its dtype before it is added, as a product of one rank is.

    Args:
        partial: [T, D], contiguous; what it holds afterwards is not defined.
        residual: [T, D], updated in place.
        group: Name of the ranks' group.
    """
    communicator(group).all_reduce(partial)
    residual.add_(partial)

from torch import Tensor

from reprise.distributed import communicator
from reprise.ops.rms_norm.reference import reference as rms_norm


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


def all_reduce_add_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> Tensor:
    """:func:`all_reduce_add`, and the root mean square norm of what ``residual`` is then.

    Args:
        partial: [T, D], contiguous; what it holds afterwards is not defined.
        residual: [T, D], updated in place.
        weight: [D], the norm's gain; of the dtype of ``residual`` or float32.
        eps: Of the norm.
        group: Name of the ranks' group.

    Returns:
        [T, D], contiguous: see :func:`reprise.ops.rms_norm`.
    """
    all_reduce_add(partial, residual, group)
    return rms_norm(residual, weight, eps)


def fake_all_reduce_add_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> Tensor:
    return residual.new_empty(residual.shape)

from torch import Tensor

from reprise.distributed import communicator


def all_gather(x: Tensor, out: Tensor, group: str) -> None:
    """Write every rank's columns side by side, in the order of ranks.

    Args:
        x: [R, P]; every rank has the same shape.
        out: [R, C] of at most as many columns as all ranks have together; the rest is padding.
        group: Name of the ranks' group, see :class:`reprise.distributed.Group`.
    """
    gathered = communicator(group).all_gather(x)
    ranks, rows, columns = gathered.shape
    out.copy_(gathered.transpose(0, 1).reshape(rows, ranks * columns)[:, : out.shape[1]])

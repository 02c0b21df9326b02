import torch
from torch import Tensor

from reprise.distributed import communicator


def dispatch(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    first: int,
    count: int,
    stride: int,
    rows: Tensor,
    rows_weights: Tensor,
    rows_ids: Tensor,
    group: str,
) -> None:
    """Fetch the rows that this rank's experts compute, from every rank of a group.

    Here every rank gets all rows of all ranks, which is right for any routing and sends each row
    once whatever it asks for. An implementation may send a row only to ranks whose experts it
    wants: what it does not send is a row of no expert, whose content is not read.

    Args:
        x: [T, D], contiguous; every rank has as many, padding included.
        weights: [T, K] float32.
        ids: [T, K] int32, the experts of each row by their numbers among all; others (-1 of
            padding) are no expert's.
        first: Of this rank's experts, by its number among all.
        count: Experts of this rank, and of each other.
        stride: From this rank's first expert to the next one's.
        rows: [N, D], written: N is T times the ranks of the group.
        rows_weights: [N, K] float32, written.
        rows_ids: [N, K] int32, written: numbers among this rank's experts, and -1.
        group: Name of the ranks' group, see :class:`reprise.distributed.Group`.
    """
    communicator(group).all_gather(x, rows)
    gather_routes(weights, ids, first, count, rows_weights, rows_ids, group)


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
    """Give each row back the sum of what the experts of all ranks have made of it: the inverse of
    :func:`dispatch`.

    What ranks have made of a row is added in their order, in float32, and rounded once: its bits
    depend neither on which rank's row it is nor on how rows travel.

    Args:
        y: [N, D], contiguous: what this rank's experts give for the rows that it has got; 0 for
            those of no expert.
        rows_ids: [N, K] int32, as :func:`dispatch` wrote them: which rows these are.
        ids: [T, K] int32, as they were given to :func:`dispatch`: which ranks have got each row.
        first: As there.
        count: As there.
        stride: As there.
        out: [T, D], contiguous, written.
        group: Name of the ranks' group.
    """
    ranks = communicator(group)
    found = torch.empty_like(y)
    ranks.all_to_all(y, found)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for each in found.view(ranks.group.size, *out.shape):
        total += each
    out.copy_(total)


def gather_routes(
    weights: Tensor,
    ids: Tensor,
    first: int,
    count: int,
    rows_weights: Tensor,
    rows_ids: Tensor,
    group: str,
) -> None:
    """Write where the rows of all ranks go; arguments are those of :func:`dispatch`."""
    routes = torch.cat((weights.view(torch.int32), ids), dim=1)
    routes = communicator(group).all_gather(routes).view(len(rows_ids), -1)
    top = ids.shape[1]
    rows_weights.copy_(routes[:, :top].contiguous().view(torch.float32))
    rows_ids.copy_(own_ids(routes[:, top:], first, count))


def own_ids(ids: Tensor, first: int, count: int) -> Tensor:
    """Numbers of experts among all as numbers among ``count`` of them from ``first`` on; -1 for
    all others."""
    own = ids - first
    return own.masked_fill_((own < 0) | (own >= count), -1)

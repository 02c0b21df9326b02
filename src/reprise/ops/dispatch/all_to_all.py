"""Rows are sent to the ranks that have one of their experts, and to no others.

How many rows travel is known on the host before they do, which it waits for: a graph of an
accelerator cannot hold that. One of the CPU can, where an op is one call.
"""

import torch
from torch import Tensor

from reprise.distributed import communicator
from reprise.distributed.group import Group
from reprise.ops.dispatch.reference import gather_routes
from reprise.ops.implementation import GraphSupport
from reprise.platforms import Platform


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
    gather_routes(weights, ids, first, count, rows_weights, rows_ids, group)
    ranks = communicator(group)
    wanted, come = _wanted(ids, first, count, stride, ranks.group), _got(rows_ids, ids)
    sent, received = _counts(wanted, come)
    arrived = x.new_empty(sum(received), x.shape[1])
    ranks.all_to_all(x[wanted.nonzero()[:, 1]], arrived, sent, received)
    rows[come.view(-1)] = arrived


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
    ranks = communicator(group)
    wanted, come = _wanted(ids, first, count, stride, ranks.group), _got(rows_ids, ids)
    received, sent = _counts(wanted, come)
    arrived = y.new_empty(sum(received), y.shape[1])
    ranks.all_to_all(y[come.view(-1)], arrived, sent, received)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for mine, each in zip(wanted, arrived.split(received), strict=True):
        total[mine] += each
    out.copy_(total)


def graph_support(platform: Platform) -> GraphSupport:
    """Where a graph records whole ops it may be in one."""
    return "always" if platform.is_the_host else "never"


def _wanted(ids: Tensor, first: int, count: int, stride: int, group: Group) -> Tensor:
    """[size, T] bool: which of this rank's rows each rank has an expert of."""
    firsts = first + stride * (torch.arange(group.size, device=ids.device) - group.rank)
    own = ids - firsts[:, None, None]
    return ((own >= 0) & (own < count)).any(-1)


def _got(rows_ids: Tensor, ids: Tensor) -> Tensor:
    """[size, T] bool: which rows of each rank have an expert here."""
    return (rows_ids >= 0).any(1).view(-1, len(ids))


def _counts(wanted: Tensor, come: Tensor) -> tuple[list[int], list[int]]:
    """Of both, how many rows of each rank; the host waits for the device once."""
    both: list[list[int]] = torch.stack((wanted, come)).sum(-1).tolist()
    return both[0], both[1]

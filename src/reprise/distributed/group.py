"""Which part of a model each of several ranks owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from reprise.errors import ModelError


class Share(NamedTuple):
    """What one rank has of things that stand in a row."""

    begin: int
    """Number of the first."""
    size: int
    """How many this rank has."""
    total: int
    """How many all ranks have together."""


class Host(NamedTuple):
    """Where a rank's process runs."""

    name: str
    """Equal for ranks that share memory, and for no others."""
    address: str
    """By which the others reach it."""


HERE = Host("", "127.0.0.1")
"""Of ranks that are all on one host, whose name need not resolve."""


@dataclass(frozen=True)
class Group:
    """Ranks that compute one model together. Layers get it with their build; ops get its name."""

    name: str
    """By which ops find the communicator."""
    rank: int
    """Ours, from 0 on."""
    size: int
    """Ranks there are."""
    hosts: tuple[Host, ...] = ()
    """Of each rank; none: all are on this one."""

    @property
    def host(self) -> Host:
        """Ours."""
        return self.hosts[self.rank] if self.hosts else HERE

    @property
    def leader(self) -> Host:
        """Rank 0's."""
        return self.hosts[0] if self.hosts else HERE

    @property
    def on_one_host(self) -> bool:
        """Whether ranks can share memory at all."""
        return len(set(self.hosts)) <= 1

    @property
    def beside(self) -> int:
        """Ranks on our host, this one included."""
        return self.hosts.count(self.host) if self.hosts else self.size

    def share(self, total: int, what: str, grain: int = 1) -> Share:
        """Ours of ``total`` things, equally many for each rank.

        Args:
            total: All of them.
            what: Their name, for the error.
            grain: So many stay together.

        Raises:
            ModelError: They cannot be shared out so.
        """
        if total % (self.size * grain):
            together = f" in groups of {grain}" if grain > 1 else ""
            raise ModelError(
                f"tensor_parallel_size={self.size} does not divide {what}={total}{together}"
            )
        size = total // self.size
        return Share(self.rank * size, size, total)

    def share_or_copy(self, total: int, what: str) -> Share:
        """As :meth:`share`; where there are more ranks than things, several have the same one.

        Raises:
            ModelError: Neither number divides the other.
        """
        if total >= self.size:
            return self.share(total, what)
        if self.size % total:
            raise ModelError(
                f"tensor_parallel_size={self.size} is no multiple of {what}={total}, so that not "
                "every one would be on as many ranks"
            )
        return Share(self.rank * total // self.size, 1, total)

    def rows_of_vocabulary(self, total: int) -> tuple[Share, int]:
        """Ours of the rows of an embedding or a head, and the rows that each rank has room for: the
        last ranks may have fewer."""
        room = -(-total // self.size)
        begin = min(self.rank * room, total)
        return Share(begin, min(room, total - begin), total), room


ALONE = Group("alone", 0, 1)
"""One rank, which owns everything."""
ECHO = Group("echo", 0, 2)
"""Two ranks of which the other has what this one has: for what is compared within one process."""


def own_experts(group: Group, exchange: Group, total: int) -> Share:
    """Which of ``total`` experts a rank has, where whole experts are spread over the ranks of
    several groups: equally many on each, in a row.

    Args:
        group: Ours: its ranks compute the same rows.
        exchange: The ranks of our number in all groups, which exchange rows.
        total: Experts.

    Raises:
        ModelError: Not every rank would have equally many.
    """
    ranks = group.size * exchange.size
    if total % ranks:
        sizes = [each for each in range(1, total + 1) if total % each == 0]
        raise ModelError(
            f"enable_expert_parallel: {ranks} ranks do not divide {total} experts; so many do: "
            f"{', '.join(map(str, sizes))}"
        )
    size = total // ranks
    return Share((exchange.rank * group.size + group.rank) * size, size, total)

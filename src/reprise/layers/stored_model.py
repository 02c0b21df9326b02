from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reprise.cache import LayerCache
from reprise.cache.spec import caches_of


class StoredModel(nn.Module):
    """What has a checkpoint: a model, or a head that drafts for one.

    Args:
        renames: Prefixes of names that checkpoints may have, to those that this model has.
        others: Prefixes, as this model has them, of what a checkpoint may store beside and is not
            computed here, such as the part that reads images.
    """

    def __init__(
        self, renames: Mapping[str, str] | None = None, others: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.renames: Mapping[str, str] = renames or {}
        self.others = others

    def untie(self, name: str, weight: Tensor) -> bool:
        """Give a tensor a value of its own that it shares with another one, as a checkpoint has it.

        Returns:
            Whether this model can.
        """
        return False

    def caches(self) -> dict[str, LayerCache]:
        """What the layers keep from step to step, in the order in which they were made."""
        return caches_of(self)

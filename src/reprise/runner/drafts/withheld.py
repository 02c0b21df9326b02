"""Drafts that requests do not want."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reprise.ops.step import NEXT
from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.runner.rows import Rows
from reprise.step import Step


class Withheld:
    """Takes back what was drafted for requests beyond their ``num_drafts``. They are computed with
    the others all the same, so that a step's requests stay alike.

    Args:
        rows: The requests.
        platform: The device.
    """

    def __init__(self, rows: Rows, platform: Platform) -> None:
        self._rows, self._platform = rows, platform
        self._step_rows: list[int] = []
        self._wanted: Tensor | None = None
        """[K, R] bool: of the requests of the last step; None: they want all drafts."""

    def apply(self, step: Step, rows: Tensor) -> None:
        """Drafts have been made for the step's requests, whose rows are [R] int64."""
        if step.admitted or self._step_rows != step.rows:
            self._step_rows, self._wanted = list(step.rows), self._of(step)
        if self._wanted is not None:
            drafts = self._rows.numbers[NEXT + 1 :]
            kept = torch.where(self._wanted, drafts.index_select(1, rows), -1)
            drafts.index_copy_(1, rows, kept)

    def _of(self, step: Step) -> Tensor | None:
        most = self._rows.num_drafts
        limits = np.full(len(step.rows), most, dtype=np.int64)
        for number, row in enumerate(step.rows):
            owner = self._rows.admitted[row]
            if owner is not None and owner.params.num_drafts is not None:
                limits[number] = owner.params.num_drafts
        if (limits >= most).all():
            return None
        return to_device(np.arange(most)[:, None] < limits, self._platform)

    def memory(self) -> dict[str, Tensor]:
        """What lies on the device from step to step, by name."""
        return {} if self._wanted is None else {"drafts that are wanted": self._wanted}

"""Which tests compute on the device that was asked for."""

from __future__ import annotations

import pytest

NAMES = {"device", "platform"}
"""Fixtures that say where."""
OF_THE_SIMULATED = "sim"
"""Directory of the tests that take it as the module that it is."""


def takes_it(item: pytest.Item) -> bool:
    """Whether a test asks for the device, itself or by another fixture. What does not computes on
    the CPU, or nothing: neither another device nor another seed of its delays changes that."""
    names = set(getattr(item, "fixturenames", ()))
    return bool(names & NAMES) or item.path.parent.name == OF_THE_SIMULATED

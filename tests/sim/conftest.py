"""Tests of the simulated accelerator itself: ``pytest --device sim``; others leave them out."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    # Loading the device makes it torch's accelerator for the rest of the process.
    return None if config.getoption("--device") == "sim" else True


@pytest.fixture
def finder(platform):
    """The device while races are looked for, with delays: call it for what was found."""
    import torch

    sim = torch.sim
    with sim.configured(races=True, seed=7):
        yield lambda: sim.races(clear=True)
        platform.synchronize()
        sim.races(clear=True)

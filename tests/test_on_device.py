"""What ``--on-device`` leaves out."""

from __future__ import annotations

import pytest
from on_device import takes_it


def test_what_all_tests_have_is_no_device(request: pytest.FixtureRequest) -> None:
    assert not takes_it(request.node)


def test_who_asks_takes_it(request: pytest.FixtureRequest, device: str) -> None:
    assert takes_it(request.node)


def test_so_does_who_asks_for_what_asks(request: pytest.FixtureRequest, tolerance: float) -> None:
    assert takes_it(request.node)


@pytest.mark.usefixtures("platform")
def test_and_who_only_has_it_made(request: pytest.FixtureRequest) -> None:
    assert takes_it(request.node)

"""Under a launcher that starts a program several times no engine starts processes as well."""

from __future__ import annotations

import pytest

from reprise import LLM
from reprise.errors import ConfigError
from reprise.processes.launched import refuse_launcher


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As torchrun --nproc-per-node 2 sets it."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("option", ["tensor_parallel_size", "data_parallel_size"])
def test_torchrun_is_refused_by_name(torchrun: pytest.MonkeyPatch, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option}=2 under torchrun.* started 2 processes"):
        LLM(device="cpu", **{option: 2})


def test_a_program_that_was_started_once_may(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setenv("WORLD_SIZE", "1")
    refuse_launcher("tensor_parallel_size", 2)
    torchrun.setenv("WORLD_SIZE", "2")
    torchrun.delenv("TORCHELASTIC_RUN_ID")  # somebody else's variable
    refuse_launcher("tensor_parallel_size", 2)

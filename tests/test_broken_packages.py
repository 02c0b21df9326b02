"""Optional packages that are there and do not import, by another error than that they are missing:
built for another driver, another processor, another version of what they use."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reprise import early, platforms
from reprise.engine.structured.vocabulary import token_infos
from reprise.errors import ConfigError, RequestError
from reprise.replicas.ray.cluster import require_ray

WHY = "libother.so.9: wrong ELF class"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    def make(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(f"raise OSError({WHY!r})")
        monkeypatch.syspath_prepend(tmp_path)
        for each in [each for each in sys.modules if each.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, each)

    return make


def test_ray_is_refused_with_the_remedy(broken: Callable[[str], None]) -> None:
    broken("ray")
    with pytest.raises(ConfigError, match=rf"OSError: {WHY}.*pip install 'reprise\[ray\]'"):
        require_ray()


def test_xgrammar_is_refused_with_the_remedy(broken: Callable[[str], None]) -> None:
    broken("xgrammar")
    told = rf"OSError: {WHY}.*pip install 'reprise\[structured\]'"
    with pytest.raises(RequestError, match=told):
        token_infos(None, 8, frozenset())


def test_without_the_compiler_of_kernels_a_start_goes_on(broken: Callable[[str], None]) -> None:
    broken("triton")
    early.fingerprint_compiler()


def test_prompts_are_attended_to_without_cudnns_own_package(
    broken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken("cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found = platforms.load("cuda")
    module = SimpleNamespace(get_device_capability=lambda index: (9, 0))
    monkeypatch.setattr(found, "module", lambda self: module)
    platform = found.__new__(found)
    platform.index = 0
    with caplog.at_level(logging.INFO):
        assert platform.prompt_attention is not None
    assert f"with a copy: OSError: {WHY}" in caplog.text

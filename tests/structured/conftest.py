from __future__ import annotations

import pytest
from helpers import make_llm

from reprise import LLM
from reprise.loading.checkpoint import DEMO_MODEL


@pytest.fixture(scope="module")
def llm(device: str) -> LLM:
    """The demo model, which writes text."""
    pytest.importorskip("xgrammar")
    return make_llm(DEMO_MODEL, device, max_num_seqs=32, num_blocks=1025)

"""What one worker gets at a time: a module's tests, since what they share is made once. Of a module
that takes longer than any worker should be alone at the end, what shares the most: sets of the
matrix with one model, whose tokens without a disturbance are drawn once, and each whole seed of the
simulated accelerator, which shares nothing with the others. Its short ones share the build of the
accelerator, for which two workers would wait."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest
    from xdist.scheduler import LoadScopeScheduling

SEEDS = re.compile(r"test_sim\.py::test_reprise_on_the_device\[all-")
SETS = re.compile(
    r"(test_matrix|test_plugin_platform)\.py::(?:test_same_tokens|test_every_feature_on_each_executor)"
    r"\[\w+, (\w+), \d drafts"
)


def share(test: str) -> str:
    """What the test with this id goes to a worker with: the same text for all of it."""
    module = test.partition("::")[0]
    if SEEDS.search(test):
        return test
    found = SETS.search(test)
    return module if found is None else f"{module}, {found[2]}"


def scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Of pytest-xdist, for ``--dist loadscope``."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share(nodeid)

    return Shares(config, log)

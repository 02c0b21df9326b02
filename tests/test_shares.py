"""What a worker gets at a time."""

from __future__ import annotations

import matrix
import shares


def test_each_seed_goes_alone() -> None:
    """One worker with all of them would be alone for an hour."""
    seeds = [f"tests/test_sim.py::test_reprise_on_the_device[all-{n}]" for n in range(1, 11)]
    assert len({shares.share(each) for each in seeds}) == 10


def test_short_seeds_go_together() -> None:
    """The accelerator is built once, and nobody waits for it."""
    seeds = [f"tests/test_sim.py::test_reprise_on_the_device[{n}]" for n in (1, 2)]
    assert {shares.share(each) for each in seeds} == {"tests/test_sim.py"}


def test_sets_of_one_model_go_together() -> None:
    """What its requests get alone is computed once."""
    test = "tests/test_matrix.py::test_same_tokens"
    hybrid = shares.share(f"{test}[none, hybrid, 0 drafts]")
    assert shares.share(f"{test}[compiled, hybrid, 7 drafts by eagle3]") == hybrid
    assert shares.share(f"{test}[full, plain, 3 drafts]") != hybrid
    assert shares.share(f"{test}[full, latent, 3 drafts: chunking]") != hybrid
    plugin = "tests/plugin_platform/test_plugin_platform.py::test_every_feature_on_each_executor"
    assert shares.share(f"{plugin}[none, hybrid, 0 drafts: bucket]") != hybrid


def test_sets_are_told_by_the_names_that_they_have() -> None:
    test = "tests/test_matrix.py::test_same_tokens"
    for each in matrix.PRODUCT:
        assert shares.share(f"{test}[{each}]") == f"tests/test_matrix.py, {each.model}"


def test_other_modules_stay_together() -> None:
    assert shares.share("tests/test_a.py::test_b[c, d, 3 drafts]") == "tests/test_a.py"
    assert shares.share("tests/test_a.py::TestB::test_c") == "tests/test_a.py"

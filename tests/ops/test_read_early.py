"""What kernels ask for before they wait for the kernel before: what was there long before the step.

Asked for behind that wait, it is waited for once more, in every layer of a decode.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Order = dict[str, list[str]]


@pytest.fixture(scope="module")
def order() -> Order:
    return {}


@pytest.fixture
def found(no_device: None, compiling: Callable[..., list[str]], order: Order) -> Order:
    if not order:
        lines = [json.loads(line) for line in compiling("read_early.py")]
        for each in lines:
            name, does = each["kernel"], each["does"]
            if name == "one_row_kernel":
                name += " norms" if "read norm_ptr" in does else " adds"
            order[name] = does
    return order


def test_nothing_of_the_step_is_read_before_the_kernels_before_have_ended(found: Order) -> None:
    long_there = {
        "weight_ptr", "norm_ptr", "seq_lens_ptr", "starts_ptr", "table_ptr", "positions_ptr",
        "cos_sin_ptr", "slot_mapping_ptr", "query_norm_ptr", "key_norm_ptr",
    }  # fmt: skip
    older = {"key_ptr", "value_ptr"}  # than the step: of a decode all but the newest
    for kernel, does in found.items():
        early = does[: does.index("wait")]
        assert not [each for each in early if not each.startswith("read")], kernel
        there = long_there | older if kernel == "split_attention_kernel" else long_there
        assert {each.removeprefix("read ") for each in early} - {"?"} <= there, kernel


def test_gains_of_heads_and_tables_are_asked_for_before_the_wait(found: Order) -> None:
    does = found["rotary_cache_kernel"]
    for name in ("read query_norm_ptr", "read key_norm_ptr"):
        assert name in does[: does.index("wait")]
        assert name not in does[does.index("wait") :]
    does = found["split_attention_kernel"]
    assert "read table_ptr" in does[: does.index("wait")]


def test_one_tile_of_keys_is_asked_for_before_the_wait_and_the_newest_key_behind_it(
    found: Order,
) -> None:
    does = found["split_attention_kernel"]
    with_tile, without, general = [n for n, each in enumerate(does) if each == "wait"]
    for name in ("read key_ptr", "read value_ptr"):
        assert name in does[:with_tile]
        assert name in does[with_tile:without]
        assert name not in does[without:general]
        assert name in does[general:]
    assert "read query_ptr" not in does[:with_tile]


def test_one_row_asks_for_gains_before_the_wait_and_for_what_it_adds_to_with_its_inputs(
    found: Order,
) -> None:
    adds, norms = (found[f"one_row_kernel {which}"] for which in ("adds", "norms"))
    assert adds.index("read out_ptr") < adds.index("read x_ptr")
    assert "read norm_ptr" in norms[: norms.index("wait")]
    assert "read norm_ptr" not in norms[norms.index("wait") :]

"""Implementations that compute some calls of an op: who is asked, how often, and what follows."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from reprise.errors import OpError
from reprise.ops import Op, OpTable, choice, implementation, registry
from reprise.ops import table as tables
from reprise.ops.cases import Cases
from reprise.platforms.cpu import CpuPlatform


class Prefers(CpuPlatform):
    preferred: ClassVar = {"*": ("vendor", "second", "reference")}


def reference(x: Tensor, factor: float, y: Tensor | None = None) -> Tensor:
    return x * factor


NUMBERS = itertools.count()


@pytest.fixture
def op() -> Iterator[Op]:
    name = f"by_arguments_{next(NUMBERS)}"  # torch.library keeps names for ever
    yield registry.op(
        name,
        reference,
        cases=Cases(lambda make: [{"x": make.randn(2, 3), "factor": 2.0, "y": None}]),
        fake=lambda x, factor, y=None: torch.empty_like(x),
    )
    del registry.declared[name]


class Counting:
    """Accepts rows of up to four float32 and whole factors; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, x: Tensor, factor: float, y: Tensor | None = None) -> str | None:
        self.asked.append((x.shape, x.dtype, factor))
        if x.dtype is not torch.float32:
            return f"computes in float32, not in {x.dtype}"
        return None if x.shape[1] <= 4 else "rows are too long"


def added(op: Op, accepts: Any) -> OpTable:
    op.implementation("vendor", lambda x, factor, y=None: x * factor + 100, accepts=accepts)
    return OpTable(Prefers())


def test_one_question_for_each_kind_of_call(op) -> None:
    accepts = Counting()
    table = added(op, accepts)
    with table.activate():
        for rows in (1, 2, 9, 0):
            assert op(torch.ones(rows, 3), 2.0).tolist() == [[102.0] * 3] * rows
        assert op(torch.ones(2, 5), 2.0).tolist() == [[2.0] * 5] * 2
        assert op(torch.ones(2, 3).double(), 2.0).tolist() == [[2.0] * 3] * 2
        assert op(torch.ones(1, 3), 3.0).tolist() == [[103.0] * 3]
        assert op(torch.ones(4, 5), 2.0).tolist() == [[2.0] * 5] * 4
    # The first dimension counts tokens or requests: a check cannot look at it.
    assert accepts.asked == [
        ((0, 3), torch.float32, 2.0),
        ((0, 5), torch.float32, 2.0),
        ((0, 3), torch.float64, 2.0),
        ((0, 3), torch.float32, 3.0),
    ]


@pytest.mark.parametrize(
    ("accepts", "reason"),
    [
        (lambda x, factor, y=None: "never" if x.sum() > 0 else None, "Tensor.item() cannot be"),
        (lambda x, factor, y=None: "never" if x.tolist() else None, "cannot be told: "),
        (lambda x: None, "cannot be told: TypeError"),
    ],
)
def test_a_check_sees_no_values_and_one_that_fails_refuses(op, accepts, reason) -> None:
    table = added(op, accepts)
    with table.activate():
        assert op(torch.ones(1, 2), 2.0).tolist() == [[2.0, 2.0]]
    (answer,) = table.choices[op.name].answers.values()
    assert answer.implementation.name == "reference"
    assert reason in answer.refused["vendor"]


def test_the_next_one_that_accepts_computes_and_the_log_says_why(op, caplog) -> None:
    caplog.set_level(logging.INFO, "reprise")
    op.implementation("second", lambda x, factor, y=None: x - 1, accepts=Counting())
    table = added(op, lambda x, factor, y=None: "whole factors alone" if factor % 1 else None)
    with table.activate():
        assert op(torch.ones(1, 3), 0.5).tolist() == [[0.0] * 3]
        assert op(torch.ones(1, 9), 0.5).tolist() == [[0.5] * 9]
        assert op(torch.ones(1, 9), 0.25).tolist() == [[0.25] * 9]
    assert [each for each in caplog.messages if each.startswith(f"op {op.name}")] == [
        f"op {op.name}: second and not vendor (whole factors alone)",
        f"op {op.name}: reference and not second (rows are too long)",
    ]
    calls = [each.call for each in table.choices[op.name].answers.values()]
    assert calls[0] == "x [*, 3] float32, factor 0.5"


def test_named_and_optional_arguments_belong_to_the_kind(op) -> None:
    table = added(op, lambda x, factor, y=None: "y is not added" if y is not None else None)
    x = torch.ones(1, 1)
    with table.activate():
        assert op(x, factor=2.0).item() == 102
        assert op(x, factor=2.0, y=x).item() == 2
        assert op(x, 2.0, x).item() == 2
        assert op(x, 2.0, None).item() == 102


def test_what_the_user_asked_for_is_not_replaced_silently(op) -> None:
    added(op, lambda x, factor, y=None: "rows are too long" if x.shape[1] > 4 else None)
    table = OpTable(Prefers(), {op.name: "vendor"})
    with table.activate():
        assert op(torch.ones(1, 3), 2.0).tolist() == [[102.0] * 3]
        with pytest.raises(OpError, match=rf"--op {op.name}=vendor: rows are too long \(x \[\*, 9"):
            op(torch.ones(1, 9), 2.0)


def test_repeated_calls_are_bound_to_what_computes_them(op) -> None:
    bound = []

    def vendor(x: Tensor, factor: float, y: Tensor | None = None) -> Tensor:
        return x + 100

    def bind(*args: Any) -> Any:
        bound.append(args)
        return lambda: None

    vendor.bind = bind  # type: ignore[attr-defined]
    op.implementation(
        "vendor", vendor, accepts=lambda x, factor, y=None: "long" if x.shape[1] > 4 else None
    )
    short, long = torch.ones(1, 3), torch.ones(1, 9)
    with OpTable(Prefers()).activate():
        again = op.repeatedly(short, 2.0)
        assert len(bound) == 1
        assert again() is None
        again = op.repeatedly(long, 2.0, others=1)
        assert len(bound) == 1
        assert again(3.0).tolist() == [[3.0] * 9]


def test_numbers_that_are_never_the_same_do_not_fill_memory(op, monkeypatch) -> None:
    monkeypatch.setattr(choice, "MOST_KINDS", 8)
    accepts = Counting()
    table = added(op, accepts)
    x = torch.ones(1, 1)
    with table.activate():
        for number in range(50):
            assert op(x, float(number)).item() == 100 + number
    found = table.choices[op.name]
    assert len(found.answers) == len(found._functions) <= 8
    assert len(accepts.asked) == 50


def test_an_op_that_takes_everything_costs_nothing_more(op) -> None:
    table = OpTable(Prefers())
    assert table.functions[op.name] is reference
    assert table.choices == {}


def interrupted(make: Callable[[], Any], act: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """What ``act`` returns of what was made, and what it returns to another thread that calls it
    before one of the first call's bytecodes that choose: for each of them."""
    files = {each.__file__ for each in (choice, implementation, tables)}
    for place in itertools.count():
        made, found, left = make(), [], place

        def other(made: Any = made, found: list[Any] = found) -> None:
            found.append(act(made))

        def trace(frame: FrameType, event: str, _: Any, other: Any = other) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == -1:
                    thread = threading.Thread(target=other)
                    thread.start()
                    thread.join(30)
            return trace

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame wants them
        sys.settrace(trace)
        try:
            mine = act(made)
        finally:
            sys.settrace(before)
        if left >= 0:
            return
        yield mine, found[0]


def test_threads_that_choose_at_once_choose_the_same(op, monkeypatch) -> None:
    """Wherever one of them is when the other one comes."""

    def vendor(x: Tensor, factor: float, y: Tensor | None = None) -> Tensor:
        return x * factor + 100

    monkeypatch.setattr(choice, "vendor_of_a_test", vendor, raising=False)
    op.implementation("vendor", vendor, accepts=Counting())
    late = op.implementations["vendor"]

    def make() -> OpTable:
        late.target = f"{choice.__name__}:vendor_of_a_test"
        return OpTable(Prefers())

    def act(table: OpTable) -> list[str]:
        # The second one that is refused is looked up among what was answered before.
        calls = [(torch.ones(1, columns), 2.0) for columns in (3, 5, 6)]
        found = [table.implementation_of(op, call, {}).name for call in calls]
        assert table.functions[op.name] is table.choices[op.name]
        assert late.function is vendor
        return found

    count = 0
    for ours, theirs in interrupted(make, act):
        assert ours == theirs == ["vendor", "reference", "reference"], count
        assert late.import_failure is None
        count += 1
    assert count > 500

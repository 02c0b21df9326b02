"""Ops: every implementation that can run here computes what the reference computes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.doctor.conformance.contract import Broken, Kit, Skipped, add, need
from reprise.doctor.conformance.rows import Rows
from reprise.errors import describe
from reprise.graphs.compare import differs, same_bits
from reprise.ops import Op, all_ops
from reprise.ops.cases import Arguments, Maker
from reprise.ops.implementation import Implementation
from reprise.platforms.borrow import storage_key
from reprise.platforms.device_graph import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 8e-3}
TOLERANCE |= {torch.float8_e4m3fn: 2**-3.8, torch.float8_e4m3fnuz: 2**-3.8}  # a code step
"""Relative to the largest magnitude. Matrix units may round float32 products to ten bits."""
MANY = 67
"""Rows of a batch that no tile for few rows holds, and no tile of any size ends with."""
Results = dict[str, Tensor]


def matches_reference(kit: Kit, op: Op) -> str:
    """Compare each implementation that can run, in each dtype, with the reference."""
    done = []
    dtypes = [each for each in _dtypes(kit) if _cases(kit, op, each)]
    need(dtypes, "its cases hold no inputs in any dtype that the platform computes in")
    for name, implementation in op.implementations.items():
        if name == "reference" or implementation.requires(kit.platform) is not None:
            continue
        for dtype in dtypes:
            for number, arguments in enumerate(_cases(kit, op, dtype)):
                what = f"{name}, {dtype}, case {number}"
                for size, some in {0: arguments, **_batches(op, arguments)}.items():
                    if implementation.refusal(**some) is None:
                        told = f"{what}, {size} of its rows" if size else what
                        _matches(kit, op, implementation, some, dtype, told)
        _gives_memory_of_its_own(kit, op, implementation, dtypes[0])
        done.append(name)
    if not done:
        raise Skipped("no implementation but the reference can run here")
    return f"{', '.join(done)} in {', '.join(map(_short, dtypes))}"


def _matches(
    kit: Kit, op: Op, implementation: Implementation, arguments: Arguments, dtype: torch.dtype,
    what: str,
) -> None:  # fmt: skip
    expected = _run(kit, op, op.implementations["reference"], arguments)
    got = _run(kit, op, implementation, arguments)
    for which, tensor in expected.items():
        # A state may be wider than the numbers that it is made of.
        made_of = dtype if which in op.state else None
        if op.cases.coded_between and dtype is torch.float16:
            made_of = torch.bfloat16  # a code step outweighs what float16 has over it
        _compare(f"{what}, {which}", tensor, got[which], made_of)


def _gives_memory_of_its_own(
    kit: Kit, op: Op, implementation: Implementation, dtype: torch.dtype
) -> None:
    """Callers keep what a call has returned, and an argument is not theirs to hand on."""
    for arguments in _cases(kit, op, dtype):
        if implementation.refusal(**arguments) is None:
            first = _run(kit, op, implementation, arguments).get("result")
            if first is not None:
                second = _run(kit, op, implementation, arguments)["result"]
                need(
                    storage_key(first) != storage_key(second),
                    f"{implementation.name}: the results of two calls lie in the same memory",
                )
            return


def _batches(op: Op, arguments: Arguments) -> dict[int, Arguments]:
    """Calls with as many of a call's rows as its key says: kernels differ by their number."""
    if not op.rows:
        return {}
    rows = Rows(op, arguments)
    some = {1: rows.together(rows.numbers[-1:])} if rows.numbers else {}
    if some and not rows.once:
        chance = random.Random(0)
        some[MANY] = rows.together(chance.choices(rows.numbers, k=MANY))
    return some


def is_deterministic(kit: Kit, op: Op) -> str:
    """Run the implementation in use twice on equal inputs; compare the bits."""
    used = {}
    for dtype in _dtypes(kit):
        for number, arguments in enumerate(_cases(kit, op, dtype)):
            chosen = kit.ops.implementation_of(op, (), arguments)
            if chosen.error is not None:
                raise Skipped(f"{chosen.name} is declared to vary by {chosen.error:.2g}")
            used[chosen.name] = chosen
            first = _run(kit, op, chosen, arguments)
            for _ in range(2):
                again = _run(kit, op, chosen, arguments)
                for which, tensor in first.items():
                    need(
                        same_bits(tensor, again[which]),
                        f"{chosen.name}, {dtype}, case {number}: {which} differs between runs",
                    )
    return ", ".join(used)


def can_be_captured(kit: Kit, op: Op) -> str:
    """Replay every implementation that may be in any graph, the reference too, and compare with
    what it gives outside of one."""
    kit.need_graphs()
    done = []
    default = kit.platform.default_dtype
    # Cases in which no numbers are computed exist in one dtype alone.
    dtype = next(each for each in (default, *_dtypes(kit)) if _cases(kit, op, each))
    for name, implementation in op.implementations.items():
        if implementation.unusable(kit.platform) is not None:
            continue
        if implementation.graph_support_on(kit.platform) != "always":
            continue
        for number, arguments in enumerate(_cases(kit, op, dtype)):
            if implementation.refusal(**arguments) is not None:
                continue
            what = f"{name}, case {number}"
            expected = _run(kit, op, implementation, arguments)
            try:
                got = _replayed(kit, op, implementation.function, arguments)
            except Exception as error:  # drivers refuse with errors of many types
                raise Broken(f"{what} cannot be captured: {describe(error)}") from error
            for which, tensor in expected.items():
                if implementation.error is None:
                    same = same_bits(tensor, got[which])
                    need(same, f"{what}: {which} of a replay differs from that outside of a graph")
                else:
                    _compare(f"{what}, {which}", tensor, got[which])
        done.append(name)
    if not done:
        raise Skipped("no implementation may be in every graph")
    return f"{', '.join(done)} in {_short(dtype)}"


def _replayed(kit: Kit, op: Op, function: Callable[..., Any], arguments: Arguments) -> Results:
    """What a replay returns and writes, on arguments that were others when it was captured."""
    held = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with kit.ops.computing():
        with kit.platform.capture_stream():
            function(**held)
        graph = kit.platform.new_graph()
        result = graph.capture(lambda: launch(function, **held))
        for name, each in arguments.items():
            if isinstance(each, Tensor):
                held[name].copy_(each)
        if isinstance(result, Tensor):
            result.copy_(_poison(result))
        kit.platform.synchronize()
        graph.replay()
        kit.platform.synchronize()
    found = op.written(held)
    if isinstance(result, Tensor):
        found["result"] = result.clone()
    return found


def leaves_zeros(kit: Kit, op: Op) -> str:
    """Run every implementation, the reference too, with lengths that are 0 and poisoned memory."""
    extent = op.extent
    if extent is None:
        raise Skipped("no argument says how far it reaches into each request")
    dtype = kit.platform.default_dtype
    done = []
    for name, implementation in op.implementations.items():
        if implementation.unusable(kit.platform) is not None:
            continue
        run = functools.partial(_run, kit, op, implementation)
        for number, arguments in enumerate(_cases(kit, op, dtype)):
            if implementation.refusal(**arguments) is None:
                _leaves_zeros(f"{name}, case {number}", op, run, arguments, extent)
        done.append(name)
    return f"{', '.join(done)} in {_short(dtype)}"


def _leaves_zeros(
    what: str, op: Op, run: Callable[[Arguments], Results], arguments: Arguments, extent: str
) -> None:
    outputs = [name for name in op.written(arguments) if name not in op.state]
    poisoned = {**arguments, **{name: _poison(arguments[name]) for name in outputs}}
    full, other = run(poisoned), run({**poisoned, **{k: arguments[k] for k in outputs}})
    for which in outputs:
        need(
            same_bits(full[which], other[which]),
            f"{what}: {which} holds in places what it held before: rows must be written as zeros "
            f"where there is nothing to compute",
        )
    lengths = arguments[extent]
    nothing: Arguments = {
        name: _poison(each) if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in poisoned.items()
    }
    nothing[extent] = torch.zeros_like(lengths)
    for which, tensor in run(nothing).items():
        if which in outputs:
            need(
                not tensor.count_nonzero(),
                f"{what}: {which} is not zero though all lengths are",
            )
        elif which in op.state:
            need(
                same_bits(tensor, nothing[which]),
                f"{what}: {which} is written though all lengths are 0",
            )
    for row in lengths.nonzero().flatten().tolist():
        emptied = lengths.clone()
        emptied[row] = 0
        found = run({**poisoned, extent: emptied})
        for which in outputs:
            kept = torch.where(found[which] == 0, found[which], full[which])
            _compare(f"{what}, request {row} of length 0, {which}", kept, found[which])


def _poison(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 99)


def _dtypes(kit: Kit) -> list[torch.dtype]:
    return [each for each in DTYPES if kit.platform.supports_dtype(each)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cases(kit: Kit, op: Op, dtype: torch.dtype) -> Sequence[Arguments]:
    return op.cases.small(Maker(kit.platform.device, dtype, kit.platform.fp8_dtype))


def _run(kit: Kit, op: Op, implementation: Implementation, arguments: Arguments) -> Results:
    """What a call returns and writes, from copies of its arguments; it may write nothing else."""
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    # A kernel that starts early takes for granted that weights and lengths were there long before.
    kit.platform.synchronize()
    with kit.ops.computing():
        result = implementation.function(**copied)
    found = op.written(copied)
    read = {k: v for k, v in copied.items() if isinstance(v, Tensor) and k not in found}
    changed = [differs(arguments[name], each) for name, each in read.items() if each.numel()]
    if changed and torch.stack(changed).any():
        names = [name for name, each in read.items() if not same_bits(arguments[name], each)]
        raise Broken(
            f"{implementation.name} writes {', '.join(names)}, which {op.name} does not declare "
            "(mutates)"
        )
    if isinstance(result, Tensor):
        given = {storage_key(each) for each in copied.values() if isinstance(each, Tensor)}
        need(
            storage_key(result) not in given,
            f"{implementation.name}: what {op.name} returns lies in memory of its arguments",
        )
        found["result"] = result
    return found


def _compare(
    what: str, expected: Tensor, got: Tensor, computed_in: torch.dtype | None = None
) -> None:
    """``computed_in``: of what the tensor is made; None: of its own dtype."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Broken(
            f"{what}: {_short(got.dtype)} {list(got.shape)} instead of "
            f"{_short(expected.dtype)} {list(expected.shape)}"
        )
    if not expected.is_floating_point():
        need(torch.equal(got, expected), f"{what}: {got.tolist()[:8]} and not "
             f"{expected.tolist()[:8]}")  # fmt: skip
        return
    wide, other = expected.double(), got.double()
    tolerance = max(TOLERANCE[each] for each in (expected.dtype, computed_in or expected.dtype))
    # Of what is masked, infinities are expected, which no tolerance may be taken from.
    allowed = tolerance * max(1.0, float(wide.abs().nan_to_num(0.0, 0.0, 0.0).max()))
    largest = float(torch.where(wide == other, 0.0, (wide - other).abs()).max())
    need(largest <= allowed, f"{what}: differs by {largest:.3g}, allowed are {allowed:.3g}")


for _name, _op in all_ops().items():
    add(
        f"op_matches_reference:{_name}",
        "ops",
        f"Every implementation of {_name} that can run here agrees with its reference.\n\n"
        "Small shapes, every dtype that the platform computes in; where an op says which arguments "
        "have rows, one row alone and many too. It writes no argument but those that are declared, "
        "and what it returns lies in memory of its own.",
        functools.partial(matches_reference, op=_op),
    )
for _name, _op in all_ops().items():
    add(
        f"op_is_deterministic:{_name}",
        "ops",
        f"Equal inputs give equal bits from {_name}, as its declaration says.\n\n"
        "Graphs are compared bit by bit, so an op that varies would raise false alarms.",
        functools.partial(is_deterministic, op=_op),
    )
for _name, _op in all_ops().items():
    add(
        f"op_can_be_captured:{_name}",
        "ops",
        f"Every implementation of {_name} can be captured, and a replay gives what it gives.\n\n"
        "A reference may compute on any device and in any graph: it takes the place of kernels "
        "that refuse a call.",
        functools.partial(can_be_captured, op=_op),
    )
for _name, _op in all_ops().items():
    if _op.break_op:
        add(
            f"op_leaves_zeros:{_name}",
            "ops",
            f"Every implementation of {_name} writes zeros where there is nothing to compute.\n\n"
            "Rows of length 0 and tokens behind the last request are padding: what lies in the "
            "memory of their inputs and outputs is of another step, and must not get on.",
            functools.partial(leaves_zeros, op=_op),
        )

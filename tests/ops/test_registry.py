from __future__ import annotations

import contextvars
import pkgutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS

from reprise import ops
from reprise.doctor.facts import op_facts
from reprise.errors import OpError
from reprise.graphs.compare import same_bits
from reprise.graphs.plan import support_of
from reprise.ops import OpTable, all_ops, find, registry, rms_norm
from reprise.ops import table as tables
from reprise.ops.cases import Cases, Maker
from reprise.platforms.cpu import CpuPlatform

CPU = torch.device("cpu")


class WantsTriton(CpuPlatform):
    name = "wants_triton"
    preferred: ClassVar = {"rms_norm": ("absent", "triton"), "*": ("reference",)}
    has_triton = True


class NoTriton(WantsTriton):
    has_triton = False


ONE = Cases(lambda make: [{"x": make.randn(3)}])
BUILT_IN = sorted(all_ops())


def inputs(name: str, device: torch.device = CPU) -> Sequence[tuple[Any, ...]]:
    """Arguments of an op, in order."""
    op = all_ops()[name]
    cases = op.cases.small(Maker(device, torch.float32))
    return [tuple(each[argument] for argument in op.arguments) for each in cases]


@pytest.fixture
def some(device: str, pytestconfig: pytest.Config) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """In short runs every fourth one of an op's cases."""
    short = device == "cpu" and not pytestconfig.getoption("--long")
    return lambda cases: cases[::4] if short else cases


@pytest.fixture
def undeclared() -> Iterator[None]:
    """Ops that a test declares are gone afterwards; torch.library keeps their names."""
    before = dict(registry.declared)
    yield
    registry.declared.clear()
    registry.declared.update(before)


def test_every_op_has_inputs_and_workloads_for_its_kernels() -> None:
    for name, op in all_ops().items():
        assert inputs(name), name
        if "triton" in op.implementations and not op.collective:
            assert any(each.compiled for each in op.cases.workloads(Maker(CPU, torch.bfloat16)))


def test_every_folder_is_declared_and_what_is_listed_can_be_called() -> None:
    folders = {each.name for each in pkgutil.iter_modules(ops.__path__) if each.ispkg}
    declared = {_folder(each) for each in all_ops().values()}
    assert declared == folders
    listed = {name for name, each in vars(ops).items() if isinstance(each, ops.Op)}
    assert listed <= set(BUILT_IN)


def _folder(op: ops.Op) -> str:
    return op.implementations["reference"].function.__module__.split(".")[2]


@pytest.mark.parametrize("name", BUILT_IN)
def test_opcheck(name, some) -> None:
    """Schema (what is mutated, what may alias) and fake implementation, by torch's own checks."""
    for each in some(inputs(name)):
        checks = list(DEFAULT_TEST_UTILS)
        if any(isinstance(x, Tensor) and x.dtype is torch.float8_e4m3fn for x in each):
            # Torch compares inputs by arithmetic, which a CPU does not do in eight bits. What is
            # written is looked at below.
            checks.remove("test_schema")
        torch.library.opcheck(all_ops()[name].overload, each, test_utils=checks)


@pytest.mark.parametrize("name", BUILT_IN)
def test_fake_results_look_like_real_ones(name) -> None:
    op = all_ops()[name]
    for arguments in inputs(name):
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        if real is None:
            assert fake is None
            continue
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert isinstance(fake, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_what_is_declared_is_written(name, platform, some) -> None:
    """By every implementation that runs here; all of it, by one case or another."""
    op = all_ops()[name]
    for each in op.implementations.values():
        if each.requires(platform) is not None:
            continue
        seen: set[str] = set()
        declared: set[str] = set()
        for arguments in some(inputs(name, platform.device)):
            if each.refusal(**op.named(arguments, {})) is not None:
                continue
            before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            each.function(*arguments)
            changed = {
                argument
                for argument, old, new in zip(op.arguments, before, arguments, strict=True)
                if isinstance(new, Tensor) and not same_bits(old, new)
            }
            written = set(op.written(dict(zip(op.arguments, arguments, strict=True))))
            assert changed <= written  # a scale may be what it was
            seen |= changed
            declared |= written
        assert seen == declared


# ---- choice ----------------------------------------------------------------------------------


def test_override_of_an_unknown_op() -> None:
    with pytest.raises(OpError, match=r"--op nonsense=...: no such op; known: .*rms_norm"):
        OpTable(CpuPlatform(), {"nonsense": "triton"})


def test_override_with_an_unknown_implementation() -> None:
    with pytest.raises(OpError, match=r"'rms_norm' has no implementation 'vendor'; it has: ref"):
        OpTable(CpuPlatform(), {"rms_norm": "vendor"})


def test_override_that_the_platform_cannot_run_names_the_reason() -> None:
    with pytest.raises(
        OpError, match=r"--op rms_norm=triton: Triton cannot run .*\(wants_triton\)"
    ):
        OpTable(NoTriton(), {"rms_norm": "triton"})


def test_paged_attention_on_the_host_is_refused_on_accelerators() -> None:
    class Accelerator(WantsTriton):
        device_type = "cuda"

    with pytest.raises(OpError, match="reads lengths on the host"):
        OpTable(Accelerator(), {"paged_attention": "torch"})


def test_the_platform_prefers() -> None:
    chosen = OpTable(WantsTriton()).chosen
    assert chosen["rms_norm"].name == "triton"
    assert chosen["silu_and_mul"].name == "reference"
    assert OpTable(CpuPlatform()).chosen["lay_out"].name == "numpy"


def test_what_cannot_run_is_passed_over() -> None:
    assert OpTable(NoTriton()).chosen["rms_norm"].name == "reference"


def test_an_override_wins() -> None:
    table = OpTable(WantsTriton(), {"rms_norm": "reference"})
    assert table.chosen["rms_norm"].name == "reference"
    assert table.functions["rms_norm"] is rms_norm.implementations["reference"].function


def test_implementations_are_imported_when_they_are_considered(undeclared) -> None:
    declared = registry.op("late", does_nothing, cases=ONE)
    declared.implementation("absent", "reprise.no_such_module:function", requires=lambda _: "no")
    declared.implementation("unloved", "reprise.no_such_module:function")
    assert OpTable(CpuPlatform()).chosen["late"].name == "reference"
    assert all(each.import_failure is None for each in declared.implementations.values())


BROKEN_MODULES = {
    "absent": ("no_such_driver_package", "ModuleNotFoundError"),
    "old": ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
    "empty": ("x = 1", "AttributeError"),
    "wrong": ("function = 1", "TypeError: 1 is no function"),
}


@pytest.mark.parametrize("name", BROKEN_MODULES)
def test_an_implementation_that_does_not_import_is_skipped(
    undeclared, tmp_path, monkeypatch, caplog, name
) -> None:
    code, reason = BROKEN_MODULES[name]
    if name == "absent":
        code = f"import {code}"
    (tmp_path / f"vendor_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    class Prefers(CpuPlatform):
        preferred: ClassVar = {"*": ("vendor", "second", "reference")}

    declared = registry.op(f"stranded_{name}", plus_one, cases=ONE, fake=torch.empty_like)
    declared.implementation("vendor", f"vendor_{name}:function")
    declared.implementation("second", lambda x: x + 2)
    for _ in range(2):
        table = OpTable(Prefers())
        assert table.chosen[declared.name].name == "second"
    with table.activate():
        assert declared(torch.zeros(())).item() == 2
    (line,) = caplog.messages
    assert line.startswith(
        f"op {declared.name}: vendor is skipped, it cannot be imported: {reason}"
    )
    with pytest.raises(OpError, match=f"--op {declared.name}=vendor: it cannot be imported"):
        OpTable(CpuPlatform(), {declared.name: "vendor"})


def test_what_is_there_on_request_is_chosen_by_nobody_else(undeclared) -> None:
    declared = registry.op("shy", plus_one, cases=ONE, fake=torch.empty_like)
    declared.implementation("triton", plus_one, on_request="no device ran it")

    class WantsShy(WantsTriton):
        preferred: ClassVar = {"*": ("triton",)}

    platform = WantsShy()
    assert [each.name for each in declared.candidates(platform)] == ["reference"]
    assert [each.name for each in declared.candidates(platform, "triton")] == ["triton"]
    facts = op_facts(OpTable(platform))["shy"]["implementations"]["triton"]
    assert facts["on_request"] == "no device ran it"


def test_an_implementation_whose_requirement_raises_is_skipped(undeclared) -> None:
    def requires(platform: Any) -> str | None:
        raise OSError("libvendor.so: no such file")

    declared = registry.op("demanding", plus_one, cases=ONE, fake=torch.empty_like)
    declared.implementation("triton", lambda x: x, requires=requires)
    assert OpTable(WantsTriton(), {}).chosen["demanding"].name == "reference"
    reason = declared.implementations["triton"].unusable(CpuPlatform())
    assert reason == "its requirement fails: OSError: libvendor.so: no such file"


# ---- declaration -----------------------------------------------------------------------------


def does_nothing(x: Tensor) -> None:
    return None


def returns_a_tensor(x: Tensor) -> Tensor:
    return x + 1


def writes(x: Tensor, out: Tensor) -> None:
    out.copy_(x + 1)


def test_an_op_is_declared_once() -> None:
    with pytest.raises(OpError, match="'rms_norm' is already declared"):
        registry.op("rms_norm", does_nothing, cases=ONE)


def test_an_implementation_is_added_once() -> None:
    with pytest.raises(OpError, match="'rms_norm' already has an implementation 'triton'"):
        rms_norm.implementation("triton", "somewhere:else")


def test_a_break_op_returns_nothing() -> None:
    with pytest.raises(OpError, match="break op 'returning' must write into its arguments"):
        registry.op("returning", returns_a_tensor, cases=ONE, break_op=True, fake=torch.empty_like)
    assert "returning" not in all_ops()


def test_an_op_that_returns_needs_a_fake() -> None:
    with pytest.raises(OpError, match="'faceless' returns a value and declares no fake"):
        registry.op("faceless", returns_a_tensor, cases=ONE)


def test_an_op_needs_cases() -> None:
    with pytest.raises(TypeError, match="'cases'"):
        registry.op("untried", does_nothing)
    assert "untried" not in all_ops()


def test_an_extent_is_an_argument() -> None:
    with pytest.raises(OpError, match="extent='lengths' is no argument"):
        registry.op("unbounded", does_nothing, cases=ONE, extent="lengths")


def test_state_is_written() -> None:
    with pytest.raises(OpError, match=r"state=\('x',\) must be among mutates=\('out',\)"):
        registry.op("stateful", writes, cases=ONE, mutates=("out",), state=("x",))


def test_graph_support_of_references(undeclared) -> None:
    plain = registry.op("plain_support", does_nothing, cases=ONE)
    broken = registry.op("break_support", writes, cases=ONE, mutates=("out",), break_op=True)
    chosen = registry.op(
        "chosen_support",
        writes,
        cases=ONE,
        mutates=("out",),
        break_op=True,
        graph_support="uniform_batch",
    )
    references = [each.implementations["reference"] for each in (plain, broken, chosen)]
    support = [each.graph_support_on(CpuPlatform()) for each in references]
    assert support == ["always", "never", "uniform_batch"]


def test_graph_support_may_depend_on_the_platform(undeclared) -> None:
    def support(platform: Any) -> Any:
        return {"cpu": "always", "wants_triton": "single_token_decode"}.get(platform.name, "some")

    declared = registry.op("depends", writes, cases=ONE, mutates=("out",), break_op=True)
    declared.implementation("vendor", writes, graph_support=support)
    for platform, level in ((CpuPlatform(), "always"), (WantsTriton(), "single_token_decode")):
        table = OpTable(platform, {"depends": "vendor"})
        uses = [(declared, table.chosen["depends"])]
        assert support_of(uses, platform) == {"depends (vendor)": level}

    class Other(CpuPlatform):
        name = "other"

    with pytest.raises(OpError, match="graph_support='some' of 'vendor' must be one of never"):
        declared.implementations["vendor"].graph_support_on(Other())


def test_a_declared_op_runs_and_is_known_to_the_dispatcher(undeclared) -> None:
    declared = registry.op("plus_one", writes, cases=ONE, mutates=("out",), break_op=True)
    out = torch.zeros(3)
    assert torch.ops.reprise.plus_one(torch.ones(3), out) is None
    assert out.tolist() == [2.0, 2.0, 2.0]
    assert str(declared.overload._schema).startswith("reprise::plus_one(Tensor x, Tensor(a")
    torch.library.opcheck(declared.overload, (torch.ones(3), out))


# ---- finding ---------------------------------------------------------------------------------


def test_find() -> None:
    assert find(torch.ops.reprise.rms_norm.default) is rms_norm
    assert find(torch.ops.aten.add.Tensor) is None
    assert find("reprise::rms_norm") is None


# ---- activation ------------------------------------------------------------------------------


def plus_one(x: Tensor) -> Tensor:
    return x + 1


@pytest.fixture(scope="module")
def which_way() -> Iterator[registry.Op]:
    """An op whose implementations can be told apart."""
    declared = registry.op("which_way", plus_one, cases=ONE, fake=torch.empty_like)
    declared.implementation("other", lambda x: x + 2)
    yield declared
    del registry.declared["which_way"]


def test_tables_nest_and_unwind(which_way) -> None:
    first = OpTable(CpuPlatform())
    second = OpTable(CpuPlatform(), {"which_way": "other"})
    zero = torch.zeros(())
    with first.activate():
        assert which_way(zero).item() == 1
        with second.activate():
            assert which_way(zero).item() == 2
        assert which_way(zero).item() == 1
        with pytest.raises(KeyError), second.activate():
            raise KeyError
        assert which_way(zero).item() == 1


def test_a_gradient_that_would_be_missing_is_refused(which_way) -> None:
    """Kernels compute none, and torch, which does not see them, would say nothing."""
    wants = torch.zeros(3, requires_grad=True)
    with OpTable(CpuPlatform(), {"which_way": "other"}).activate():
        for call in (lambda: which_way(wants), lambda: which_way(x=wants),
                     lambda: torch.ops.reprise.which_way(wants)):  # fmt: skip
            with pytest.raises(OpError, match=r"other computes no gradients.*which_way=reference"):
                call()
        with torch.no_grad():
            assert which_way(wants).tolist() == [2.0] * 3
        assert which_way(wants.detach()).tolist() == [2.0] * 3
    which_way(wants).sum().backward()
    assert wants.grad.tolist() == [1.0] * 3


def by_row(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    return x * weight + slots


def test_a_vector_that_a_kernel_would_misread_is_refused(undeclared, monkeypatch) -> None:
    """It gets an address alone. Whoever calls an op outside of an engine has any memory."""
    op = registry.op(
        "by_row", by_row, cases=ONE, fake=lambda x, weight, slots: x, strided=("slots",)
    )
    op.implementation("kernel", by_row, requires=registry.needs_triton)
    wide = torch.arange(6.0).view(3, 2)
    gaps, table = wide[:, 0], OpTable(WantsTriton(), {"by_row": "kernel"})
    monkeypatch.setattr(tables, "_defaults", {"cpu": table})
    with pytest.raises(OpError, match=r"by_row.*kernel.*weight.*is 2: give weight.contiguous"):
        op(wide[0, :1], gaps, gaps)
    for call in (op, torch.ops.reprise.by_row):
        assert call(gaps[:1], gaps.contiguous(), gaps).tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(OpError, match="weight"):
        op(x=gaps[:1], slots=gaps, weight=gaps)
    monkeypatch.setattr(tables, "_defaults", {"cpu": OpTable(CpuPlatform())})
    assert op(gaps[:1], gaps, gaps).tolist() == [0.0, 2.0, 4.0]  # torch reads it as it lies


def test_a_table_is_active_in_its_own_thread(which_way) -> None:
    seen = []
    with OpTable(CpuPlatform(), {"which_way": "other"}).activate():
        thread = threading.Thread(target=lambda: seen.append(which_way(torch.zeros(())).item()))
        thread.start()
        thread.join()
        seen.append(which_way(torch.zeros(())).item())
    assert seen == [1, 2]


def test_an_op_declared_after_the_table_is_chosen_then(undeclared) -> None:
    table = OpTable(CpuPlatform())
    declared = registry.op("latecomer", plus_one, cases=ONE, fake=torch.empty_like)
    with table.activate():
        assert declared(torch.zeros(())).item() == 1
    assert table.chosen["latecomer"].name == "reference"


def test_without_a_table_the_owner_of_the_tensor_chooses(monkeypatch, platform) -> None:
    monkeypatch.setattr(tables, "_defaults", {})
    # What interrupted a test before may have left a table active.
    contextvars.Context().run(rms_norm, *inputs("rms_norm", platform.device)[0])
    (found,) = tables._defaults.values()
    assert found.platform.device_type == platform.device_type


def test_a_call_without_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(OpError, match="needs a tensor among its arguments"):
        ops.linear([1.0], [2.0], None)

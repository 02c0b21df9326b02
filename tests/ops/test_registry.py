from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reprise import ops
from reprise.errors import OpError
from reprise.graphs.plan import support_of
from reprise.ops import OpTable, all_ops, find, registry, rms_norm
from reprise.platforms.cpu import CpuPlatform


class WantsTriton(CpuPlatform):
    name = "wants_triton"
    preferred: ClassVar = {"rms_norm": ("absent", "triton"), "*": ("reference",)}
    has_triton = True


class NoTriton(WantsTriton):
    has_triton = False


def tensors(device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Arguments of every op."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    cache = (4, 8, 2, 16)
    return {
        "rms_norm": (randn(3, 9, 16)[:, 2:5], randn(16), 1e-6),
        "apply_penalties": (
            randn(3, 16), ints(2, 0), ints(*range(32), dtype=torch.int32).view(2, 16), ints(1, 0),
            randn(2).exp(), randn(2), randn(2),
        ),
        "argmax": (randn(3, 16),),
        "linear": (randn(3, 16), randn(5, 16), randn(5)),
        "norm_linear": (randn(3, 16), randn(16), 1e-6, randn(5, 16), randn(5)),
        "norm_gated_linear": (randn(3, 16), randn(16), 1e-6, randn(10, 16), None),
        "linear_into": (randn(3, 16), randn(5, 16), randn(3, 5)),
        "linear_add": (randn(3, 16), randn(5, 16), randn(5), randn(3, 5)),
        "silu_and_mul": (randn(3, 32),),
        "rotary_cache": (
            randn(3, 8 * 16), ints(0, 1, 2), randn(5, 16), ints(8, 9, 10), randn(*cache),
            randn(*cache), randn(16), None, 1e-6,
        ),
        "paged_attention": (
            randn(2, 4, 16), randn(*cache), randn(*cache), ints(1, 2, dtype=torch.int32).view(2, 1),
            ints(5, 8, dtype=torch.int32), ints(0, 1, 2, dtype=torch.int32),
            torch.zeros(2, 4, 16, device=device), 0.25, 0, 0.0, 1,
        ),
        "checksum": (ints(3, -1, 7, 0, 5, 9, dtype=torch.int32).view(1, 3, 2), ints(2, 0)),
        "sample": (
            randn(2, 11), randn(2).abs(), ints(0, 3, dtype=torch.int32), randn(2).sigmoid(),
            torch.zeros(2, device=device), ints(1, 2), ints(0, 0),
        ),
    }  # fmt: skip


BUILT_IN = sorted(tensors())


@pytest.fixture
def undeclared() -> Iterator[None]:
    """Ops that a test declares are gone afterwards; torch.library keeps their names."""
    before = dict(registry._ops)
    yield
    registry._ops.clear()
    registry._ops.update(before)


def test_these_tests_cover_every_built_in_op() -> None:
    declared = {name for name in ops.__all__ if isinstance(getattr(ops, name), ops.Op)}
    assert declared == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_opcheck(name) -> None:
    """Schema (what is mutated, what may alias) and fake implementation, by torch's own checks."""
    torch.library.opcheck(all_ops()[name].overload, tensors()[name])


@pytest.mark.parametrize("name", BUILT_IN)
def test_fake_results_look_like_real_ones(name) -> None:
    op = all_ops()[name]
    real = op(*tensors()[name])
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in tensors()[name]]
        fake = op(*inputs)
    if real is None:
        assert fake is None
    else:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert isinstance(fake, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_what_is_declared_is_written(name, platform) -> None:
    """By every implementation that runs here."""
    op = all_ops()[name]
    names = [argument.name for argument in op.overload._schema.arguments]
    for each in op.implementations.values():
        if each.requires(platform) is not None:
            continue
        arguments = tensors(str(platform.device))[name]
        before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        each.function(*arguments)
        changed = {
            argument
            for argument, old, new in zip(names, before, arguments, strict=True)
            if isinstance(new, Tensor) and not torch.equal(old, new)
        }
        assert changed == set(op.mutates), each.name


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
    assert OpTable(CpuPlatform()).chosen["paged_attention"].name == "torch"


def test_what_cannot_run_is_passed_over() -> None:
    assert OpTable(NoTriton()).chosen["rms_norm"].name == "reference"


def test_an_override_wins() -> None:
    table = OpTable(WantsTriton(), {"rms_norm": "reference"})
    assert table.chosen["rms_norm"].name == "reference"
    assert table.functions["rms_norm"] is rms_norm.implementations["reference"].function


def test_implementations_are_imported_when_they_are_considered(undeclared) -> None:
    declared = registry.op("late", does_nothing)
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

    declared = registry.op(f"stranded_{name}", plus_one, fake=torch.empty_like)
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


def test_an_implementation_whose_requirement_raises_is_skipped(undeclared) -> None:
    def requires(platform: Any) -> str | None:
        raise OSError("libvendor.so: no such file")

    declared = registry.op("demanding", plus_one, fake=torch.empty_like)
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
        registry.op("rms_norm", does_nothing)


def test_an_implementation_is_added_once() -> None:
    with pytest.raises(OpError, match="'rms_norm' already has an implementation 'triton'"):
        rms_norm.implementation("triton", "somewhere:else")


def test_a_break_op_returns_nothing() -> None:
    with pytest.raises(OpError, match="break op 'returning' must write into its arguments"):
        registry.op("returning", returns_a_tensor, break_op=True, fake=torch.empty_like)
    assert "returning" not in all_ops()


def test_an_op_that_returns_needs_a_fake() -> None:
    with pytest.raises(OpError, match="'faceless' returns a value and declares no fake"):
        registry.op("faceless", returns_a_tensor)


def test_graph_support_of_references(undeclared) -> None:
    plain = registry.op("plain_support", does_nothing)
    broken = registry.op("break_support", writes, mutates=("out",), break_op=True)
    chosen = registry.op(
        "chosen_support", writes, mutates=("out",), break_op=True, graph_support="uniform_batch"
    )
    references = [each.implementations["reference"] for each in (plain, broken, chosen)]
    support = [each.graph_support_on(CpuPlatform()) for each in references]
    assert support == ["always", "never", "uniform_batch"]


def test_graph_support_may_depend_on_the_platform(undeclared) -> None:
    def support(platform: Any) -> Any:
        return {"cpu": "always", "wants_triton": "single_token_decode"}.get(platform.name, "some")

    declared = registry.op("depends", writes, mutates=("out",), break_op=True)
    declared.implementation("vendor", writes, graph_support=support)
    for platform, level in ((CpuPlatform(), "always"), (WantsTriton(), "single_token_decode")):
        table = OpTable(platform, {"depends": "vendor"})
        assert support_of(table, [declared]) == {"depends (vendor)": level}

    class Other(CpuPlatform):
        name = "other"

    with pytest.raises(OpError, match="graph_support='some' of 'vendor' must be one of never"):
        declared.implementations["vendor"].graph_support_on(Other())


def test_a_declared_op_runs_and_is_known_to_the_dispatcher(undeclared) -> None:
    declared = registry.op("plus_one", writes, mutates=("out",), break_op=True)
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
    declared = registry.op("which_way", plus_one, fake=torch.empty_like)
    declared.implementation("other", lambda x: x + 2)
    yield declared
    del registry._ops["which_way"]


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
    declared = registry.op("latecomer", plus_one, fake=torch.empty_like)
    with table.activate():
        assert declared(torch.zeros(())).item() == 1
    assert table.chosen["latecomer"].name == "reference"


def test_without_a_table_the_owner_of_the_tensor_chooses(monkeypatch, platform) -> None:
    monkeypatch.setattr(registry, "_defaults", {})
    rms_norm(*tensors(str(platform.device))["rms_norm"])
    (table,) = registry._defaults.values()
    assert table.platform.device_type == platform.device_type

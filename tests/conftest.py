"""Fixtures shared by all tests. Tests name no device: they take the ``device`` fixture."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import covering
import on_device
import pytest
import seeds
import shares
import warm

if TYPE_CHECKING:
    from helpers import TinyModels


ON_CPU = ("cpu", "sim")
"""Devices whose kernels are the CPU's."""
LONGEST = (
    "test_sim.py", "test_matrix.py", "test_tensor_parallel.py", "test_plugin_platform.py",
    "test_trust.py", "test_compile_kernels.py", "test_shared_experts.py",
    "test_doctor_conformance.py",
)  # fmt: skip
"""In the order in which they begin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="platform to test on: cpu, cuda, xpu, ...")
    parser.addoption(
        "--long", action="store_true",
        help="all combinations, and random examples; an accelerator always gets the combinations",
    )  # fmt: skip
    parser.addoption(
        "--on-device", action="store_true",
        help="leave out tests that take no device: others have them, and they would do the same",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    seeds.set_profiles(config.getoption("--long"))
    # The tests start a hundred processes: to compile the same modules again would be half of what
    # each takes to import them.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    config.addinivalue_line("markers", "long: left out unless --long is given")
    config.addinivalue_line("markers", "covering(values): see tests/covering.py")
    config.addinivalue_line("markers", "cold: its processes start as users' do; see tests/warm.py")
    config.addinivalue_line("markers", "floor: measures what the device can do as users do")
    config.addinivalue_line("markers", "races: on the simulated accelerator it may have races")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts its background jobs so, and children inherit it: the tests that interrupt
        # a process would wait for ever.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--device") in ON_CPU:
        # Before triton is imported: its kernels then run under the interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Before torch is imported: tiny models gain nothing from threads, and where cores are shared
    # they wait for each other for most of the time. What a device is compared with is computed on
    # the CPU, too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest modules come first: no worker is left with one when the others are done.
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda each: places.get(each.path.name, len(places)))
    left: set[pytest.Item] = set()
    if not config.getoption("--long") and config.getoption("--device") in ON_CPU:
        left = {each for each in items if each.get_closest_marker("long")}
        left |= covering.left_over(each for each in items if each not in left)
    if config.getoption("--on-device"):
        left |= {each for each in items if not on_device.takes_it(each)}
    config.hook.pytest_deselected(items=[each for each in items if each in left])
    items[:] = [each for each in items if each not in left]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Any:
    """See tests/shares.py."""
    return shares.scheduler(config, log) if config.getoption("dist") == "loadscope" else None


def freeze() -> None:
    """What there is by now stays. Looking through a million such objects would take half of a test
    that starts and closes an engine."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries that look for leaks at the end would find all


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """What several tests share does not depend on which of them is the first."""
    if fixturedef.scope == "function":
        return (yield)
    case = getattr(request, "param_index", 0)
    with seeds.seeded(f"{fixturedef.baseid}::{fixturedef.argname}[{case}]"):
        return (yield)


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> None:
    """A test that fails fails again, alone too."""
    seeds.seed(request.node.nodeid)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What the modules before have imported, too. Of theirs no engine is left."""
    freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """What the user would type after ``--device``."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def own_kernels(device: str) -> bool:
    """The device computes with kernels that no CPU has."""
    return device not in ON_CPU


@pytest.fixture(scope="session")
def platform(device: str):
    """The platform under test."""
    from reprise import platforms

    found = platforms.resolve(device)
    found.activate()
    return found


@pytest.fixture(scope="session", autouse=True)
def time_to_verify(pytestconfig: pytest.Config) -> None:
    """On a busy machine too, start-up meets all probes, and live steps that it has not met are
    compared, whatever that costs, and do not run eagerly: tests rely on what was proven. Nor is a
    graph given up because the device was busy: with other tests, or, as ``sim``, always."""
    from reprise.graphs import prove, useless
    from reprise.graphs.canary import CanaryPolicy

    affords = CanaryPolicy.may_meet

    def may_meet(policy: CanaryPolicy, bucket: Any) -> bool:
        return policy._clock is time.perf_counter or affords(policy, bucket)

    CanaryPolicy.may_meet = may_meet  # type: ignore[method-assign]
    prove.VERIFY_SECONDS = 120.0
    if pytestconfig.getoption("--device") != "cpu":
        useless.BUSY_SECONDS = 3600.0


@pytest.fixture(scope="session", autouse=True)
def warm_processes(pytestconfig: pytest.Config) -> Iterator[None]:
    """Followers and replicas do not import for longer than they compute."""
    if pytestconfig.getoption("--device") != "cpu":
        yield
        return
    with warm.processes():
        yield


@pytest.fixture(autouse=True)
def cold_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of how processes start has them start."""
    warm.Popen.cold = request.node.get_closest_marker("cold") is not None
    yield
    warm.Popen.cold = False  # before what the next tests share is made


@pytest.fixture(autouse=True)
def default_logging() -> None:
    """Commands that run in this process set up its logging: what a test reads of the log does not
    depend on the tests before it."""
    logging.captureWarnings(False)
    for name in ("reprise", "py.warnings"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).setLevel("NOTSET")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter(pytestconfig: pytest.Config) -> None:
    """See tests/interpreter.py."""
    if pytestconfig.getoption("--device") != "cpu" or find_spec("triton") is None:
        return
    import interpreter

    interpreter.quicken()


@pytest.fixture(scope="session", autouse=True)
def rows_of_their_own(pytestconfig: pytest.Config) -> None:
    """Triton's interpreter multiplies tiles by the BLAS of NumPy, which on some processors sums a
    row in an order by where in the tile it stands, as no device does. In float64, rounded once,
    the order is not seen."""
    if pytestconfig.getoption("--device") != "cpu" or find_spec("triton") is None:
        return
    import numpy
    from triton.runtime import interpreter

    def rounded(a: Any, b: Any, dtype: Any = numpy.float32) -> Any:
        if dtype != numpy.float32:
            return numpy.matmul(a, b, dtype=dtype)
        return numpy.matmul(a, b, dtype=numpy.float64).astype(dtype)

    # NumPy as the interpreter sees it.
    interpreter.np = ModuleType("numpy")
    interpreter.np.__dict__.update(vars(numpy), matmul=rounded)


@pytest.fixture(autouse=True)
def no_races(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the simulated accelerator no two accesses of a test may be in no order."""
    # Not by the fixture: tests that take no device are told by that.
    if request.config.getoption("--device") != "sim" or request.node.get_closest_marker("races"):
        yield
        return
    import torch

    request.getfixturevalue("platform")
    with torch.sim.configured(races=True):
        yield
        torch.accelerator.synchronize()
        found = torch.sim.races(clear=True)
    assert not found, "\n".join(found)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Makes tiny random checkpoints: ``tiny("qwen3", num_hidden_layers=3).path``."""
    import transformers.modeling_utils  # noqa: F401 - a thousand modules
    from helpers import TinyModels

    freeze()
    return TinyModels(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def tolerance(device: str) -> float:
    """Largest difference between float32 logits of ours and of transformers on the CPU."""
    return 1e-4 if device == "cpu" else 2e-3

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from reprise import platforms
from reprise.config import EngineConfig
from reprise.errors import ConfigError, GraphError, OpError, PlatformError
from reprise.ops import OpTable
from reprise.platforms import Adjustment, MemoryInfo, Platform
from reprise.platforms import accelerator as accelerator_module
from reprise.platforms.accelerator import AcceleratorPlatform
from reprise.platforms.cpu import CpuPlatform


class Abacus(CpuPlatform):
    """A plug-in as a hardware team would write it."""

    name = "abacus"
    priority = 200
    dist_backend = "beads"
    here = True

    @classmethod
    def unavailable_reason(cls):
        return None if cls.here else "no abacus on this desk"

    @classmethod
    def device_count(cls):
        return 3

    def check_config(self, config):
        if config.block_size == 128:
            raise ConfigError("block_size=128: an abacus has at most 64 beads; use 64")
        if config.block_size is None:
            return config, []
        change = Adjustment("block_size", config.block_size, 64, "a rod has 64 beads")
        return config.replace(block_size=64), [change]


def install(monkeypatch, **entries):
    """Pretend that packages with these entry points are installed."""
    found = [
        EntryPoint(name=name, value=value, group=platforms.ENTRY_POINT_GROUP)
        for name, value in entries.items()
    ]
    monkeypatch.setattr(
        platforms, "entry_points", lambda group: found if group == "reprise.platforms" else []
    )


@pytest.fixture
def abacus(monkeypatch):
    install(monkeypatch, abacus=f"{__name__}:Abacus")
    monkeypatch.setattr(Abacus, "here", True)
    return Abacus


def test_the_built_in_platforms_are_known():
    assert platforms.names()[:4] == ["cuda", "rocm", "xpu", "cpu"]
    report = platforms.available()
    assert report["cpu"] is None
    for name in platforms.names():
        assert issubclass(platforms.load(name), Platform)
        assert platforms.load(name).name == name


def test_auto_takes_the_best_available_platform(platform):
    chosen = platforms.resolve("auto")
    usable = [platforms.load(n) for n, reason in platforms.available().items() if reason is None]
    assert chosen.priority == max(each.priority for each in usable)


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(PlatformError) as error:
        platforms.resolve("abacus")
    for part in ("'abacus'", "auto", "cuda", "rocm", "xpu", "cpu"):
        assert part in str(error.value)


def test_an_absent_device_says_why_and_lists_what_is_here():
    absent = next(name for name, reason in platforms.available().items() if reason is not None)
    with pytest.raises(PlatformError) as error:
        platforms.resolve(absent)
    assert absent in str(error.value)
    assert platforms.available()[absent] in str(error.value)
    assert "Available here: " in str(error.value)
    assert "cpu" in str(error.value).split("Available here:")[1]


@pytest.mark.parametrize(
    ("device", "part"),
    [
        ("cpu:7", "out of range"),
        ("auto:99", "out of range"),
        ("cpu:x", "NAME:INDEX"),
        ("cpu:²", "NAME:INDEX"),
    ],
)
def test_a_bad_index_is_refused(device, part):
    with pytest.raises(PlatformError, match=part):
        platforms.resolve(device)


def test_a_plug_in_is_found_by_its_entry_point(abacus):
    assert "abacus" in platforms.names()
    chosen = platforms.resolve("abacus:2")
    assert isinstance(chosen, Abacus)
    assert chosen.index == 2
    assert isinstance(platforms.resolve("auto"), Abacus)
    with pytest.raises(PlatformError, match="3 device"):
        platforms.resolve("abacus:3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("default_block_size", 12),
        ("default_block_size", 0),
        ("default_block_size", -4),
        ("default_batched_tokens", 0),
        ("default_batched_tokens", 1.5),
        ("default_batched_tokens", True),
        ("priority", "high"),
        ("graph_class", 7),
        ("graph_memory", "guess"),
        ("takes_ptx", None),
        ("fp8_dtype", "float8_e4m3fn"),
        ("preferred", ("triton",)),
        ("visible_devices_variable", 0),
    ],
)
def test_defaults_that_no_engine_can_have_are_refused(abacus, monkeypatch, field, value):
    monkeypatch.setattr(abacus, field, value)
    said = re.escape(f"'abacus' declares {field}={value!r}, which must be")
    with pytest.raises(PlatformError, match=said):
        platforms.resolve("abacus")


def test_what_has_no_default_and_is_not_declared_is_refused(abacus, monkeypatch):
    monkeypatch.delattr(CpuPlatform, "device_type")
    with pytest.raises(PlatformError, match="Abacus does not declare device_type"):
        platforms.resolve("abacus")


@pytest.mark.parametrize("order", [{"linaer": ("reference",)}, {"linear": "reference"}])
def test_an_order_of_implementations_that_means_nothing_is_refused(abacus, monkeypatch, order):
    monkeypatch.setattr(abacus, "preferred", order)
    with pytest.raises(OpError, match=r"'abacus' declares preferred=.*known ops: .*linear"):
        OpTable(platforms.resolve("abacus"))


def test_a_plug_in_whose_device_is_absent_says_why(abacus):
    abacus.here = False
    assert platforms.available()["abacus"] == "no abacus on this desk"
    with pytest.raises(PlatformError, match=r"no abacus on this desk.*Available here: .*cpu"):
        platforms.resolve("abacus")
    assert not isinstance(platforms.resolve("auto"), Abacus)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("no_such_module:Thing", "does not import"),
        (f"{__name__}:install", "not a subclass of Platform"),
    ],
)
def test_a_broken_plug_in_does_not_break_the_others(monkeypatch, value, part):
    install(monkeypatch, broken=value)
    with pytest.raises(PlatformError, match=part):
        platforms.resolve("broken")
    assert part in platforms.available()["broken"]
    assert platforms.resolve("cpu").name == "cpu"


def test_a_plug_in_whose_probe_raises_says_no_to_itself_alone(abacus, monkeypatch):
    def probe(cls):
        raise OSError("libabacus.so: cannot open shared object file")

    monkeypatch.setattr(Abacus, "unavailable_reason", classmethod(probe))
    assert "libabacus.so" in platforms.available()["abacus"]
    assert not isinstance(platforms.resolve("auto"), Abacus)
    with pytest.raises(PlatformError, match=r"OSError: libabacus\.so"):
        platforms.resolve("abacus")


def test_a_plug_in_cannot_take_a_built_in_name(monkeypatch):
    install(monkeypatch, cpu=f"{__name__}:Abacus")
    assert platforms.names().count("cpu") == 1
    assert platforms.load("cpu") is CpuPlatform


def test_check_config_returns_a_copy_with_reasons():
    config = EngineConfig(block_size=16)
    before = dataclasses.asdict(config)
    adjusted, changes = Abacus().check_config(config)
    assert dataclasses.asdict(config) == before
    assert adjusted.block_size == 64
    (change,) = changes
    assert str(change) == "block_size: 16 -> 64 (a rod has 64 beads)"
    with pytest.raises(ConfigError, match="use 64"):
        Abacus().check_config(EngineConfig(block_size=128))


@pytest.mark.parametrize("name", ["cuda", "rocm", "xpu", "cpu"])
def test_built_in_platforms_report_each_change_that_they_make(name):
    config = EngineConfig()
    adjusted, changes = platforms.load(name)(0).check_config(config)
    differing = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(adjusted, field.name)
    }
    assert differing == {each.field for each in changes}
    assert all(each.reason for each in changes)


def test_a_platform_orders_work_and_knows_its_memory(platform):
    stream, event = platform.stream(), platform.event()
    with platform.use_stream(stream):
        x = torch.ones(1000, device=platform.device) * 2
        event.record(stream)
    event.wait(platform.current_stream())
    platform.synchronize()
    assert float(x.sum()) == 2000
    memory = platform.memory_info()
    assert isinstance(memory, MemoryInfo)
    assert 0 < memory.free <= memory.total
    assert platform.cache_budget(0.9, 0) > 0
    platform.empty_cache()
    platform.reset_peak_memory()
    assert platform.peak_memory_allocated() >= 0


def test_a_platform_without_graphs_says_so():
    class Plain(CpuPlatform):
        name = "plain"
        has_graphs = Platform.has_graphs
        graph_pool = Platform.graph_pool
        new_graph = Platform.new_graph
        capture_stream = Platform.capture_stream

    plain = Plain()
    assert not plain.has_graphs
    for call in (plain.graph_pool, plain.new_graph, plain.capture_stream):
        with pytest.raises(GraphError, match="'plain' has no device graphs"):
            call()


def test_an_accelerator_that_says_no_more_than_it_must_runs_by_the_references():
    """The class that docs/adding-a-platform.md prints."""

    class Bare(AcceleratorPlatform):
        name = "bare"
        device_type = "cpu"
        graph_class = None

    bare = Bare()
    assert not bare.has_graphs
    assert not bare.has_triton
    assert {each.name for each in OpTable(bare).chosen.values()} <= {"torch", "reference"}


@pytest.mark.parametrize("name", ["cuda", "rocm", "xpu"])
def test_triton_runs_where_it_has_a_backend_for_the_device(monkeypatch, name):
    accelerator = platforms.load(name)
    backend = {"cuda": "nvidia", "rocm": "amd", "xpu": "intel"}[name]
    for installed in ([], ["other"], ["other", backend]):
        found = EntryPoints(EntryPoint(each, "x", "triton.backends") for each in installed)
        monkeypatch.setattr(accelerator_module, "entry_points", lambda group, found=found: found)
        assert accelerator(0).has_triton is (backend in installed)

"""Weights in one mapping, on large pages."""

import gc
import itertools
import mmap

import pytest
import torch
from helpers import make_llm

from reprise.platforms.large_pages import ALIGNMENT, LEAST, LargePages, available

pytestmark = pytest.mark.skipif(not available(), reason="the system has no large pages to ask for")

SHAPES = [
    ((3, 5), torch.float32),
    ((7,), torch.bfloat16),
    ((2, 3, 4), torch.uint8),
    ((1,), torch.int64),
    ((9, 2), torch.float8_e4m3fn),
]


def made(room: int) -> list[torch.Tensor]:
    with LargePages(room, len(SHAPES)):
        return [torch.empty(*shape, dtype=dtype, device="cpu") for shape, dtype in SHAPES]


def test_tensors_are_as_asked_for_side_by_side_and_apart():
    tensors = made(1 << 12)
    for each, (shape, dtype) in zip(tensors, SHAPES, strict=True):
        assert each.shape == shape
        assert each.dtype == dtype
        assert each.is_contiguous()
        assert each.data_ptr() % ALIGNMENT == 0
    for one, next_one in itertools.pairwise(tensors):
        assert 0 <= next_one.data_ptr() - (one.data_ptr() + one.nbytes) < ALIGNMENT


def test_memory_lives_as_long_as_one_of_its_tensors():
    tensors = made(1 << 12)
    for number, each in enumerate(tensors):
        each.view(torch.uint8).fill_(number + 1)
    kept = [(number + 1, each) for number, each in enumerate(tensors) if number != 2]
    del tensors, each
    gc.collect()
    others = [torch.full((1 << 12,), 255, dtype=torch.uint8) for _ in range(50)]
    for number, each in kept:
        assert each.view(torch.uint8).unique().tolist() == [number]
    del others


def test_what_does_not_fit_and_other_devices_are_made_as_ever():
    with LargePages(64, 1):
        first = torch.empty(16)
        beyond = torch.empty(64)
        meta = torch.empty(4, device="meta")
        nothing = torch.empty(0)
        filled = torch.zeros(4)
    beyond.fill_(1.0)
    first.fill_(2.0)
    assert beyond.eq(1.0).all()
    assert first.eq(2.0).all()
    assert filled.eq(0).all()
    assert meta.is_meta
    assert nothing.shape == (0,)
    assert abs(beyond.data_ptr() - first.data_ptr()) >= 128


@pytest.mark.parametrize(
    "others",
    [
        {"requires_grad": True},
        {"memory_format": torch.channels_last},
        {"layout": torch.sparse_coo},
        {"out": torch.zeros(2, 3, 4, 4)},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_else_is_asked_for_is_not_ignored(others):
    def empty() -> torch.Tensor:
        return torch.empty(2, 3, 4, 4, **others)

    expected = empty()
    with LargePages(1 << 12, 1):
        found = empty()
    assert found.layout == expected.layout
    assert found.requires_grad == expected.requires_grad
    assert "out" not in others or found is others["out"]
    assert found.is_sparse or found.stride() == expected.stride()


def test_a_number_names_an_accelerator():
    def kind() -> str | None:
        try:
            return torch.empty(4, device=0).device.type
        except (RuntimeError, AssertionError):  # there is none
            return None

    with LargePages(64, 1):
        assert kind() != "cpu"


def test_more_than_there_is_is_refused():
    with pytest.raises(MemoryError, match="GiB cannot be had"):
        LargePages(1 << 60, 1)


def flags_of(address: int) -> str:
    """What the kernel says of the mapping that an address lies in."""
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(each, 16) for each in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "VmFlags:":
                return line
    return ""


def test_weights_of_an_engine_lie_there(tiny, device):
    model = tiny("qwen3", hidden_size=256, intermediate_size=1024, vocab_size=4096)
    llm = make_llm(model, device, max_model_len=64)
    if llm.engine.platform.device.type != "cpu":
        pytest.skip("its weights lie on a device of its own")
    weights = [each for each in llm.engine.runner.model.parameters() if each.dim() > 1]
    assert sum(each.nbytes for each in weights) >= LEAST, "a larger model is needed"
    begin = min(each.data_ptr() for each in weights)
    end = max(each.data_ptr() + each.nbytes for each in weights)
    assert end - begin <= sum(each.nbytes + ALIGNMENT for each in weights)
    assert " hg " in flags_of(begin + mmap.PAGESIZE)


def test_a_kernel_without_them_gives_small_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("reprise.platforms.large_pages.mmap.mmap", Refusing)
    for each in made(1 << 12):
        each.view(torch.uint8).fill_(1)

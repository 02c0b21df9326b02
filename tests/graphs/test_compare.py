"""Comparing tensors bit by bit and within bounds, a piece at a time."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reprise.graphs import compare

SHAPES = [(), (7,), (1, 1), (5, 33), (3, 64, 8), (1, 40, 2, 16), (2, 1, 300)]


def _pairs(shape):
    """Equal; one element off by a little, by a lot; NaN on one side; NaN on both."""
    generator = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=generator)
    yield base, base.clone()
    last = (-1,) * len(shape)
    for value in (base[last] * (1 + 1e-4), base[last] + 3.0, math.nan):
        other = base.clone()
        other[last] = value
        yield base, other
        if math.isnan(value):
            yield other, other.clone()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_say_what_the_whole_says(shape, monkeypatch):
    for expected, got in _pairs(shape):

        def told(expected=expected, got=got):
            return [
                *(bool(compare.differs(expected, got, bound)) for bound in (None, 1e-3)),
                *(str(compare.difference("x", expected, got, bound)) for bound in (None, 1e-3)),
                str(compare.relative_difference(expected, got)),
            ]

        monkeypatch.setattr(compare, "_AT_ONCE", 1 << 30)
        whole = told()
        monkeypatch.setattr(compare, "_AT_ONCE", 16)
        assert told() == whole


@pytest.mark.parametrize("take", [
    lambda x: x[0, 0], lambda x: x[:1, 0], lambda x: x[0, ::15], lambda x: x.t()[:1, :1],
    lambda x: x[:0], lambda x: x.t(), lambda x: x[:, 3:4],
])  # fmt: skip
def test_bits_of_views_of_any_strides(take):
    base = torch.arange(30, dtype=torch.int32).view(2, 15)
    view, other = take(base), take(base.clone())
    assert compare.same_bits(view, other)
    if view.numel():
        other += 1
        assert not compare.same_bits(view, other)
        assert compare.difference("x", view, other).wrong == view.numel()


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        places = {each.untyped_storage().data_ptr() for each in tensors}
        made = isinstance(result, torch.Tensor)
        if made and result.untyped_storage().data_ptr() not in places:  # no view
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("bound", [None, 1e-3])
def test_memory_does_not_grow_with_the_tensors(bound):
    """Rows of 8,192 tokens in all layers, as float64, would be gigabytes."""
    expected = torch.zeros(4, 8, 512, 64, dtype=torch.bfloat16)[:, :, :500]
    got = expected.clone()
    got[3, 7, 499, 63] = 1
    before, compare._AT_ONCE = compare._AT_ONCE, 1 << 14
    try:
        with _Largest() as made:
            assert compare.differs(expected, got, bound)
            assert compare.difference("x", expected, got, bound).wrong == 1
            assert compare.relative_difference(expected, got) > 1
    finally:
        compare._AT_ONCE = before
    assert made.elements <= 2 * (1 << 14)  # bytes of two


class _Launches(TorchDispatchMode):
    """Calls of torch that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_many_pairs_are_compared_as_each_is_in_few_launches():
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    kept = [torch.ones(3, 2 + n % 3, dtype=kinds[n % 5]) for n in range(20)]
    kept += [torch.ones(2, compare.SMALL)[:, 1:], torch.ones(3 + compare.SMALL)[1:]]
    for wrong in (None, *range(len(kept))):
        pairs = [(each, each.clone()) for each in kept]
        if wrong is not None:
            pairs[wrong][1].view(-1)[-1] = 0
        with _Launches() as launches:
            flags = compare.differ(pairs)
        assert launches.count < 15
        found = bool(torch.stack(flags).any())
        assert found == any(bool(compare.differs(*each)) for each in pairs) == (wrong is not None)
    assert compare.differ([]) == []


def test_numbers_within_a_bound_are_no_difference_and_others_are_compared_by_bits():
    near, far = torch.full((2, 4), 1.001), torch.full((2, 4), 1.1)
    number, ones = torch.zeros(3, dtype=torch.int32), torch.ones(2, 4)
    for pairs, wrong in (
        ([(ones, near), (number, number)], False),
        ([(ones, far), (number, number)], True),
        ([(ones, near), (number, number + 1)], True),
    ):
        assert bool(torch.stack(compare.differ(pairs, 1e-2)).any()) == wrong

"""DeepSeek-V4's Triton kernels against their references, where requests, parts and chunks meet."""

from __future__ import annotations

import pytest
import torch

from reprise.ops import all_ops
from reprise.ops.cases import Maker
from reprise.ops.indexer.cases import arguments as index_arguments
from reprise.ops.sparse_attention.cases import arguments as attention_arguments

OPS = ("compressor", "hyper_connection", "hyper_head", "indexer", "kv_insert", "rotary_tail",
       "sparse_attention", "swiglu_clamp")  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def agree(platform, implementation):
    """``agree(name, make)``: the kernel gives what the reference gives for ``make()``."""

    def check(name, make) -> None:
        op, ours, theirs = all_ops()[name], make(), make()
        found = implementation(op, "triton")(**ours)
        expected = op.implementations["reference"].function(**theirs)
        pairs = [(ours[each], theirs[each]) for each in op.written(ours)]
        pairs += [] if expected is None else [(found, expected)]
        for one, other in pairs:
            if not one.is_floating_point():
                assert torch.equal(one, other)
                continue
            allowed = TOLERANCE[ours_dtype(ours)] * max(1.0, float(other.abs().max()))
            assert float((one.double() - other.double()).abs().max()) <= allowed

    return check


def ours_dtype(arguments) -> torch.dtype:
    """The roughest number among a call's."""
    floats = {x.dtype for x in arguments.values() if isinstance(x, torch.Tensor)}
    return max(floats & TOLERANCE.keys(), key=TOLERANCE.__getitem__)


@pytest.mark.parametrize("name", OPS)
def test_small_cases(agree, platform, dtypes, pytestconfig, name) -> None:
    """All of them in every type, in short runs every second one in one."""
    long = platform.device_type != "cpu" or pytestconfig.getoption("--long")

    taken = all_ops()[name].implementations["triton"]

    def cases(dtype):
        every = all_ops()[name].cases.small(Maker(platform.device, dtype))
        return [each for each in every if taken.refusal(**each) is None]

    for dtype in dtypes if long else dtypes[:1]:
        for number in range(0, len(cases(dtype)), 1 if long else 2):
            agree(name, lambda n=number, t=dtype: cases(t)[n])


@pytest.mark.parametrize("top", [3, 16, 17])
def test_the_choice_where_chunks_meet(agree, platform, top) -> None:
    """Requests with fewer rows than are chosen, as many, one more, and rows in several chunks; the
    scores of half of them are equal."""

    def make():
        found = index_arguments(
            Maker(platform.device, torch.float32), [64, 68, 72, 150, 7], [1] * 5, top, 4, 32, 1
        )
        found["keys"][::2] = 0.0
        return found

    agree("indexer", make)


@pytest.mark.parametrize(
    ("every", "top"),
    [
        pytest.param(0, 0, marks=pytest.mark.long),
        pytest.param(4, 0, marks=pytest.mark.long),
        (4, 8),
    ],
)
def test_attention_in_one_part_and_in_several(agree, platform, every, top) -> None:
    """What a token sees is cut where few tokens share the device, and is not where many do."""
    for lengths, new in (([150], [1]), ([1, 17, 90], [1, 1, 1]), ([40], [40])):
        agree(
            "sparse_attention",
            lambda a=lengths, b=new: attention_arguments(
                Maker(platform.device, torch.float32), a, b, 4, 32, 16, 0, every=every, top=top
            ),
        )


def test_holes_among_the_rows_that_are_chosen(agree, platform) -> None:
    def make():
        found = attention_arguments(
            Maker(platform.device, torch.float32), [90, 60], [1, 1], 4, 32, 16, 1, every=4, top=8
        )
        found["selected"][:, ::2] = 0
        return found

    agree("sparse_attention", make)


def test_streams_that_are_views(agree, platform) -> None:
    """What is written arrives in them, whatever their strides are."""

    def make():
        (found, *_) = all_ops()["hyper_connection"].cases.small(
            Maker(platform.device, torch.float32)
        )
        tokens, count, size = found["streams"].shape
        wide = found["streams"].new_zeros((tokens, count, size + 8))
        wide[:, :, :size] = found["streams"]
        found["streams"] = wide[:, :, :size]
        found["comb"] = found["comb"].transpose(1, 2).contiguous().transpose(1, 2)
        return found

    agree("hyper_connection", make)

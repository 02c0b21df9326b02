"""DeepSeek-V4's Triton kernels against their references, where requests, parts and chunks meet."""

from __future__ import annotations

import pytest
import torch

from reprise.ops import all_ops
from reprise.ops.cases import Maker
from reprise.ops.indexer.cases import arguments as index_arguments
from reprise.ops.latent_rows import as_codes, load
from reprise.ops.sparse_attention.cases import arguments as attention_arguments

OPS = ("compressor", "grouped_output", "hyper_connection", "hyper_head", "indexer",
       "kv_insert", "rotary_tail", "sparse_attention", "swiglu_clamp", "wide_linear")  # fmt: skip
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
            if one.element_size() == 1:
                # Codes: sums of squares in another order may move one by a step.
                one, other = one.float(), other.float()
                assert float((one != other).float().mean()) <= 1e-2
                torch.testing.assert_close(one, other, rtol=0.13, atol=2**-9)
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
    scores of half of them are equal. Of each alone there are too few tokens for chunks."""

    def make(lengths):
        found = index_arguments(
            Maker(platform.device, torch.float32), lengths, [1] * len(lengths), top, 4, 32, 1
        )
        found["keys"][::2] = 0.0
        return found

    for lengths in ([64, 68, 72, 150, 7], [64], [68], [7], [150, 72]):
        agree("indexer", lambda which=lengths: make(which))


@pytest.mark.parametrize("kind", ["far apart", "side by side", "negative", "both signs", "equal"])
def test_the_choice_among_any_scores(agree, platform, kind) -> None:
    """From 1e-30 to 1e30, and of neighbouring bits; of two heads one adds and one subtracts."""

    def make(lengths, top=9):
        found = index_arguments(
            Maker(platform.device, torch.float32), lengths, [1] * len(lengths), top, 2, 32, 1
        )
        generator = torch.Generator().manual_seed(0)
        keys = found["keys"].zero_()
        sizes = torch.rand(keys.shape[:2], generator=generator)
        near = kind == "side by side"
        sizes = 1 + (40 * sizes).int() * 2**-23 if near else 10 ** (60 * sizes - 30)
        share = {"negative": 1.0, "both signs": 0.5}.get(kind, 0.0)
        sizes = torch.ones_like(sizes) if kind == "equal" else sizes
        second = torch.rand(sizes.shape, generator=generator) < share
        keys[..., 0] = torch.where(second, 0.0, sizes).to(keys.device)
        keys[..., 1] = torch.where(second, sizes, 0.0).to(keys.device)
        found["query"].zero_()
        found["query"][:, 0, 0] = found["query"][:, 1, 1] = 1.0
        found["weights"][:, 0], found["weights"][:, 1] = 1.0, -1.0
        return {**found, "scale": 1.0}

    if kind != "equal":
        agree("indexer", lambda: make([150, 203, 96]))
    agree("indexer", lambda: make([203], 8))  # chunks of equal ones leave more than is expected
    if platform.device_type != "cpu":  # where a chunk has thousands of rows
        agree("indexer", lambda: make([131072, 400, 20000], 512))


@pytest.mark.parametrize(
    ("lengths", "top", "block"), [([203, 90], 1, 16), ([3, 2], 1, 3), ([2], 2, 2), ([1], 1, 1)]
)
def test_few_rows_are_chosen_of_many_and_of_few(agree, platform, lengths, top, block) -> None:
    """A search counts four at a time."""
    rows = [1] * len(lengths)
    agree(
        "indexer",
        lambda: index_arguments(
            Maker(platform.device, torch.float32), lengths, rows, top, 2, 32, 1,
            every=1, block=block,
        ),
    )  # fmt: skip


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


@pytest.mark.parametrize("rows", [1, 17, pytest.param(140, marks=pytest.mark.long)])
@pytest.mark.parametrize("sizes", [(2, 70, 200), (1, 30, 768)])
def test_products_of_groups(agree, platform, monkeypatch, implementation, rows, sizes) -> None:
    """Tiles of every size, those that are cut off, and inputs that programs share out."""
    implementation(all_ops()["grouped_output"], "triton")
    from reprise.ops.grouped_output import product_kernel

    few, *_ = product_kernel._CONFIGS
    cut = product_kernel.replace(few, block_k=64, programs=4)
    monkeypatch.setattr(product_kernel, "_CONFIGS", (cut, *product_kernel._CONFIGS[1:]))
    product_kernel.config_of.cache_clear()
    groups, outputs, inputs = sizes

    def make():
        made = Maker(platform.device, torch.float16)
        x = made.randn(rows, groups, inputs + 8)[:, :, 8:] / inputs**0.5
        return {"x": x, "weight": made.randn(groups * outputs, inputs)}

    agree("grouped_output", make)
    if groups == 1:
        arguments = {**make(), "x": make()["x"].squeeze(1)}
        found = implementation(all_ops()["wide_linear"], "triton")(**arguments)
        # Not rounded to the type of what is multiplied.
        expected = arguments["x"].double() @ arguments["weight"].double().t()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotated", [8, 64])
def test_codes_of_rows(platform, implementation, rotated) -> None:
    """The same as the reference's, from channels that are zero up to ones beyond every code; where
    one is infinite or no number the row's scale says so. Padding's block is left as it may be."""
    implementation(all_ops()["kv_insert"], "triton")
    make = Maker(platform.device, torch.float32)
    size, tokens = 64 + rotated, 6
    rows = make.randn(tokens, size) * torch.logspace(-7, 4, tokens, device=platform.device)[:, None]
    rows[1, :] = 0
    found, expected = (as_codes(make.randn(3, 4, size) * 0, rotated, torch.float8_e4m3fn)
                       for _ in range(2))  # fmt: skip
    slots = make.ints([4, 11, 6, 7, 8, 5])
    # A norm that divides by nothing: of rows whose mean square is 1.
    rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
    gain = torch.logspace(-6, 4, size, device=platform.device)
    gain[3] = torch.inf
    still = torch.cat(
        (gain.new_ones(1, rotated // 2 or 4), gain.new_zeros(1, rotated // 2 or 4)), 1
    )
    positions = make.ints([0] * tokens)
    for which, (cache, tail, scales) in (("triton", found), ("reference", expected)):
        function = all_ops()["kv_insert"].implementations[which].function
        function(rows, gain, 1e-6, positions, still, slots, cache, tail, scales)
    meant = [load(make.ints(range(12)), *each) for each in (found, expected)]
    assert not meant[1].isfinite().all()
    torch.testing.assert_close(*meant, rtol=0.13, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0, equal_nan=True)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)

"""Products: what they take, how their parts lie in them, and what a format has to say of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from helpers import tiny_config
from torch import Tensor

from reprise import models
from reprise.errors import ModelError
from reprise.layers import Build, Linear, Normed, Product, Residual, RMSNorm, Run, tensor
from reprise.layers.formats import DENSE, Format
from reprise.ops import OpTable
from reprise.platforms import Platform

PARTS = {"a": 8, "b": 16, "c": 8}


class Blocks(Format):
    """Plain numbers, and a scale for each block of 4 outputs and 2 inputs."""

    grain = (4, 2)

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        sizes = out_features // 4, in_features // 2
        return {
            "weight": torch.empty(out_features, in_features, dtype=dtype, device=device),
            "scale": torch.empty(sizes, dtype=dtype, device=device),
        }

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        scale = tensors["scale"].repeat_interleave(4, 0).repeat_interleave(2, 1)
        return torch.nn.functional.linear(x, tensors["weight"] * scale, bias)


class All:
    def __init__(self, format: Format) -> None:
        self.format = format

    def of(self, path: str) -> Format:
        return self.format


@pytest.fixture
def build(platform: Platform) -> Build:
    return Build(torch.float32, platform.device, max_model_len=16)


def filled(linear: Linear, seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    for each in linear.parameters():
        each.copy_(torch.randn(each.shape, generator=generator))
    return linear


@pytest.mark.parametrize("format", [DENSE, Blocks()], ids=["dense", "blocks"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_ways_to_multiply_agree(
    build: Build, platform: Platform, format: Format, bias: bool
) -> None:
    """Of any format: with the norm before it, the gate, the sum and the target behind it."""
    build = Build(build.dtype, build.device, build.max_model_len, All(format))
    linear = filled(Linear(build, 12, PARTS, bias=bias))
    norm = RMSNorm(build, 12, 1e-6)
    norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(5, 12, device=platform.device)
    with torch.inference_mode(), OpTable(platform).activate():
        plain, normed = linear(x), linear(norm(x))
        torch.testing.assert_close(linear(Normed(x, norm)), normed)
        for given, product in ((x, plain), (Normed(x, norm), normed)):
            gate, up = product.chunk(2, dim=1)
            torch.testing.assert_close(linear.gated(given), torch.nn.functional.silu(gate) * up)
        residual = torch.randn(5, 32, device=platform.device)
        for value in (Product(linear, x), plain):
            torch.testing.assert_close(tensor(value), plain)
            total = Residual(residual.clone())
            total.add(value)
            torch.testing.assert_close(total.values, residual + plain)
        torch.testing.assert_close(tensor(Normed(x, norm)), norm(x))
        wide = RMSNorm(build, 32, 1e-6)
        total = Residual(residual.clone())
        for value in (Product(linear, x), plain, Product(linear, x)):
            total.add(value)
        torch.testing.assert_close(tensor(total.normed(wide)), wide(residual + 3 * plain))
        torch.testing.assert_close(total.values, residual + 3 * plain)
        out = torch.full_like(residual, torch.nan)
        linear.into(x, out)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("format", [DENSE, Blocks()], ids=["dense", "blocks"])
def test_a_merged_product_is_its_parts_side_by_side(
    build: Build, platform: Platform, format: Format
) -> None:
    """Whatever else than a weight the format has: filled by parts, it multiplies by parts."""
    build = Build(build.dtype, build.device, build.max_model_len, All(format), "here")
    alone = [filled(Linear(build.at(n), 12, s, bias=True), s) for n, s in PARTS.items()]
    merged = Linear(build, 12, PARTS, bias=True)
    wanted = dict(merged.destinations())
    for each in alone:
        for name, source in each.destinations():
            wanted.pop(name).target.copy_(source.target)
    assert not wanted
    x = torch.randn(5, 12, device=platform.device)
    with torch.inference_mode(), OpTable(platform).activate():
        expected = torch.cat([each(x) for each in alone], dim=1)
        torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("format", [DENSE, Blocks()], ids=["dense", "blocks"])
def test_a_product_has_its_features_in_the_order_of_its_runs(
    build: Build, platform: Platform, format: Format
) -> None:
    """As where a checkpoint interleaves two projections head by head."""
    build = Build(build.dtype, build.device, build.max_model_len, All(format), "here")
    stored = {name: filled(Linear(build.at(name), 12, 16, bias=True)) for name in ("a", "b")}
    runs = [Run("a", 0, 4), Run("a", 8, 4), Run("b", 0, 16), Run("a", 12, 4), Run("a", 4, 4)]
    ordered = Linear(build, 12, runs, bias=True)
    sources = {key: each for part in stored.values() for key, each in part.destinations()}
    for name, (target, part, shape, *_) in ordered.destinations():
        source = sources[name].target
        assert shape in (None, tuple(source.shape))
        target.copy_(source[part])
    x = torch.randn(5, 12, device=platform.device)
    with torch.inference_mode(), OpTable(platform).activate():
        expected = [stored[name](x)[:, begin : begin + size] for name, begin, size, _ in runs]
        torch.testing.assert_close(ordered(x), torch.cat(expected, dim=1))


def test_parts_that_a_format_cannot_tell_apart_are_refused(build: Build) -> None:
    build = Build(build.dtype, build.device, build.max_model_len, All(Blocks()), "here")
    with pytest.raises(
        ModelError, match=r"here\.b are computed.* 6 output features.*multiple of 4"
    ):
        Linear(build, 12, {"a": 4, "b": 6})
    with pytest.raises(ModelError, match=r"here\.a, .* 4 output features from feature 2 on"):
        Linear(build, 12, [Run("a", 2, 4), Run("b", 0, 4)])
    Linear(build.at("b"), 12, 6)


def test_a_split_has_a_known_name(build: Build) -> None:
    with pytest.raises(ValueError, match="split='rows'"):
        Linear(build, 4, 4, split="rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral", "smollm3"])
def test_every_product_of_a_model_says_how_it_is_split(architecture: str) -> None:
    """What follows from it has to fit: the outputs of one are the inputs of the next."""
    config = tiny_config(architecture)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    model = models.build(config, Build(torch.float32, torch.device("meta"), 16))
    splits = {
        name.rpartition(".")[2]: each.split
        for name, each in model.named_modules()
        if isinstance(each, Linear)
    }
    assert splits == {
        "qkv_proj": "out", "o_proj": "in", "gate_up_proj": "out", "down_proj": "in",
        "lm_head": "out",
    }  # fmt: skip

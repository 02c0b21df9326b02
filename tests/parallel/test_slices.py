"""What each rank reads of a checkpoint: together everything, and equally much."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek import as_released
from helpers import TinyModels, stacked_experts
from quantized import BLOCK, EIGHT_BITS, FOUR_BITS, quantized
from safetensors.torch import load_file, save_file

from reprise import models
from reprise.distributed import ALONE, Group, own_experts
from reprise.errors import ModelError
from reprise.layers import Build, Implied
from reprise.loading import open_checkpoint
from reprise.loading.destinations import Misfits, as_stored, by_our_names, destinations
from reprise.loading.weight_files import stored_tensors
from reprise.runner.model_choices import build_model

IN_BLOCKS = ("fp8", "fp8-block")
"""As wide as all inputs of a tiny model."""
HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "smollm3": {}, "mixtral": {}, "qwen3_moe": {},
    "qwen2_moe": {}, "qwen3_next": HEADS, "qwen3_5": HEADS, "deepseek_v4": {},
}  # fmt: skip


EXPERTS = ("mixtral", "qwen3_moe", "qwen2_moe")


def parts_of(path: Path, size: int, spread: bool = False) -> dict[str, torch.Tensor]:
    """How often each number of the checkpoint is read, by any rank; ``spread``: whole experts are
    shared out."""
    checkpoint = open_checkpoint(str(path), revision=None, overrides={}, config_only=False)
    stored = stored_tensors(path)
    found = {
        name: torch.zeros(tuple(each.shape) or 1, dtype=torch.int32)
        for name, each in stored.items()
    }
    for rank in range(size):
        group = Group("test", rank, size)
        exchange = ALONE if spread else None
        build = Build(torch.float32, torch.device("meta"), 16, group=group, exchange=exchange)
        model = models.build(checkpoint.config, build)
        wanted = destinations(model)
        theirs = by_our_names(stored.items(), model.renames, Misfits("", ""))
        as_stored(model, wanted, theirs)
        for ours, places in wanted.items():
            name, _ = theirs.get(ours, (ours, None))
            for place in places:
                if name in found and isinstance(place, Implied):
                    found[name] += 1
                elif name in found:
                    assert tuple(found[name].shape) == tuple(place.stored_shape), name
                    part = found[name][place.part]
                    if place.convert is None:
                        assert part.shape == place.target.shape, name
                    part += 1
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_read_everything(tiny: TinyModels, family: str, size: int) -> None:
    for name, counts in parts_of(tiny(family, **FAMILIES[family]).path, size).items():
        assert counts.min() > 0, name
        # One rank's, or everyone's, or of so many as have the same key and value head.
        assert counts.max() in (1, 2, size), name


@pytest.mark.parametrize("stored", ["one by one", "as one"])
@pytest.mark.parametrize("family", EXPERTS)
def test_each_expert_is_read_by_one_rank(
    tiny: TinyModels, tmp_path: Path, family: str, stored: str
) -> None:
    path = tiny(family).path
    if stored == "as one":
        if family == "mixtral":
            pytest.skip("it is stored one by one")
        path = Path(shutil.copytree(path, tmp_path / "model"))
        tensors = stacked_experts(load_file(path / "model.safetensors"))
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    counts = parts_of(path, 2, spread=True)
    experts = {name: each for name, each in counts.items() if ".experts" in name}
    assert experts
    for name, each in experts.items():
        assert (each == 1).all(), name
    for name, each in counts.items():
        assert each.min() > 0, name


def test_experts_stand_in_a_row_over_data_and_tensor_ranks() -> None:
    shares = [
        own_experts(Group("tensor", tensor, 3), Group("data", data, 2), 12)
        for data in range(2)
        for tensor in range(3)
    ]
    assert [each.begin for each in shares] == [0, 2, 4, 6, 8, 10]
    assert {each.size for each in shares} == {2}
    with pytest.raises(ModelError, match=r"4 ranks do not divide 6 experts.*: 1, 2, 3, 6"):
        own_experts(Group("tensor", 0, 2), Group("data", 0, 2), 6)


@pytest.mark.parametrize("format", [*EIGHT_BITS, *FOUR_BITS])
def test_of_each_format(tiny: TinyModels, format: str) -> None:
    path = quantized(tiny("qwen3", intermediate_size=128), format).path
    if format in IN_BLOCKS:
        with pytest.raises(ModelError, match=f"in groups of {BLOCK}"):
            parts_of(path, 2)
        return
    for name, counts in parts_of(path, 2).items():
        assert counts.min() > 0, name


WIDE: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 128,
    "num_attention_heads": 4, "qk_rope_head_dim": 32, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 128, "compress_ratios": [4, 128], "num_hash_layers": 1, "n_routed_experts": 4,
    "index_head_dim": 32,
}  # fmt: skip
"""Of sizes that the blocks of a release divide, on two ranks as well."""


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_of_a_release_of_deepseek_v4(tiny: TinyModels, tmp_path: Path, experts: str) -> None:
    """With a half of the groups, and all that every head reads."""
    source = tiny("deepseek_v4", **WIDE).path
    as_released(source, tmp_path / "released", tmp_path / "meant", experts=experts)
    for name, counts in parts_of(tmp_path / "released", 2).items():
        shared = any(part in name for part in ("wq_b", "wo_", "sink", "experts.", "embed", "head"))
        shared = shared and not any(part in name for part in ("indexer", "hc_head"))
        if name.endswith(".scale"):  # of which some are read whole
            assert counts.min() > 0, name
        else:
            assert (counts == (1 if shared else 2)).all(), name


def test_an_error_names_the_sizes_that_will_do(tiny: TinyModels, platform: Any) -> None:
    path = tiny("qwen3").path
    config = open_checkpoint(str(path), revision=None, overrides={}, config_only=False).config
    heads = json.loads((path / "config.json").read_text())["num_attention_heads"]
    with pytest.raises(ModelError, match=rf"num_attention_heads={heads}.*can be shared by 1, 2"):
        build_model(
            config, max_model_len=16, table_blocks=1, dtype=torch.float32, cache_dtype=None,
            platform=platform, group=Group("test", 0, 3),
        )  # fmt: skip

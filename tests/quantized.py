"""Tiny checkpoints in the layouts of quantised ones, and the models that they stand for.

What a stored weight means is computed here from the formulas of the libraries that write such
checkpoints, and not by our code: both are compared.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers import TinyModel
from safetensors.torch import load_file, save_file
from torch import Tensor

TOOL = Path(__file__).parents[1] / "tools" / "quantize_checkpoint.py"
EIGHT_BITS = ("fp8", "fp8-tensor", "fp8-channel", "fp8-block")
FOUR_BITS = ("int4", "int4-asymmetric", "awq", "gptq", "gptq-asymmetric")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BLOCK = 128


@functools.cache
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantize_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


class Quantized(TinyModel):
    """A quantised checkpoint in a directory; as a model it is the plain one that it stands for,
    with activations that are quantised as its config says."""

    def __init__(self, path: Path, group: int) -> None:
        super().__init__(path)
        self.group = group

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return found

    @functools.cached_property
    def reference(self) -> Any:
        plain = self.path.with_name(f"{self.path.name}-meant")
        if not plain.exists():
            shutil.copytree(self.path, plain)
            tensors = load_file(self.path / "model.safetensors")
            save_file(meant(tensors, self.group), plain / "model.safetensors", {"format": "pt"})
            config = {k: v for k, v in self.config.items() if k != "quantization_config"}
            (plain / "config.json").write_text(json.dumps(config))
        model = TinyModel(plain).reference
        width = activation_group(self.config["quantization_config"])
        if width is not None:
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and ".layers." in name:
                    group = width or module.in_features
                    module.register_forward_pre_hook(
                        lambda module, args, group=group: (eight_bits(args[0], group),)
                    )
        return model


def quantized(model: TinyModel, method: str, group: int = 32) -> Quantized:
    """The checkpoint in this layout, made once."""
    path = model.path.with_name(f"{model.path.name}-{method}-{group}")
    if not path.exists():
        tool().quantize(model.path, path, method, group)
    return Quantized(path, group)


def activation_group(config: dict[str, Any]) -> int | None:
    """Inputs of an activation that share a scale; 0: all; None: they are not quantised."""
    if config["quant_method"] == "fp8":
        return BLOCK if config.get("weight_block_size") else 0
    if config["quant_method"] == "compressed-tensors":
        activations = config["config_groups"]["group_0"]["input_activations"]
        return None if activations is None else activations.get("group_size", 0)
    return None


def eight_bits(x: Tensor, group: int) -> Tensor:
    """What of x is left in float8_e4m3fn, with a scale of the largest magnitude / 448."""
    pieces = []
    for piece in x.split(group, dim=-1):
        scale = piece.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 448
        pieces.append((piece / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(pieces, dim=-1)


def meant(tensors: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """Plain weights in float32, of all products."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = each
    found: dict[str, Tensor] = {}
    for module, parts in modules.items():
        weight = _weight(parts, group)
        if weight is not None:
            found[f"{module}.weight"] = weight.float().contiguous()
        elif "weight" in parts:
            found[f"{module}.weight"] = parts["weight"]
        for last, each in parts.items():
            if last in ("bias", "A_log", "dt_bias"):
                found[f"{module}.{last}"] = each
    return found


def _weight(parts: dict[str, Tensor], group: int) -> Tensor | None:
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    if "weight" in parts and scale is not None:
        outputs, inputs = parts["weight"].shape
        rows, columns = torch.arange(outputs), torch.arange(inputs)
        if scale.dim() == 0 or len(scale) == outputs:
            return parts["weight"].float() * scale
        return parts["weight"].float() * scale[rows // BLOCK][:, columns // BLOCK]
    if "weight_packed" in parts and scale is not None:
        outputs, inputs = parts["weight_shape"].tolist()
        numbers = bits(parts["weight_packed"])[:, :inputs] - 8
        zeros = torch.zeros_like(scale)
        if "weight_zero_point" in parts:
            zeros = bits(parts["weight_zero_point"].t()).t()[:outputs] - 8
        of_group = torch.arange(inputs) // group
        return (numbers - zeros[:, of_group]) * scale.float()[:, of_group]
    if "qweight" not in parts:
        return None
    scales = parts["scales"].float().t()
    if "g_idx" in parts:
        numbers = bits(parts["qweight"].t())
        zeros = bits(parts["qzeros"]).t()
        if bool((zeros == 7).all()):
            zeros = zeros + 1
        of_group = parts["g_idx"].long()
    else:
        numbers = bits(parts["qweight"], AWQ_ORDER).t()
        zeros = bits(parts["qzeros"], AWQ_ORDER).t()
        of_group = torch.arange(numbers.shape[1]) // group
    return (numbers - zeros[:, of_group]) * scales[:, of_group]


def bits(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[N, W] int32 to [N, 8 * W]: ``order`` says which number each four bits are."""
    found = torch.empty(*words.shape, 8, dtype=torch.long)
    for place, each in enumerate(order):
        found[:, :, each] = words.long() >> 4 * place & 15
    return found.flatten(1)

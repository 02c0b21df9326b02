"""Quantise a plain checkpoint, rounding to nearest, into one of the layouts that real ones have.

    python tools/quantize_checkpoint.py --method gptq --out demo-gptq src/reprise/demo_model

writes the layers' products in eight or four bits and copies everything else; norms, embeddings and
the head stay plain. Rounding to nearest needs no data, and is less exact than what searches for
better roundings, in four bits above all; layouts and conventions are those of the libraries named
below.

    fp8              blocks of 128 by 128, as DeepSeek-V3 and Qwen3-FP8 have them (transformers)
    fp8-tensor       one scale a weight (AutoFP8)
    fp8-channel      one scale an output, activations by token (compressed-tensors)
    fp8-block        blocks of 128 by 128 (compressed-tensors)
    int4             groups of inputs, symmetric (compressed-tensors, pack-quantized)
    int4-asymmetric  the same with zero points
    awq              groups of inputs with zero points (AutoAWQ, gemm)
    gptq             groups of inputs, symmetric (AutoGPTQ, GPTQModel)
    gptq-asymmetric  the same with zero points (checkpoint_format gptq_v2)
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))

PLAIN = ("lm_head", "mlp.gate", "mlp.shared_expert_gate", "block_sparse_moe.gate")
"""The head, and routers of experts."""

Stored = dict[str, Tensor]
"""By the last part of the name."""


@dataclass(frozen=True)
class Method:
    """One layout."""

    quantise: Callable[[Tensor, int], Stored]
    """Of a weight [outputs, inputs] in float32; the number is the group's size."""
    config: Callable[[int], dict[str, Any]]
    """The ``quantization_config``."""
    grouped: bool = False
    """Groups may not be cut off."""
    outputs: int = 1
    """A product has a multiple of so many, which are stored together."""


# ---- eight bits ------------------------------------------------------------------------------


def by_scale(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-LARGEST, LARGEST).to(FP8)


def eight_bits_by_block(name: str) -> Callable[[Tensor, int], Stored]:
    def quantise(weight: Tensor, group: int) -> Stored:
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, -inputs % BLOCK, 0, -outputs % BLOCK))
        blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / LARGEST
        wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return {"weight": by_scale(weight, wide[:outputs, :inputs]), name: scale}

    return quantise


def eight_bits_by_output(weight: Tensor, group: int) -> Stored:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return {"weight": by_scale(weight, scale), "weight_scale": scale}


def eight_bits_whole(weight: Tensor, group: int) -> Stored:
    scale = weight.abs().amax().clamp(min=1e-12) / LARGEST
    return {"weight": by_scale(weight, scale), "weight_scale": scale}


# ---- four bits -------------------------------------------------------------------------------


def four_bits(
    weight: Tensor, group: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 to 15 [outputs, inputs], scales and zeros [outputs, groups]."""
    inputs = weight.shape[1]
    groups = F.pad(weight, (0, -inputs % group)).unflatten(1, (-1, group))
    if symmetric:
        scale = groups.abs().amax(dim=2) / 7.5
    else:
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scale = (high - low) / 15
    # As they are stored, before anything is divided by them.
    scale = scale.clamp(min=1e-5).to(dtype)
    wide = scale.float()
    zero = torch.full_like(wide, 8) if symmetric else (-low / wide).round().clamp(0, 15)
    numbers = (groups / wide.unsqueeze(2)).round() + zero.unsqueeze(2)
    return numbers.clamp(0, 15).byte().flatten(1)[:, :inputs], scale, zero.byte()


def in_words(numbers: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """[N, K] to [N, ceil(K / 8)] int32, the first of the order in the lowest bits."""
    padded = F.pad(numbers, (0, -numbers.shape[1] % 8)).long().unflatten(1, (-1, 8))
    words = sum(padded[:, :, each] << 4 * place for place, each in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def packed_ints(symmetric: bool) -> Callable[[Tensor, int], Stored]:
    def quantise(weight: Tensor, group: int) -> Stored:
        numbers, scale, zero = four_bits(weight, group, symmetric=symmetric, dtype=torch.bfloat16)
        found = {
            "weight_packed": in_words(numbers),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            found["weight_zero_point"] = in_words(zero.t()).t()
        return found

    return quantise


def awq(weight: Tensor, group: int) -> Stored:
    numbers, scale, zero = four_bits(weight, group, symmetric=False, dtype=torch.float16)
    return {
        "qweight": in_words(numbers.t(), AWQ_ORDER),
        "qzeros": in_words(zero.t(), AWQ_ORDER),
        "scales": scale.t(),
    }


def gptq(symmetric: bool) -> Callable[[Tensor, int], Stored]:
    def quantise(weight: Tensor, group: int) -> Stored:
        numbers, scale, zero = four_bits(weight, group, symmetric=symmetric, dtype=torch.float16)
        return {
            "qweight": in_words(numbers).t(),
            # The first convention stores one less; it cannot store 0.
            "qzeros": in_words((zero - 1 if symmetric else zero).t()),
            "scales": scale.t(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }

    return quantise


# ---- methods ---------------------------------------------------------------------------------


def compressed(layout: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations, "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": layout,
        "ignore": ["lm_head", *(f"re:.*{each}$" for each in PLAIN[1:])],
        "quantization_status": "compressed", "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }  # fmt: skip


def compressed_fp8(strategy: str, activations: str, **more: Any) -> dict[str, Any]:
    plain = {"num_bits": 8, "type": "float", "symmetric": True}
    structure = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    return compressed(
        "float-quantized",
        {**plain, "strategy": strategy, **structure},
        {**plain, "strategy": activations, "dynamic": True, **more},
    )


def compressed_int4(group: int, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return compressed("pack-quantized", {**weights, "symmetric": symmetric})


def gptq_config(group: int, symmetric: bool) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False,
        "sym": symmetric, "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }  # fmt: skip


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
METHODS: dict[str, Method] = {
    "fp8": Method(
        eight_bits_by_block("weight_scale_inv"),
        lambda group: {
            **FP8_CONFIG, "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(PLAIN),
        },
    ),
    "fp8-tensor": Method(
        eight_bits_whole, lambda group: {**FP8_CONFIG, "ignored_layers": list(PLAIN)}
    ),
    "fp8-channel": Method(eight_bits_by_output, lambda group: compressed_fp8("channel", "token")),
    "fp8-block": Method(
        eight_bits_by_block("weight_scale"),
        lambda group: compressed_fp8("block", "group", group_size=BLOCK),
    ),
    "int4": Method(packed_ints(True), lambda group: compressed_int4(group, True), grouped=True),
    "int4-asymmetric": Method(
        packed_ints(False), lambda group: compressed_int4(group, False), grouped=True
    ),
    "awq": Method(
        awq,
        lambda group: {
            "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": list(PLAIN),
        },
        grouped=True,
        outputs=8,
    ),
    "gptq": Method(gptq(True), lambda group: gptq_config(group, True), outputs=8),
    "gptq-asymmetric": Method(gptq(False), lambda group: gptq_config(group, False), outputs=8),
}  # fmt: skip


def is_product(name: str, tensor: Tensor) -> bool:
    """Whether it is the weight of a product in a layer."""
    path = name.removesuffix(".weight")
    return ".layers." in name and path != name and tensor.dim() == 2 and not path.endswith(PLAIN)


def quantize(source: Path, out: Path, method: str, group_size: int = 128) -> None:
    """Write the quantised checkpoint of ``source`` into the directory ``out``.

    Args:
        source: A checkpoint with plain weights in safetensors files.
        out: Must not exist yet.
        method: One of :data:`METHODS`.
        group_size: Inputs that share a scale, of the methods of four bits.

    Raises:
        FileExistsError: There is something at ``out``.
        ValueError: It is quantised already or has no such files, a product has no whole number of
            groups or is not finite, or groups of this size cannot be stored.
    """
    if group_size < 8 or group_size % 8:
        raise ValueError(f"--group-size {group_size}: give a multiple of 8")
    config = json.loads((source / "config.json").read_text())
    if any(config.get(name) for name in ("quantization_config", "compression_config")):
        raise ValueError(f"{source} is quantised: give the checkpoint that it was made from")
    out.mkdir(parents=True)
    try:
        _write(source, out, METHODS[method], group_size, config)
    except BaseException:
        shutil.rmtree(out)
        raise


def weight_files(source: Path) -> list[Path]:
    """Those that are loaded: others lie beside them, such as the model maker's own format."""
    whole, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [source / each for each in sorted(names)]
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{source} has no *.safetensors file")
    return found


def check(name: str, tensor: Tensor, chosen: Method, group_size: int) -> None:
    """Refuse a product that this method cannot store."""
    outputs, inputs = tensor.shape
    if chosen.grouped and inputs % group_size:
        raise ValueError(
            f"{name} has {inputs} inputs, no multiple of {group_size}: choose another --group-size"
        )
    if outputs % chosen.outputs:
        raise ValueError(
            f"{name} has {outputs} outputs, no multiple of {chosen.outputs}: choose another "
            "--method"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} has numbers that are not finite: the checkpoint is damaged")


def _write(
    source: Path, out: Path, chosen: Method, group_size: int, config: dict[str, Any]
) -> None:
    weights_at = weight_files(source)
    for file in source.iterdir():
        weights = file.suffix == ".safetensors" or file.name == "model.safetensors.index.json"
        if file.is_file() and not weights:  # a folder is another checkpoint, such as a head's
            shutil.copy(file, out / file.name)
    places: dict[str, str] = {}
    for file in weights_at:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensor = stored.get_tensor(name)
                if not is_product(name, tensor):
                    tensors[name] = tensor
                    continue
                check(name, tensor, chosen, group_size)
                for last, each in chosen.quantise(tensor.float(), group_size).items():
                    tensors[f"{name.removesuffix('weight')}{last}"] = each.contiguous()
        save_file(tensors, out / file.name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file.name))
    if len(set(places.values())) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_json(out / "config.json", {**config, "quantization_config": chosen.config(group_size)})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="directory to read")
    parser.add_argument("--method", required=True, choices=METHODS, help="layout to write")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--group-size", type=int, default=128, help="inputs that share a scale in four bits"
    )
    args = parser.parse_args()
    try:
        quantize(args.checkpoint, args.out, args.method, args.group_size)
    except (OSError, ValueError, SafetensorError) as error:
        parser.error(str(error))
    print(f"{args.out}: {sum(each.stat().st_size for each in args.out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

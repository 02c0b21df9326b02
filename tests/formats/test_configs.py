"""What quantization_config says is followed, or refused by its name with what to do instead."""

from __future__ import annotations

import ast
import copy
import json
from typing import Any

import pytest
from quantized import tool

from reprise.errors import ModelError
from reprise.layers.formats import DENSE, formats_of
from reprise.loading.hf_config import merged

Q_PROJ = "model.layers.3.self_attn.q_proj"
UP = "model.layers.3.mlp.up_proj"
ROUTER = "model.layers.3.mlp.gate"


def config(method: str, **fields: Any) -> dict[str, Any]:
    return {**tool().METHODS[method].config(128), **fields}


def compressed(
    method: str = "fp8-channel", *, group: Any = (), weights: Any = (), inputs: Any = (),
    **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """With some fields of the one group, its weights or its activations replaced."""
    found = copy.deepcopy(config(method))
    only = found["config_groups"]["group_0"]
    only["weights"].update(dict(weights))
    if inputs:
        only["input_activations"] = {**(only["input_activations"] or {}), **dict(inputs)}
    only.update(dict(group))
    found.update(fields)
    return found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "static activations": (config("fp8", activation_scheme="static"), "activation_scheme='static'"),
    "five exponent bits": (config("fp8", fmt="e5m2"), "fmt='e5m2'"),
    "scales of no known kind": (config("fp8", scale_fmt="ue4m3"), "scale_fmt='ue4m3'"),
    "powers of two without blocks": (
        config("fp8", scale_fmt="ue8m0", weight_block_size=None), "scale_fmt='ue8m0'"
    ),
    "odd blocks": (config("fp8", weight_block_size=[128]), "weight_block_size"),
    "blocks of nothing": (config("fp8", weight_block_size=[128, 0]), "weight_block_size"),
    "experts of four bits": (config("fp8", expert_dtype="fp4"), "expert_dtype='fp4'"),
    "embeddings too": (config("fp8", modules_to_convert=["embed_tokens"]), "modules_to_convert"),
    "no list": (config("fp8", modules_to_not_convert="lm_head"), "modules_to_not_convert"),
    "unknown": (config("fp8", rotate="hadamard"), "rotate='hadamard'.*'rotate': None"),
    "awq of three bits": (config("awq", bits=3), "bits=3"),
    "another layout": (config("awq", version="gemv"), "version='gemv'"),
    "another layout under its other name": (config("awq", format="gemv"), "format='gemv'"),
    "awq in order of use": (config("awq", desc_act=True), "desc_act=True"),
    "awq of other bits for some": (config("awq", dynamic={"-:.*": {}}), "dynamic="),
    "letters for modules": (
        config("gptq", modules_in_block_to_quantize="mlp"), "modules_in_block_to_quantize='mlp'"
    ),
    "numbers for modules": (
        config("awq", modules_in_block_to_quantize=[[1], 2]), "modules_in_block_to_quantize="
    ),
    "symmetric awq": (config("awq", zero_point=False), "zero_point=False"),
    "odd group": (config("awq", group_size=100), "group_size=100"),
    "act-order": (config("gptq", desc_act=True), "desc_act=True.*desc_act=False"),
    "gptq of eight bits": (config("gptq", bits=8), "bits=8"),
    "gptq without bits": (config("gptq", bits=None), "bits=None"),
    "marlin": (config("gptq", checkpoint_format="marlin"), "checkpoint_format=.'marlin'."),
    "two layouts": (config("gptq", format="gptq_v2"), "checkpoint_format"),
    "other bits for some": (config("gptq", dynamic={"-:.*": {}}), "dynamic="),
    "wide words": (config("gptq", pack_dtype="int64"), "pack_dtype='int64'"),
    "a flag that is none": (config("gptq", sym=1), "sym=1"),
    "a model in the making": (
        compressed(quantization_status="calibration"), "quantization_status='calibration'"
    ),
    "a cache of integers": (compressed(kv_cache_scheme={"num_bits": 8}), "type='int'"),
    "sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "rotations": (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config="),
    "static, compressed": (compressed(inputs={"dynamic": False}), "dynamic=False"),
    "a scale for all tokens": (compressed(inputs={"strategy": "tensor"}), "strategy='tensor'"),
    "weights alone": (compressed(group={"input_activations": None}), "no input_activations"),
    "eight bits of integers": (compressed(weights={"type": "int"}), "type='int', num_bits=8"),
    "four bits of floats": (
        compressed("int4", weights={"type": "float"}), "type='float', num_bits=4"
    ),
    "outputs": (compressed(group={"output_activations": {"num_bits": 8}}), "output_activations="),
    "no weights": (compressed(group={"weights": None}), "weights is missing"),
    "groups of inputs in order of use": (
        compressed("int4", weights={"actorder": "group"}), "actorder='group'"
    ),
    "activations of eight bits": (
        compressed("int4", inputs={"num_bits": 8}), "input_activations beside weights of four bits"
    ),
    "odd groups": (compressed("int4", weights={"group_size": 20}), "group_size=20"),
    "another packing": (compressed("int4", format="marlin-24"), "format='marlin-24'"),
    "packed floats": (compressed(format="pack-quantized"), "format='pack-quantized'"),
    "an unknown field of the weights": (
        compressed(weights={"codebook": [1]}), r"config_groups\.group_0\.weights: codebook"
    ),
    "no pattern": (compressed(ignore=["re:("]), r"'re:\(' is no regular expression"),
    "no object": (compressed(config_groups=[]), r"config_groups=\[\] must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_name(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as caught:
        formats_of(raw)
    assert str(caught.value).startswith("quantization_config")


def test_the_remedy_for_what_is_not_known_takes_it_away() -> None:
    """All of it at once, wherever it stands."""
    for raw in (
        config("awq", rotate="hadamard", twist=1),
        compressed(weights={"codebook": [1], "twist": 1}),
    ):
        with pytest.raises(ModelError) as caught:
            formats_of(raw)
        overrides = ast.literal_eval(str(caught.value).partition("hf_overrides=")[2])
        assert formats_of(merged(raw, overrides["quantization_config"])).of(UP) is not DENSE


REAL: dict[str, dict[str, Any]] = {
    "Qwen3-8B-FP8": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", ROUTER],
    },
    "DeepSeek-V3": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128], "modules_to_not_convert": [ROUTER],
    },
    "LLM Compressor, FP8": {
        "config_groups": {
            "group_0": {
                "input_activations": {
                    "actorder": None, "block_structure": None, "dynamic": True, "group_size": None,
                    "num_bits": 8, "observer": None, "observer_kwargs": {}, "strategy": "token",
                    "symmetric": True, "type": "float",
                },
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
                    "num_bits": 8, "observer": "minmax", "observer_kwargs": {},
                    "strategy": "channel", "symmetric": True, "type": "float",
                },
            }
        },
        "format": "float-quantized", "global_compression_ratio": 1.4,
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.12.2",
    },
    "LLM Compressor, W4A16": {
        "config_groups": {
            "group_0": {
                "input_activations": None, "output_activations": None, "targets": ["Linear"],
                "weights": {
                    "actorder": "weight", "block_structure": None, "dynamic": False,
                    "group_size": 128, "num_bits": 4, "observer": "minmax", "observer_kwargs": {},
                    "strategy": "group", "symmetric": True, "type": "int",
                },
            }
        },
        "format": "pack-quantized", "ignore": ["lm_head", ROUTER], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    },
    "Qwen3-AWQ": {
        "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None,
        "fuse_max_seq_len": None, "group_size": 128, "modules_to_not_convert": ["mlp.gate"],
        "modules_to_fuse": None, "quant_method": "awq", "version": "gemm", "zero_point": True,
    },
    "transformers 5, AWQ": {
        "zero_point": True, "modules_to_not_convert": None, "quant_method": "awq", "bits": 4,
        "tokenizer": None, "dataset": None, "group_size": 128, "damp_percent": 0.1,
        "desc_act": False, "act_group_aware": True, "sym": True, "true_sequential": True,
        "format": "gemm", "meta": None, "backend": "auto", "model_seqlen": None, "batch_size": 1,
        "block_name_to_quantize": None, "module_name_preceding_first_block": None,
        "pad_token_id": None, "max_input_length": None, "cache_block_outputs": True,
        "modules_in_block_to_quantize": None, "version": "gemm",
    },
    "an older LLM Compressor": {
        "config_groups": {
            "group_0": {
                "input_activations": {
                    "dynamic": True, "num_bits": 8, "observer": "memoryless",
                    "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float",
                },
                "output_activations": None, "targets": ["Linear"],
                "weights": {
                    "dynamic": False, "num_bits": 8, "observer": "minmax", "observer_kwargs": {},
                    "strategy": "channel", "symmetric": True, "type": "float",
                },
            }
        },
        "format": "float-quantized", "global_compression_ratio": 1.24,
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "frozen",
    },
    "GPTQModel": {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "dynamic": None,
        "group_size": 128, "lm_head": False, "quant_method": "gptq", "sym": True,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj", "mlp.down_proj"]],
        "meta": {"damp_percent": 0.1, "quantizer": ["gptqmodel:4.0"], "mse": 0.0},
    },
    "transformers, GPTQ": {
        "bits": 4, "tokenizer": None, "dataset": None, "group_size": 128, "damp_percent": 0.1,
        "desc_act": False, "sym": True, "true_sequential": True, "use_cuda_fp16": False,
        "model_seqlen": None, "block_name_to_quantize": None, "batch_size": 1, "pad_token_id": None,
        "module_name_preceding_first_block": None, "max_input_length": None, "quant_method": "gptq",
        "cache_block_outputs": True, "modules_in_block_to_quantize": [["self_attn.q_proj"],
        ["mlp.up_proj"]], "exllama_config": {"version": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REAL)
def test_configs_of_real_checkpoints(case: str) -> None:
    formats = formats_of(REAL[case])
    assert formats.of(Q_PROJ) is formats.of(UP) is not DENSE
    assert formats.of("lm_head") is formats.of(ROUTER) is DENSE


@pytest.mark.parametrize("name", ["AwqConfig", "GPTQConfig", "FineGrainedFP8Config"])
def test_what_transformers_writes_beside_such_weights(name: str) -> None:
    """Of the version that is installed: it adds fields from time to time."""
    import transformers

    made = getattr(transformers, name)
    raw = json.loads(json.dumps((made() if "FP8" in name else made(bits=4)).to_dict()))
    assert formats_of(raw).of(UP) is not DENSE


def test_awq_chooses_modules_as_gptq_does() -> None:
    for method in ("awq", "gptq"):
        formats = formats_of(
            config(method, lm_head=True, modules_in_block_to_quantize=[["mlp.up_proj"]])
        )
        assert formats.of("lm_head") is formats.of(UP) is not DENSE
        assert formats.of(Q_PROJ) is formats.of(ROUTER) is DENSE


def test_a_module_that_stays_plain_is_named_in_full() -> None:
    """Part of a name is no name: ``gate`` is another module than ``gate_proj``."""
    for method in ("fp8", "awq", "gptq"):
        formats = formats_of(config(method, modules_to_not_convert=["mlp.gate", "layers.1"]))
        assert formats.of(ROUTER) is formats.of("model.layers.1.mlp.up_proj") is DENSE
        for path in ("model.layers.3.mlp.gate_proj", "model.layers.11.mlp.up_proj"):
            assert formats.of(path) is not DENSE


def test_groups_and_targets() -> None:
    """A module's name counts for more than its class; what has no group is plain."""
    four, eight = compressed("int4"), compressed("fp8-channel", ignore=["re:.*layers.7.*"])
    groups = {
        "a": {**eight["config_groups"]["group_0"], "format": "float-quantized"},
        "b": {
            **four["config_groups"]["group_0"], "format": "pack-quantized",
            "targets": ["re:.*up_proj$", "model.layers.3.self_attn.q_proj"],
        },
    }  # fmt: skip
    formats = formats_of({**eight, "format": "mixed-precision", "config_groups": groups})
    assert formats.of(UP) is formats.of(Q_PROJ) is not formats.of("lm_head")
    assert formats.of("model.layers.7.mlp.up_proj") is DENSE
    assert formats.of("lm_head") is formats.of("model.layers.2.mlp.down_proj") is not DENSE
    del groups["a"]
    formats = formats_of({**eight, "config_groups": groups})
    assert formats.of("lm_head") is DENSE is not formats.of(UP)


def test_a_head_of_four_bits() -> None:
    assert formats_of(config("gptq", lm_head=True)).of("lm_head") is not DENSE

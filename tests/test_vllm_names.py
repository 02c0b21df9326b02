"""What programs written for vLLM pass along: accepted where it asks for nothing, else refused."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ODD, TinyModel, TinyModels, assert_idle, greedy, make_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
    vllm_names,
)
from reprise.config import EngineConfig
from reprise.errors import ConfigError, RepriseError, RequestError
from reprise.neutral import Group
from reprise.vllm_names import ASYNC_METHODS, ENGINE, METHODS, REQUEST, SAMPLING

README = Path(__file__).parent.parent / "README.md"

# As vLLM documents them for EngineArgs, AsyncEngineArgs and LLM, with their defaults; of those
# whose default is an object of vLLM's the empty dictionary, which vLLM makes into that object.
DOCUMENTED: dict[str, Any] = {
    "enable_return_routed_experts": False, "model_weights": "", "served_model_name": None,
    "tokenizer": None, "hf_config_path": None, "runner": "auto", "convert": "auto",
    "skip_tokenizer_init": False, "enable_prompt_embeds": False, "tokenizer_mode": "auto",
    "trust_remote_code": False, "allowed_local_media_path": "", "allowed_media_domains": None,
    "download_dir": None, "safetensors_load_strategy": "lazy", "load_format": "auto",
    "config_format": "auto", "dtype": "auto", "kv_cache_dtype": "auto", "seed": 0,
    "max_model_len": None, "cudagraph_capture_sizes": None, "max_cudagraph_capture_size": None,
    "distributed_executor_backend": None, "pipeline_parallel_size": 1,
    "master_addr": "127.0.0.1", "master_port": 29501, "nnodes": 1, "node_rank": 0,
    "tensor_parallel_size": 1, "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1, "dcp_kv_cache_interleave_size": 1,
    "cp_kv_cache_interleave_size": 1, "data_parallel_size": 1, "data_parallel_rank": None,
    "data_parallel_start_rank": None, "data_parallel_size_local": None,
    "data_parallel_address": None, "data_parallel_rpc_port": None,
    "data_parallel_hybrid_lb": False, "data_parallel_external_lb": False,
    "data_parallel_backend": "mp", "enable_expert_parallel": False,
    "all2all_backend": "allgather_reducescatter", "enable_dbo": False, "ubatch_size": 0,
    "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512,
    "disable_nccl_for_dp_synchronization": None, "eplb_config": {}, "enable_eplb": False,
    "expert_placement_strategy": "linear", "max_parallel_loading_workers": None,
    "block_size": None, "enable_prefix_caching": None, "prefix_caching_hash_algo": "sha256",
    "disable_sliding_window": False, "disable_cascade_attn": False, "swap_space": 4,
    "cpu_offload_gb": 0, "gpu_memory_utilization": 0.92, "kv_cache_memory_bytes": None,
    "max_num_batched_tokens": None, "max_num_partial_prefills": 1, "max_long_partial_prefills": 1,
    "long_prefill_token_threshold": 0, "max_num_seqs": None, "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs", "disable_log_stats": False,
    "aggregate_engine_logging": False, "revision": None, "code_revision": None, "hf_token": None,
    "hf_overrides": {}, "tokenizer_revision": None, "quantization": None,
    "allow_deprecated_quantization": False, "enforce_eager": False,
    "disable_custom_all_reduce": False, "limit_mm_per_prompt": {}, "enable_mm_embeds": False,
    "interleave_mm_strings": False, "media_io_kwargs": {}, "mm_processor_kwargs": None,
    "mm_processor_cache_gb": 4, "mm_processor_cache_type": "lru",
    "mm_shm_cache_max_object_size_mb": 128, "mm_encoder_only": False,
    "mm_encoder_tp_mode": "weights", "mm_encoder_attn_backend": None,
    "io_processor_plugin": None, "skip_mm_profiling": False, "video_pruning_rate": 0.0,
    "enable_lora": False, "max_loras": 1, "max_lora_rank": 16, "default_mm_loras": None,
    "fully_sharded_loras": False, "max_cpu_loras": None, "lora_dtype": "auto",
    "enable_tower_connector_lora": False, "specialize_active_lora": False,
    "ray_workers_use_nsight": False, "num_gpu_blocks_override": None,
    "model_loader_extra_config": {}, "ignore_patterns": "original/**/*",
    "enable_chunked_prefill": None, "disable_chunked_mm_input": False,
    "disable_hybrid_kv_cache_manager": None, "structured_outputs_config": {},
    "reasoning_parser": "", "reasoning_parser_plugin": None, "logits_processor_pattern": None,
    "speculative_config": None, "show_hidden_metrics_for_version": None,
    "otlp_traces_endpoint": None, "collect_detailed_traces": None, "kv_cache_metrics": False,
    "kv_cache_metrics_sample": 0.01, "cudagraph_metrics": False,
    "enable_layerwise_nvtx_tracing": False, "enable_mfu_metrics": False,
    "enable_logging_iteration_details": False, "enable_mm_processor_stats": False,
    "scheduling_policy": "fcfs", "scheduler_cls": None, "pooler_config": None,
    "compilation_config": {}, "attention_config": {}, "worker_cls": "auto",
    "worker_extension_cls": "", "profiler_config": {}, "kv_transfer_config": None,
    "kv_events_config": None, "ec_transfer_config": None, "generation_config": "auto",
    "enable_sleep_mode": False, "override_generation_config": {}, "model_impl": "auto",
    "override_attention_dtype": None, "attention_backend": None, "calculate_kv_scales": False,
    "mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto", "mamba_block_size": None,
    "mamba_cache_mode": "none", "additional_config": {}, "use_tqdm_on_load": True,
    "pt_load_map_location": "cpu", "logits_processors": None, "async_scheduling": None,
    "stream_interval": 1, "kv_sharing_fast_prefill": False, "optimization_level": 2,
    "kv_offloading_size": None, "kv_offloading_backend": "native", "tokens_only": False,
    "weight_transfer_config": None, "enable_log_requests": False, "chat_template": None,
    # Of versions before.
    "task": "auto", "rope_scaling": None, "rope_theta": None, "max_seq_len_to_capture": 8192,
    "disable_async_output_proc": False, "guided_decoding_backend": "auto",
    "override_pooler_config": None, "num_lookahead_slots": 0, "use_v2_block_manager": True,
    "disable_log_requests": False, "num_scheduler_steps": 1, "enable_prompt_adapter": False,
    "lora_extra_vocab_size": 256, "preemption_mode": None, "tokenizer_pool_size": 0,
    "disable_mm_preprocessor_cache": False, "multi_step_stream_outputs": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


def test_all_of_vllms_options_at_their_defaults(model: TinyModel, device: str) -> None:
    assert EngineConfig(**DOCUMENTED) == EngineConfig(max_logprobs=20)
    given = {**DOCUMENTED, "skip_tokenizer_init": True, "max_num_seqs": 2, "seed": None}
    llm = LLM(model=str(model.path), device=device, **{**given, "num_gpu_blocks_override": 9})
    assert llm.engine.config.num_blocks == 9
    assert len(llm.generate([[1, 2]], greedy(3))[0].outputs[0].token_ids) == 3


def test_prompts_as_older_versions_took_them_are_refused_by_their_name(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt_token_ids=\[\[1\]\]: give them as the prompt"):
        llm.generate(prompt_token_ids=[[1]], sampling_params=greedy(1))
    with pytest.raises(RequestError, match="prompt=None: give a string"):
        llm.generate()
    with pytest.raises(RequestError, match="messages='hi': give a list"):
        llm.chat("hi")


TABLES = [
    *((group, name, ConfigError) for group in ENGINE for name in group.neutral),
    *((group, name, RequestError) for group in (*REQUEST, *SAMPLING) for name in group.neutral),
]


@pytest.mark.parametrize(("group", "name", "error"), TABLES, ids=[each[1] for each in TABLES])
def test_each_name_is_accepted_at_its_neutral_values_and_refused_at_others(
    llm: LLM, group: Group, name: str, error: type[RepriseError]
) -> None:
    def give(value: Any) -> None:
        if group in ENGINE:
            EngineConfig(**{name: value})
        elif group in SAMPLING:
            SamplingParams(**{name: value})
            setattr(SamplingParams(), name, value)
        else:
            llm.generate([[1]], greedy(1), **{name: value})

    for value in (None, *group.neutral[name]):
        give(value)
    for value in ("never heard of", 77, [1], {"a": 1}):
        with pytest.raises(error) as caught:
            give(value)
        assert str(caught.value) == f"{name}={value!r}: {group.instead}"
    assert_idle(llm)


def test_a_number_is_no_flag() -> None:
    for values in ({"enable_lora": 0}, {"tensor_parallel_size": True}):
        with pytest.raises(ConfigError):
            EngineConfig(**values)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_model_length", "max_model_len"), ("gpu_memory_utilisation", "gpu_memory_utilization")],
)
def test_unknown_options_are_named(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"option {name} \(did you mean {meant}\?\); known: "):
        LLM(**{name: 1})


def test_unknown_arguments_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"samplig_params \(did you mean sampling_params\?\)"):
        llm.generate([[1]], samplig_params=greedy(1))
    with pytest.raises(RequestError, match="unknown argument of chat"):
        llm.chat([{"role": "user", "content": "hi"}], colour="red")
    outputs = llm.generate([[1], [2]], greedy(1), lora_request=[None, None])
    assert len(outputs) == 2


def test_words_that_mean_something_here(tmp_path: Path) -> None:
    assert EngineConfig(enforce_eager=True).graph_mode == "none"
    assert EngineConfig(enforce_eager=False, graph_mode="full").graph_mode == "full"
    with pytest.raises(ConfigError, match="enforce_eager=True and graph_mode='full'"):
        EngineConfig(enforce_eager=True, graph_mode="full")
    with pytest.raises(ConfigError, match="enforce_eager=1"):
        EngineConfig(enforce_eager=1)
    assert {EngineConfig(max_model_len=each).max_model_len for each in (-1, "auto")} == {None}
    with pytest.raises(ConfigError, match="num_gpu_blocks_override=5 and num_blocks=6"):
        EngineConfig(num_gpu_blocks_override=5, num_blocks=6)
    assert not EngineConfig(disable_custom_all_reduce=True).custom_all_reduce
    assert EngineConfig(disable_custom_all_reduce=False).custom_all_reduce
    with pytest.raises(ConfigError, match="disable_custom_all_reduce=True and custom_all_reduce"):
        EngineConfig(disable_custom_all_reduce=True, custom_all_reduce=True)
    with pytest.raises(ConfigError, match=r"custom_all_reduce=False and ops=.*triton"):
        EngineConfig(custom_all_reduce=False, ops={"all_reduce": "triton"})
    for value in ("half", "float16", torch.float16):
        assert EngineConfig(dtype=value).dtype == "float16"
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        EngineConfig(dtype=torch.int8)
    numbers = EngineConfig(max_num_seqs=np.int64(4), gpu_memory_utilization=np.float64(0.5))
    assert numbers == EngineConfig(max_num_seqs=4, gpu_memory_utilization=0.5)
    assert type(numbers.max_num_seqs) is int
    for values in ({"seed": True}, {"max_logprobs": -2}, {"max_logprobs": 1.5}):
        with pytest.raises(ConfigError):
            EngineConfig(**values)


@settings(max_examples=400)
@given(st.sampled_from([each.name for each in fields(EngineConfig)]), st.sampled_from(ODD))
def test_any_value_is_accepted_or_refused_by_name(name: str, value: Any) -> None:
    try:
        config = EngineConfig(**{name: value})
    except ConfigError as error:
        message = str(error)
    else:
        message = f"{name}="
        assert EngineConfig(**config.arguments()) == config.replace() == config
    assert f"{name}=" in message


def test_methods_that_there_are_not(llm: LLM) -> None:
    for name, reason in METHODS.items():
        assert not hasattr(llm, name)
        with pytest.raises(RepriseError) as caught:
            getattr(llm, name)
        assert str(caught.value) == f"LLM.{name}: {reason}"
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        llm.colour  # noqa: B018


def test_methods_that_there_are_not_on_the_streaming_one() -> None:
    engine = object.__new__(AsyncLLM)
    for name, reason in ASYNC_METHODS.items():
        assert not hasattr(engine, name)
        with pytest.raises(RepriseError) as caught:
            getattr(engine, name)
        assert str(caught.value) == f"AsyncLLM.{name}: {reason}"
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        engine.colour  # noqa: B018


def test_prompts_with_types(llm: LLM) -> None:
    prompts = [
        TokensPrompt(prompt_token_ids=[1, 2]),
        TokensPrompt(prompt_token_ids=[3], prompt="x"),
    ]
    outputs = llm.generate(prompts, greedy(1))
    assert [(each.prompt_token_ids, each.prompt) for each in outputs] == [
        ([1, 2], None),
        ([3], "x"),
    ]
    with pytest.raises(RequestError, match="prompt='a' is text and no tokenizer is loaded"):
        llm.generate(TextPrompt(prompt="a", cache_salt="b"), greedy(1))


def test_vllms_word_for_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that relies on it is not to lose it without a word."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert EngineConfig().batch_invariant
    assert not EngineConfig(batch_invariant=False).batch_invariant
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert not EngineConfig().batch_invariant


def test_engine_args(model: TinyModel, device: str) -> None:
    assert EngineArgs is AsyncEngineArgs
    options: dict[str, Any] = {"skip_tokenizer_init": True, "num_blocks": 33, "max_num_seqs": 4}
    arguments = AsyncEngineArgs(
        model=str(model.path), device=device, enforce_eager=True, disable_log_requests=True,
        **options,
    )  # fmt: skip
    expected = LLM.from_engine_args(arguments).generate([[1, 2]], greedy(4))[0]

    async def main() -> list[int]:
        llm = AsyncLLM.from_engine_args(arguments)
        found = []
        async for output in llm.generate(
            prompt=[1, 2], sampling_params=greedy(4), request_id="r", lora_request=None,
            trace_headers=None, priority=0, data_parallel_rank=None,
        ):  # fmt: skip
            found = output.outputs[0].token_ids
        with pytest.raises(RequestError, match=r"trace_headers=\{'a': 'b'\}"):
            llm.generate([1], trace_headers={"a": "b"})
        llm.shutdown()
        return found

    assert asyncio.run(main()) == expected.outputs[0].token_ids


def test_the_readme_has_the_table() -> None:
    assert vllm_names.markdown() in README.read_text()

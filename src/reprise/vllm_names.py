"""Names that vLLM documents and that Reprise has no use for, or another word.

Wrappers pass all of vLLM's options, most of them at the value that means "off". Each name is
accepted at such a value and refused at any other, with the reason (:mod:`reprise.neutral`). The
README's table is made from this one: ``python -m reprise.vllm_names``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from reprise.errors import RequestError
from reprise.neutral import ANY_FLAG, Group, drop_neutral

ENGINE = [
    Group(
        "LoRA adapters are not supported: merge the adapter into the checkpoint",
        {
            "enable_lora": (False,), "max_loras": (1,), "max_lora_rank": (16,),
            "max_cpu_loras": (), "lora_dtype": ("auto",), "fully_sharded_loras": (False,),
            "lora_extra_vocab_size": (256, 0), "default_mm_loras": ({},),
            "enable_tower_connector_lora": (False,), "specialize_active_lora": (False,),
            "enable_lora_bias": (False,), "long_lora_scaling_factors": (),
            "qlora_adapter_name_or_path": (),
            "enable_prompt_adapter": (False,), "max_prompt_adapters": (1,),
            "max_prompt_adapter_token": (0,),
        },
    ),
    Group(
        "quantised weights are read as the checkpoint's config says, and nothing else is quantised",
        {
            "allow_deprecated_quantization": (False,),
        },
    ),
    Group(
        "all layers have the cache that kv_cache_dtype says; its scales are those of each row, or "
        "the checkpoint's",
        {
            "calculate_kv_scales": ANY_FLAG, "quantization_param_path": (),
            "kv_cache_dtype_skip_layers": ([],),
        },
    ),
    Group(
        "devices are used by tensor_parallel_size=N, which shares a model out over N of them, and "
        "data_parallel_size=N, which makes N engines; those of several machines by "
        "distributed_executor_backend='ray'",
        {
            "pipeline_parallel_size": (1,),
            "data_parallel_size_local": (1,),
            "data_parallel_rank": (0,), "data_parallel_start_rank": (0,),
            "data_parallel_address": (), "data_parallel_rpc_port": (),
            "data_parallel_backend": ("mp",), "data_parallel_hybrid_lb": (False,),
            "data_parallel_external_lb": (False,), "prefill_context_parallel_size": (1,),
            "decode_context_parallel_size": (1,), "dcp_kv_cache_interleave_size": (1,),
            "cp_kv_cache_interleave_size": (1,), "dcp_comm_backend": ("ag_rs",),
            "nnodes": (1,), "node_rank": (0,), "master_addr": ("127.0.0.1",),
            "master_port": (29501,),
            "max_parallel_loading_workers": (), "ray_workers_use_nsight": (False,),
            "disable_nccl_for_dp_synchronization": ANY_FLAG, "worker_cls": ("auto",),
            "worker_extension_cls": ("",), "enable_fault_tolerance": (False,),
            "enable_elastic_ep": (False,), "numa_bind": (False,), "numa_bind_nodes": (),
            "numa_bind_cpus": (),
        },
    ),
    Group(
        "experts are spread by enable_expert_parallel alone, in the order of their numbers, and "
        "computed as ops={'experts': ...} says; see 'reprise doctor ops'",
        {
            "enable_eplb": (False,), "eplb_config": ({},),
            "expert_placement_strategy": ("linear",), "num_redundant_experts": (0,),
            "all2all_backend": ("allgather_reducescatter",), "enable_dbo": (False,),
            "ubatch_size": (0,), "dbo_decode_token_threshold": (32,),
            "dbo_prefill_token_threshold": (512,), "moe_backend": ("auto",),
            "enable_ep_weight_filter": (False,),
        },
    ),
    Group(
        "which experts computed a token is not returned",
        {"enable_return_routed_experts": (False,)},
    ),
    Group(
        "tokens are drafted as speculative_config says: {'method': 'ngram', "
        "'num_speculative_tokens': 4}",
        {
            "speculative_model": (), "num_speculative_tokens": (),
            "num_lookahead_slots": (0,), "spec_decode_acceptance_method": (),
            "spec_decoding_acceptance_method": ("rejection_sampler",),
            "ngram_prompt_lookup_max": (), "ngram_prompt_lookup_min": (),
            "speculative_draft_tensor_parallel_size": (), "speculative_max_model_len": (),
            "speculative_disable_by_batch_size": (), "speculative_model_quantization": (),
            "speculative_disable_mqa_scorer": (False,),
            "disable_logprobs_during_spec_decoding": ANY_FLAG,
            "typical_acceptance_sampler_posterior_threshold": (),
            "typical_acceptance_sampler_posterior_alpha": (),
        },
    ),
    Group(
        "models generate text: embeddings, classification and scores are not supported",
        {
            "task": ("auto", "generate"), "runner": ("auto", "generate"),
            "convert": ("auto", "none"), "pooler_config": ({},), "override_pooler_config": ({},),
            "enable_prompt_embeds": (False,),
        },
    ),
    Group(
        "models read text: images, audio and video are not supported",
        {
            "limit_mm_per_prompt": ({},), "mm_processor_kwargs": ({},), "media_io_kwargs": ({},),
            "mm_processor_cache_gb": (4, 0), "mm_processor_cache_type": ("lru",),
            "mm_shm_cache_max_object_size_mb": (128,), "mm_encoder_only": (False,),
            "enable_multimodal_encoder_data_parallel": (False,),
            "mm_encoder_tp_mode": ("weights",), "mm_encoder_attn_backend": (),
            "mm_tensor_ipc": ("direct_rpc",), "disable_mm_preprocessor_cache": ANY_FLAG,
            "disable_chunked_mm_input": ANY_FLAG, "interleave_mm_strings": (False,),
            "skip_mm_profiling": ANY_FLAG, "video_pruning_rate": (0,),
            "enable_mm_embeds": (False,), "enable_mm_processor_stats": (False,),
            "language_model_only": ANY_FLAG, "allowed_local_media_path": ("",),
            "allowed_media_domains": ([],), "io_processor_plugin": (),
        },
    ),
    Group(
        "give structured_outputs to SamplingParams, whose grammars are xgrammar's; the server has "
        "parsers",
        {
            "structured_outputs_config": ({},), "guided_decoding_backend": ("auto", "xgrammar"),
            "guided_decoding_disable_fallback": (False,),
            "guided_decoding_disable_any_whitespace": (False,),
            "guided_decoding_disable_additional_properties": (False,),
            "enable_reasoning": (False,),
            "reasoning_parser": ("",), "reasoning_parser_plugin": ("",), "reasoning_config": ({},),
        },
    ),
    Group(
        "custom logits processors are not supported: use logit_bias, allowed_token_ids, "
        "bad_words or the penalties of SamplingParams",
        {"logits_processors": ([],), "logits_processor_pattern": ()},
    ),
    Group(
        "the cache lives on the device, and requests that lack room are computed again",
        {
            "swap_space": (4, 0), "cpu_offload_gb": (0,), "cpu_offload_params": ([],),
            "offload_backend": ("auto",), "offload_group_size": (0,),
            "offload_num_in_group": (1,), "offload_prefetch_step": (1,), "offload_params": ([],),
            "kv_offloading_size": (), "kv_offloading_backend": ("native",),
            "preemption_mode": ("recompute",), "enable_sleep_mode": (False,),
            "kv_transfer_config": ({},), "kv_events_config": ({},), "ec_transfer_config": ({},),
            "weight_transfer_config": ({},), "kv_sharing_fast_prefill": (False,),
            "disable_hybrid_kv_cache_manager": ANY_FLAG, "mamba_cache_dtype": ("auto",),
            "mamba_ssm_cache_dtype": ("auto",), "mamba_block_size": (),
            "mamba_cache_mode": ("none",), "afd_config": ({},),
        },
    ),
    Group(
        "prompts longer than a step are computed in chunks: set max_num_batched_tokens",
        {
            "enable_chunked_prefill": (True,), "max_num_partial_prefills": (1,),
            "max_long_partial_prefills": (1,), "long_prefill_token_threshold": (0,),
        },
    ),
    Group(
        "the scheduler is one: by priority, then by arrival, one step ahead where devices allow",
        {
            "scheduling_policy": ("fcfs", "priority"), "scheduler_cls": (),
            "async_scheduling": (True,), "num_scheduler_steps": (1,),
            "multi_step_stream_outputs": ANY_FLAG, "scheduler_delay_factor": (0,),
            "scheduler_reserve_full_isl": ANY_FLAG, "use_v2_block_manager": ANY_FLAG,
            "disable_async_output_proc": ANY_FLAG, "stream_interval": (1,),
            "performance_mode": ("balanced",),
        },
    ),
    Group(
        "prefixes are found by the BLAKE2b digests of their tokens",
        {"prefix_caching_hash_algo": ("sha256", "sha256_cbor", "builtin")},
    ),
    Group(
        "attention is chosen with ops={'paged_attention': ...}; see 'reprise doctor ops'",
        {
            "attention_backend": ("auto",), "attention_config": ({},),
            "override_attention_dtype": (), "disable_cascade_attn": ANY_FLAG,
            "disable_sliding_window": (False,), "kernel_config": ({},),
            "linear_backend": ("auto",), "enable_flashinfer_autotune": ANY_FLAG,
        },
    ),
    Group(
        "graphs are chosen with graph_mode=, graph_buckets= and graph_verify=",
        {
            "compilation_config": ({},), "cudagraph_capture_sizes": ([],),
            "cuda_graph_sizes": ([],),
            "max_cudagraph_capture_size": (), "max_seq_len_to_capture": (8192,),
            "max_context_len_to_capture": (), "optimization_level": (2,), "ir_op_priority": ({},),
        },
    ),
    Group(
        "positions are set with hf_overrides={'rope_parameters': {...}}",
        {"rope_scaling": ({},), "rope_theta": ()},
    ),
    Group(
        "give SamplingParams; get_default_sampling_params() is what the checkpoint recommends",
        {"generation_config": ("auto",), "override_generation_config": ({},)},
    ),
    Group(
        "checkpoints are Hugging Face directories or ids with safetensors, read by Reprise alone",
        {
            "tokenizer_mode": ("auto", "hf"), "config_format": ("auto", "hf"),
            "model_impl": ("auto",), "hf_config_path": (), "code_revision": (),
            "model_weights": ("",), "model_loader_extra_config": ({},),
            "safetensors_load_strategy": ("lazy",), "pt_load_map_location": ("cpu",),
            "ignore_patterns": ("original/**/*", ["original/**/*"], []),
            "additional_config": ({},), "override_neuron_config": ({},),
            "model_class_overrides": ({},),
            "tokenizer_pool_size": (0,), "tokenizer_pool_type": ("ray",),
            "tokenizer_pool_extra_config": ({},), "renderer_num_workers": (1,),
        },
    ),
    Group(
        "no code of a checkpoint is ever run: supported architectures are in reprise/models",
        {"trust_remote_code": ANY_FLAG},
    ),
    Group(
        "the hub's client decides: set HF_TOKEN, HF_HOME, or give a local directory",
        {"hf_token": (), "download_dir": ()},
    ),
    Group(
        "give chat_template= to chat()",
        {"chat_template": ()},
    ),
    Group(
        "log probabilities are those of the model's unmodified logits",
        {"logprobs_mode": ("raw_logprobs",)},
    ),
    Group(
        "metrics are always on, see get_metrics(); tracing is start_profile() and 'reprise bench'",
        {
            "disable_log_stats": ANY_FLAG, "disable_log_requests": ANY_FLAG,
            "enable_log_requests": (False,), "aggregate_engine_logging": (False,),
            "show_hidden_metrics_for_version": (), "otlp_traces_endpoint": (),
            "collect_detailed_traces": ([],), "kv_cache_metrics": (False,),
            "kv_cache_metrics_sample": (0.01,), "cudagraph_metrics": (False,),
            "enable_layerwise_nvtx_tracing": (False,), "enable_mfu_metrics": (False,),
            "enable_logging_iteration_details": (False,), "profiler_config": ({},),
        },
    ),
    Group(
        "progress shows on a terminal's standard error and nowhere else",
        {"use_tqdm_on_load": (True,)},
    ),
    Group(
        "this is the HTTP server's business",
        {
            "served_model_name": (), "api_server_count": (1,),
            "tokens_only": (False,), "shutdown_timeout": (0,),
            "engine_use_ray": (False,), "disable_frontend_multiprocessing": ANY_FLAG,
            "fail_on_environ_validation": (False,),
        },
    ),
]  # fmt: skip
"""Options of ``LLM``, ``AsyncLLM``, ``EngineArgs`` and ``AsyncEngineArgs``."""

SERVER = [
    Group(
        "LoRA adapters are not supported: merge the adapter into the checkpoint",
        {"lora_modules": ([],), "prompt_adapters": ([],)},
    ),
    Group("give the options themselves", {"config": ()}),
    Group(
        "give --log-level and --log-format; prompts and answers are never logged",
        {
            "uvicorn_log_level": ("info",), "log_config_file": (), "max_log_len": (),
            "enable_log_outputs": (False,), "enable_log_deltas": ANY_FLAG,
            "disable_access_log_for_endpoints": (),
        },
    ),
    Group(
        "the server runs no code but its own",
        {"middleware": ([],), "tool_parser_plugin": ("",), "tool_server": ()},
    ),
    Group(
        "replies have it where it is known",
        {
            "enable_prompt_tokens_details": ANY_FLAG, "enable_server_load_tracking": ANY_FLAG,
            "enable_request_id_headers": ANY_FLAG,
        },
    ),
    Group(
        "give it in the requests that are to have it",
        {"return_tokens_as_token_ids": (False,)},
    ),
    Group(
        "a chat template is shown the tools whatever tool_choice says",
        {"exclude_tools_when_tool_choice_none": (False,)},
    ),
    Group(
        "limits of heads are --max-header-bytes and --header-timeout",
        {"h11_max_incomplete_event_size": (), "h11_max_header_count": ()},
    ),
    Group(
        "certificates are read once, with the ciphers of the system",
        {"enable_ssl_refresh": (False,), "ssl_ciphers": ()},
    ),
    Group(
        "the server has the paths that docs/serving.md lists",
        {"enable_tokenizer_info_endpoint": (False,), "enable_offline_docs": (False,)},
    ),
    Group("a server always listens", {"headless": (False,)}),
]  # fmt: skip
"""Flags of ``vllm serve`` beside those of engines."""

REQUEST = [
    Group(
        "give them as the prompt: [{'prompt_token_ids': [...]}], or a list of ids",
        {"prompt_token_ids": ([],), "inputs": ([],)},
    ),
    Group(
        "LoRA adapters are not supported: merge the adapter into the checkpoint",
        {"lora_request": ([],), "prompt_adapter_request": ([],)},
    ),
    Group(
        "give structured_outputs to SamplingParams",
        {"guided_options_request": ({},)},
    ),
    Group(
        "give the prompt as token ids to tokenize it otherwise",
        {"tokenization_kwargs": ({},), "prompt_text": ()},
    ),
    Group(
        "models read text: images, audio and video are not supported",
        {"mm_processor_kwargs": ({},)},
    ),
    Group("tracing is not supported", {"trace_headers": ({},)}),
    Group(
        "the router chooses the engine: start one server for each to choose yourself",
        {"data_parallel_rank": (0,)},
    ),
    Group(
        "output parsers are not supported",
        {"reasoning_ended": (False,), "reasoning_parser_kwargs": ({},)},
    ),
]
"""Arguments of ``generate`` and ``chat``."""

SAMPLING = [
    Group("give structured_outputs=StructuredOutputsParams(...)", {"guided_decoding": ()}),
    Group(
        "a budget for thinking is not supported: use max_tokens",
        {"thinking_token_budget": (-1,)},
    ),
    Group(
        "custom logits processors are not supported: use logit_bias, allowed_token_ids, "
        "bad_words or the penalties",
        {"logits_processors": ([],), "extra_args": ({},)},
    ),
    Group(
        "beam search is not supported: use n and a temperature",
        {
            "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1,),
            "early_stopping": (False,),
        },
    ),
    Group(
        "give logprobs, or prompt_logprobs: the entries have every token that they count",
        {
            "flat_logprobs": (False,), "logprob_token_ids": ([],),
            "prompt_logprob_token_ids": ([],), "prompt_logprob_start": (0,),
        },
    ),
    Group(
        "end the request with stop, stop_token_ids or abort",
        {"repetition_detection": ()},
    ),
    Group(
        "which experts computed a token is not returned",
        {"routed_experts_prompt_start": (0,)},
    ),
    Group("tokens are drawn, never given", {"trace_decode_token_ids": ([],)}),
    Group(
        "each step's tokens are delivered, several steps' at once to slow readers",
        {"stream_interval": (1,)},
    ),
    Group("every request gets a copy", {"skip_clone": ANY_FLAG}),
]  # fmt: skip
"""Fields of ``SamplingParams``."""

STRUCTURED = [
    Group(
        "a schema says it: set additionalProperties to false",
        {"disable_additional_properties": (False,)},
    ),
    Group(
        "white space in JSON is free up to a bound: use disable_any_whitespace",
        {"whitespace_pattern": ()},
    ),
    Group(
        "grammars are xgrammar's alone",
        {
            "backend": ("auto", "xgrammar"),
            "_backend": ("xgrammar",),
            "_backend_was_auto": ANY_FLAG,
            "disable_fallback": ANY_FLAG,
        },
    ),
]
"""Fields of ``StructuredOutputsParams``."""

METHODS = {
    "beam_search": "beam search is not supported: use SamplingParams(n=...) with a temperature",
    **dict.fromkeys(
        ("encode", "embed", "classify", "score", "reward"),
        "models generate text: embeddings, classification and scores are not supported",
    ),
    **dict.fromkeys(
        ("sleep", "wake_up"), "sleeping is not supported: shutdown() frees the device's memory"
    ),
    **dict.fromkeys(
        ("collective_rpc", "apply_model"), "the engine runs in this process: use llm.engine.runner"
    ),
    "llm_engine": "the engine is llm.engine",
    "set_tokenizer": "give tokenizer= to the constructor",
    "reset_mm_cache": "images, audio and video are not supported, so there is no such cache",
    "preprocess_chat": "give messages to chat()",
}
"""Attributes of vLLM's ``LLM`` that there are not, and what to say."""

ASYNC_METHODS = {
    **{name: METHODS[name] for name in ("encode", "sleep", "wake_up", "reset_mm_cache")},
    "is_sleeping": METHODS["sleep"],
    "collective_rpc": "the engine runs in this process: use engine.runner",
    **dict.fromkeys(
        ("add_lora", "remove_lora", "list_loras", "pin_lora"),
        "LoRA adapters are not supported: merge the adapter into the checkpoint",
    ),
    **dict.fromkeys(
        ("check_health", "is_running", "is_stopped", "errored", "dead_error"),
        "an engine that has died says so at every call: ask stats()",
    ),
    **dict.fromkeys(
        ("vllm_config", "model_config", "get_vllm_config", "get_model_config"),
        "the options are engine.config",
    ),
    **dict.fromkeys(
        ("do_log_stats", "log_stats"), "metrics are always on: see stats() and get_metrics()"
    ),
    **dict.fromkeys(
        ("pause_generation", "resume_generation", "is_paused"),
        "requests are computed as they come: abort() ends them",
    ),
    "add_request": "give requests to generate()",
}
"""The same of vLLM's ``AsyncLLM``."""


def refuse_others(method: Callable[..., Any], others: Mapping[str, Any]) -> None:
    """Check what a method of an engine was called with beside its own arguments.

    Raises:
        RequestError: It asks for something, or its name is unknown.
    """
    known = [name for name in inspect.signature(method).parameters if name != "others"]
    drop_neutral(others, REQUEST, known, f"argument of {method.__name__}():", RequestError)


def markdown() -> str:
    """The tables of the README."""
    lines = []
    titles = (
        ("`LLM(...)`, `AsyncLLM(...)`, `EngineArgs(...)`, `reprise serve`", ENGINE),
        ("`reprise serve` beside", SERVER),
        ("`generate(...)`, `chat(...)`", REQUEST),
        ("`SamplingParams(...)`", SAMPLING),
        ("`StructuredOutputsParams(...)`", STRUCTURED),
    )
    for title, groups in titles:
        lines += [f"| {title}: accepted at | at any other value |", "| --- | --- |"]
        for group in groups:
            names = ", ".join(_shown(name, values) for name, values in group.neutral.items())
            lines.append(f"| {names} | {_sentence(group.instead)} |")
        lines.append("")
    for kind, methods in (("LLM", METHODS), ("AsyncLLM", ASYNC_METHODS)):
        lines += [f"| not on `{kind}` | |", "| --- | --- |"]
        reasons: dict[str, list[str]] = {}
        for name, reason in methods.items():
            reasons.setdefault(reason, []).append(f"`{name}`")
        lines += [f"| {', '.join(names)} | {_sentence(why)} |" for why, names in reasons.items()]
        lines.append("")
    lines.pop()
    return "\n".join(lines) + "\n"


def _shown(name: str, values: tuple[Any, ...]) -> str:
    if values == ANY_FLAG:
        return f"`{name}`"
    return f"`{name}={values[0]!r}`" if values else f"`{name}=None`"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    print(markdown(), end="")

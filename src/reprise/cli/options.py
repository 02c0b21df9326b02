"""The option groups that commands share. Each option's home is its dataclass field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import typer

from reprise.bench.presets import model_names
from reprise.cli.fields import FieldOptions, Special, json_object, whole_number
from reprise.config import Dtype, EngineConfig
from reprise.sampling_params import SamplingParams


def _op_override(text: str) -> tuple[str, str]:
    name, _, implementation = text.partition("=")
    if not name or not implementation:
        raise typer.BadParameter(f"{text!r} is not NAME=IMPL; 'reprise doctor ops' lists both")
    return name, implementation


def _model(text: str) -> str:
    """A model for an engine; the names that benchmarks give to random weights are no models."""
    if text in model_names() and not Path(text).exists():
        raise typer.BadParameter(
            f"{text!r} is a configuration that 'reprise bench' fills with random weights; here "
            "give a directory or a Hugging Face id, such as Qwen/Qwen3-0.6B"
        )
    return text


def _length(text: str) -> int | str:
    """A number of tokens, or vLLM's word for as many as can be."""
    return text if text == "auto" else whole_number(text)


ENGINE_PANELS = {
    "Model": (
        "model", "tokenizer", "revision", "tokenizer_revision", "dtype", "load_format",
        "quantization", "hf_overrides", "skip_tokenizer_init",
    ),
    "Memory and batching": (
        "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
        "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype", "num_blocks",
        "enable_prefix_caching",
    ),
    "Graphs": ("graph_mode", "graph_verify", "graph_buckets", "graph_memory_profile"),
    "Device": (
        "device", "data_parallel_size", "tensor_parallel_size", "enable_expert_parallel",
        "count_expert_load", "custom_all_reduce", "distributed_executor_backend",
        "distributed_timeout_seconds", "ops",
    ),
    "Drafts": ("speculative_config",),
    "Sampling": ("seed", "batch_invariant", "max_logprobs"),
}  # fmt: skip

ONE_ENGINE = ("data_parallel_size", "distributed_executor_backend")
"""Fields that mean nothing to a command which looks into one engine."""

_ONE_ENGINE_REMEDY = (
    "this command looks into one engine: leave it out, or share the model out with "
    "--tensor-parallel-size; 'reprise serve' and 'reprise bench throughput' take it"
)

ENGINE_SPECIAL = {
    "model": Special(
        flags=("--model", "-m"),
        help="Local directory or Hugging Face id; default: the bundled demo model.",
        metavar="TEXT",
        parse=_model,
    ),
    "ops": Special(
        flags=("--op",),
        help="Use this implementation of an op instead of the platform's choice; repeatable.",
        metavar="NAME=IMPL",
        parse=_op_override,
        repeated=True,
        collect=dict,
    ),
    "no_enable_prefix_caching": Special(
        help="Do not share the cache blocks of equal prompt beginnings."
    ),
    "no_custom_all_reduce": Special(help="Let ranks exchange by the backend's collectives alone."),
    # vLLM's other words for them are values, too.
    "dtype": Special(metavar="|".join(get_args(Dtype)), parse=str),
    "seed": Special(help="Of the random draws: the same seed gives the same text."),
    "max_model_len": Special(metavar="INTEGER", parse=_length),
    "max_num_batched_tokens": Special(metavar="INTEGER", parse=whole_number),
    "kv_cache_memory_bytes": Special(metavar="INTEGER", parse=whole_number),
    "hf_overrides": Special(metavar="JSON", parse=json_object),
    "speculative_config": Special(metavar="JSON", parse=json_object),
}


def engine_options(*omit: str, **shown_defaults: Any) -> FieldOptions:
    """Options for the fields of :class:`EngineConfig`.

    Args:
        *omit: Fields that the command decides itself.
        **shown_defaults: Where the command's default differs from the field's.
    """
    return FieldOptions(
        EngineConfig,
        omit=frozenset(omit),
        refused={name: _ONE_ENGINE_REMEDY for name in ONE_ENGINE if name in omit},
        panels=ENGINE_PANELS,
        special=ENGINE_SPECIAL,
        shown_defaults=shown_defaults,
    )


def sampling_options(**shown_defaults: Any) -> FieldOptions:
    """Options for the fields of :class:`SamplingParams` that make sense for one answer.

    What is not given is as the checkpoint recommends.
    """
    names = (
        "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "ignore_eos",
    )  # fmt: skip
    by_checkpoint = dict.fromkeys(names[2:6])
    return FieldOptions(
        SamplingParams,
        names=names,
        default_panel="Sampling",
        special={
            "stop": Special(
                help="End the answer before this text; repeatable.", metavar="TEXT", repeated=True
            ),
            "temperature": Special(help="0: greedy. Default: as the checkpoint recommends, or 1."),
            "max_tokens": Special(flags=("--max-tokens", "-n"), help="Most tokens to generate."),
        },
        shown_defaults={**by_checkpoint, **shown_defaults},
    )

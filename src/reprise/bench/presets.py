"""Models and workloads with names, so that a table of figures can be measured again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprise.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_MODEL = "qwen3-0.6b"


def model_names() -> tuple[str, ...]:
    """Models whose config is part of this package; their weights are random."""
    return tuple(sorted(each.parent.name for each in CONFIGS.glob("*/config.json")))


def engine_arguments(model: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LLM`` for a benchmark.

    Args:
        model: A name of :func:`model_names` (random weights), or whatever ``LLM`` takes.
        options: Engine options that the user or the workload set.
    """
    arguments = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **options}
    name = DEFAULT_MODEL if model is None else model
    if name in model_names() and not Path(name).exists():
        arguments.setdefault("load_format", "dummy")
        name = str(CONFIGS / name)
    return {"model": name, **arguments}


@dataclass(frozen=True)
class LatencyWork:
    """Requests of one length, all at once. ``None`` for the output lengths: by batch size.

    Raises:
        ConfigError: The output lengths are not a shorter and a longer one.
    """

    batch_sizes: tuple[int, ...] = (1,)
    input_lens: tuple[int, ...] = (128,)
    output_lens: tuple[int, int] | None = None
    model: str = DEFAULT_MODEL
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output_lens is not None:
            short, long = self.output_lens
            if not 1 <= short < long:
                raise ConfigError(
                    f"output_lens={short},{long}: give two lengths, the shorter first"
                )

    def lengths(self, batch_size: int) -> tuple[int, int]:
        """The two output lengths between which the time of a step is measured."""
        return self.output_lens or ((32, 288) if batch_size == 1 else (16, 144))


@dataclass(frozen=True)
class ThroughputWork:
    """Requests of random lengths, all at once."""

    num_prompts: int = 256
    input_len_range: tuple[int, int] = (100, 1024)
    output_len_range: tuple[int, int] = (100, 1024)
    model: str = DEFAULT_MODEL
    engine: Mapping[str, Any] = field(default_factory=dict)


_GPU: Mapping[str, Any] = {"dtype": "bfloat16", "max_model_len": 4096}
_LONG: Mapping[str, Any] = {"dtype": "bfloat16", "max_model_len": 33024}
_ON_FOUR: Mapping[str, Any] = {**_GPU, "tensor_parallel_size": 4, "max_num_seqs": 64}
_EAGLE3: Mapping[str, Any] = {
    **_GPU,
    "speculative_config": {
        "method": "eagle3",
        "model": str(CONFIGS / "heads" / "qwen3-8b-eagle3"),
        "num_speculative_tokens": 3,
    },
}

LATENCY: Mapping[str, LatencyWork] = {
    "0.6b-bs1": LatencyWork(engine=_GPU),
    "0.6b-bs2": LatencyWork((2,), engine=_GPU),
    "0.6b-bs4": LatencyWork((4,), engine=_GPU),
    "0.6b-bs64": LatencyWork((64,), engine=_GPU),
    "0.6b-batches": LatencyWork((1, 2, 4, 8, 16, 32, 64, 128, 256), engine=_GPU),
    "0.6b-contexts": LatencyWork(
        (1,), (1024, 2048, 4096, 8192, 16384, 32768), (16, 80), engine=_LONG
    ),
    "8b-bs1": LatencyWork(model="qwen3-8b", engine=_GPU),
    "8b-bs2": LatencyWork((2,), model="qwen3-8b", engine=_GPU),
    "8b-bs4": LatencyWork((4,), model="qwen3-8b", engine=_GPU),
    "8b-bs8": LatencyWork((8,), model="qwen3-8b", engine=_GPU),
    "8b-bs64": LatencyWork((64,), model="qwen3-8b", engine=_GPU),
    "8b-eagle3-bs1": LatencyWork(model="qwen3-8b", engine=_EAGLE3),
    "8b-eagle3-bs8": LatencyWork((8,), model="qwen3-8b", engine=_EAGLE3),
    "8b-fp8-bs1": LatencyWork(model="qwen3-8b-fp8", engine=_GPU),
    "8b-fp8-bs64": LatencyWork((64,), model="qwen3-8b-fp8", engine=_GPU),
    "8b-fp8-prefill-8k": LatencyWork((1,), (8192,), (16, 80), "qwen3-8b-fp8", _LONG),
    "8b-awq-bs1": LatencyWork(model="qwen3-8b-awq", engine=_GPU),
    "8b-batches": LatencyWork((1, 2, 4, 8, 16, 32, 64, 128, 256), model="qwen3-8b", engine=_GPU),
    "8b-contexts": LatencyWork(
        (1,), (1024, 2048, 4096, 8192, 16384, 32768), (16, 80), "qwen3-8b", _LONG
    ),
    "8b-bs1-32k": LatencyWork((1,), (32768,), (16, 80), "qwen3-8b", _LONG),
    "8b-bs8-16k": LatencyWork((8,), (16384,), (16, 80), "qwen3-8b", _LONG),
    "8b-bs32-8k": LatencyWork((32,), (8192,), (16, 80), "qwen3-8b", _LONG),
    "8b-prefill-8k": LatencyWork((1,), (8192,), (16, 80), "qwen3-8b", _LONG),
    "30b-a3b-bs1": LatencyWork(model="qwen3-30b-a3b", engine=_GPU),
    "30b-a3b-bs8": LatencyWork((8,), model="qwen3-30b-a3b", engine=_GPU),
    "30b-a3b-bs64": LatencyWork((64,), model="qwen3-30b-a3b", engine=_GPU),
    "30b-a3b-batches": LatencyWork((1, 8, 64), model="qwen3-30b-a3b", engine=_GPU),
    "3.5-4b-bs1": LatencyWork(model="qwen3.5-4b", engine=_GPU),
    "3.5-4b-bs64": LatencyWork((64,), model="qwen3.5-4b", engine=_GPU),
    "3.5-4b-prefill-8k": LatencyWork((1,), (8192,), (16, 80), "qwen3.5-4b", _LONG),
    "35b-a3b-bs1": LatencyWork(model="qwen3.5-35b-a3b", engine=_GPU),
    "next-80b-a3b-bs1": LatencyWork(model="qwen3-next-80b-a3b", engine=_ON_FOUR),
    "next-80b-a3b-bs64": LatencyWork((64,), model="qwen3-next-80b-a3b", engine=_ON_FOUR),
    "v4-flash-bs1": LatencyWork(model="deepseek-v4-flash", engine=_ON_FOUR),
    "v4-flash-bs64": LatencyWork((64,), model="deepseek-v4-flash", engine=_ON_FOUR),
    "30b-a3b-prefill": LatencyWork((1,), (3900,), (16, 80), "qwen3-30b-a3b", _GPU),
}

THROUGHPUT: Mapping[str, ThroughputWork] = {
    "0.6b": ThroughputWork(engine=_GPU),
    "8b": ThroughputWork(model="qwen3-8b", engine=_GPU),
    "30b-a3b": ThroughputWork(model="qwen3-30b-a3b", engine=_GPU),
}

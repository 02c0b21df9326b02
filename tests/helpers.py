"""Tiny random checkpoints, engines over them, and transformers as the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek import FIELDS, randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import LLM, RequestOutput, RequestOutputKind, SamplingParams, platforms
from reprise.runner import parts

VOCAB = 160
CONTEXT = 256
ARCHITECTURES = ("qwen3", "llama")

_SHARPNESS = 2.0
"""Gain of normalised query and key heads: heads then look at single tokens."""
_STDS = {"q_proj": 0.3, "k_proj": 0.3, "v_proj": 0.5, "o_proj": 0.5, "embed_tokens": 0.3,
         "lm_head": 0.4, "gate": 0.3, "experts": 0.25}  # fmt: skip
_OTHER_STD = 0.1
_HYBRID_STDS = {"lm_head": 0.12, "embed_tokens": 0.12, "conv1d": 0.25}
"""Of models with linear attention, whose hidden states vary more."""
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "head_dim": None,
    },
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}  # fmt: skip
"""What configs of sparse mixtures have beside those of dense models."""
_ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_conv_kernel_dim": 4,
    # Sizes of keys and values that differ, and three value heads for each key head.
    "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "max_position_embeddings": 512,
}  # fmt: skip
_SHARED = {**_EXPERTS["qwen3_moe"], "shared_expert_intermediate_size": 48}
_POSITIONS = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
_HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_LINEAR, **_SHARED, "rope_parameters": _ROPE, "mlp_only_layers": [1]},
    "qwen3_5": {
        **_LINEAR, "rope_parameters": {**_ROPE, **_POSITIONS}, "tie_word_embeddings": True,
    },
    "qwen3_5_moe": {**_LINEAR, **_SHARED, "rope_parameters": {**_ROPE, **_POSITIONS}},
}  # fmt: skip
_EXPERTS.update(_HYBRIDS)
_EXPERTS["deepseek_v4"] = FIELDS
HYBRIDS = (*_HYBRIDS, "qwen3_5_vl", "qwen3_5_moe_vl")
"""Models with linear attention; the last two also have a part that reads images."""
_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip


class TinyModel:
    """A checkpoint in a directory, and what transformers computes from it in float32."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def reference(self) -> Any:
        from transformers import AutoConfig

        kind = _auto_class(AutoConfig.from_pretrained(self.path))
        model = kind.from_pretrained(self.path, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, V]: row t predicts token t + 1."""
        with torch.no_grad():
            return self.reference(torch.tensor([list(token_ids)])).logits[0].float()

    @functools.cached_property
    def _exact(self) -> Any:
        model = copy.deepcopy(self.reference).double()
        model.set_experts_implementation("eager")  # others have no float64
        return model

    def exact_logits(self, token_ids: Sequence[int]) -> Tensor:
        """:meth:`logits` in float64."""
        with torch.no_grad():
            return self._exact(torch.tensor([list(token_ids)])).logits[0]

    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        return self.logits(token_ids).log_softmax(dim=-1)

    def is_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether greedy decoding by transformers gives ``output``.

        By induction: each token is the argmax behind the tokens before it.
        """
        logits = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
        top = logits.topk(2).values
        margin = float((top[:, 0] - top[:, 1]).min())
        assert margin > 1e-4, "two tokens are nearly tied: this prompt decides nothing"
        return logits.argmax(dim=-1).tolist() == list(output)


class TinyModels:
    """Makes tiny checkpoints, each once. Call it with an architecture and fields of its config."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, TinyModel] = {}

    def __call__(
        self,
        architecture: str = "qwen3",
        *,
        seed: int = 0,
        decisive: bool = False,
        std: float | None = None,
        **fields: Any,
    ) -> TinyModel:
        key = json.dumps([architecture, seed, decisive, std, fields], sort_keys=True)
        if key not in self._made:
            path = self._root / f"{architecture}-{len(self._made)}"
            model = random_model(architecture, seed, std, **fields)
            if decisive:
                widen_choices(model)
            model.save_pretrained(path)
            self._made[key] = TinyModel(path)
        return self._made[key]

    def near(self, model: TinyModel) -> TinyModel:
        """One that often predicts what the model does: its weights are others by a little."""
        key = f"near {model.path}"
        if key not in self._made:
            path = self._root / f"near-{model.path.name}"
            other = TinyModel(model.path).reference
            generator = torch.Generator().manual_seed(0)
            for each in other.parameters():
                each.mul_(1 + 0.03 * torch.randn(each.shape, generator=generator))
            other.save_pretrained(path)
            self._made[key] = TinyModel(path)
        return self._made[key]


_CONFIGS = {
    "deepseek_v4": "DeepseekV4Config",
    "granite": "GraniteConfig",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "mixtral": "MixtralConfig",
    "qwen2": "Qwen2Config",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config",
    "qwen3_5": "Qwen3_5TextConfig",
    "qwen3_5_moe": "Qwen3_5MoeTextConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_next": "Qwen3NextConfig",
    "smollm3": "SmolLM3Config",
}


def config_class(name: str) -> Any:
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def _auto_class(config: Any) -> Any:
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def tiny_config(architecture: str, **fields: Any) -> Any:
    if architecture.endswith("_vl"):
        return _seeing_config(architecture.removesuffix("_vl"), **fields)
    kind = config_class(_CONFIGS[architecture])
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    values.update({**_EXPERTS.get(architecture, {}), **fields})
    if "moe_intermediate_size" in values and architecture == "deepseek_v4":
        del values["intermediate_size"]  # another name of the same
    if values["head_dim"] is None:
        del values["head_dim"]
    return kind(**values)


def _seeing_config(architecture: str, **fields: Any) -> Any:
    """Of a model that reads images too: what :func:`tiny_config` gives, within another one."""
    text = tiny_config(architecture, **fields)
    kind = config_class(_CONFIGS[architecture].replace("Text", ""))
    return kind(
        text_config=text.to_dict(), vision_config=_VISION, image_token_id=VOCAB - 4,
        video_token_id=VOCAB - 3, vision_start_token_id=VOCAB - 2, vision_end_token_id=VOCAB - 1,
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def random_model(architecture: str, seed: int = 0, std: float | None = None, **fields: Any) -> Any:
    """A transformers model whose greedy output is varied and far from ties.

    Weights at the usual standard deviation of 0.02 repeat one token for ever: there a wrong
    position, or a token that attention misses, would change nothing. ``std``: of all matrices, and
    heads are not sharpened.
    """
    config = tiny_config(architecture, **fields)
    stds = {**_STDS, **(_HYBRID_STDS if architecture in HYBRIDS else {})}
    model = _auto_class(config).from_config(config)
    if architecture == "deepseek_v4":
        randomise(model, seed)
        return model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        *_, layer, kind = name.split(".")
        with torch.no_grad():
            if kind == "bias":
                parameter.normal_(0.0, 0.3, generator=generator)
            elif kind == "A_log":
                parameter.uniform_(0.01, 16, generator=generator).log_()
            elif kind == "dt_bias":
                parameter.normal_(0.0, 1.0, generator=generator)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
                if architecture in HYBRIDS and "linear_attn" not in name:
                    parameter.sub_(1.0)  # stored as the distance from 1
                if layer in ("q_norm", "k_norm") and std is None:
                    parameter.mul_(_SHARPNESS)
            else:
                parameter.normal_(0.0, std or stds.get(layer, _OTHER_STD), generator=generator)
    return model.eval().requires_grad_(False)


def widen_choices(model: Any) -> None:
    """Make the lengths of the head's rows as different as a long-tailed distribution has them: a
    logit is rounded by a part of its size, and here the largest is far from the next."""
    generator = torch.Generator().manual_seed(0)
    head = model.lm_head.weight
    head.mul_(torch.empty(len(head), 1).log_normal_(-3.5, 1.5, generator=generator))


def stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a tiny model of Qwen in transformers' layout of all experts in one tensor."""
    others = {name: each for name, each in tensors.items() if ".experts." not in name}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{path}.{n}.{part}_proj.weight"] for n in range(8)])
            for part in ("gate", "up", "down")
        )
        others[f"{path}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        others[f"{path}.down_proj"] = down
    return others


def random_ids(seed: int, length: int, vocab: int = VOCAB) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (length,), generator=generator).tolist()


def need_devices(device: str, count: int) -> None:
    """Skip a test of so many ranks where they would not have a device each; a CPU has room for
    all."""
    platform = platforms.resolve(device)
    if not platform.is_the_host and platform.device_count() < count:
        pytest.skip(f"{count} ranks need a device each: here {platform.device_count()} are visible")


def copied_inputs(patch: pytest.MonkeyPatch, *, shared: bool = False) -> None:
    """In engines made from here on, inputs of steps are copied to the device, as to one that has
    memory of its own; ``shared``: they are written where the device reads them, as on a CPU."""
    patch.setattr(parts, "StepBuffers", functools.partial(parts.StepBuffers, shared=shared))


def make_llm(model: TinyModel | Path, device: str, **options: Any) -> LLM:
    """An engine that computes in float32, small enough to be made often."""
    path = model.path if isinstance(model, TinyModel) else model
    defaults: dict[str, Any] = {
        "device": device,
        "dtype": "float32",
        "max_num_seqs": 8,
        "num_blocks": 129,
        "block_size": 16,
        "graph_mode": "none",
        "skip_tokenizer_init": not (path / "tokenizer.json").exists(),
    }
    return LLM(str(path), **{**defaults, **options})


def take_time(llm: Any, seconds: float = 0.02) -> None:
    """Make each step of an engine that is asked by others last so long: what they do in the midst
    of an answer comes in its midst, however late the machine lets them."""
    step = llm.engine.step

    def later() -> Any:
        time.sleep(seconds)
        return step()

    llm.engine.step = later


def greedy(max_tokens: int = 16, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """Of the first completion of each request."""
    return [list(each.outputs[0].token_ids) for each in outputs]


def generate(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[int]]:
    """Complete prompts; afterwards nothing may be left of them in the engine."""
    outputs = token_ids(llm.generate(prompts, params, use_tqdm=False))
    assert_idle(llm)
    return outputs


def assert_idle(llm: LLM) -> None:
    """No request is left, and no cache block belongs to anyone."""
    stats = llm.stats()
    assert stats.num_requests == 0
    assert stats.scheduler.num_running == 0
    assert stats.scheduler.num_waiting == 0
    assert stats.scheduler.num_blocks_used == 0
    assert not llm.engine.has_work


def calls_of_a_step(llm: LLM, params: Sequence[SamplingParams]) -> int:
    """Calls of torch in a decode step of one request for each of ``params``. Each is a launch on an
    accelerator."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    engine = llm.engine
    for number, each in enumerate(params):
        engine.add(f"{number}", random_ids(number, 8), each)
    for _ in range(6):
        engine.step()
    with Count() as count:
        engine.step()
    engine.abort([f"{number}" for number in range(len(params))])
    while engine.has_work:
        engine.step()
    return count.number


def python_calls_of_a_step(
    llm: LLM, requests: int, tokens: int, before: int, steps: int, within: str = "", **options: Any
) -> float:
    """Calls of Python functions in a step, on average over ``steps``, behind ``before`` others, in
    which ``requests`` requests for so many ``tokens`` decode, with these parameters; of functions
    in files that have ``within`` in their paths."""
    engine = llm.engine
    params = greedy(tokens, **{"ignore_eos": True, "detokenize": False, **options})
    for number in range(requests):
        engine.add(f"{number}", random_ids(number, 20), params)
    for _ in range(before):
        engine.step()
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and within in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        for _ in range(steps):
            engine.step()
    finally:
        sys.setprofile(None)
    engine.abort([f"{number}" for number in range(requests)])
    return calls / steps


@contextlib.contextmanager
def rewritten_logits(llm: LLM, rewrite: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within the ``with`` block draws are from what ``rewrite`` makes of a request's id and its
    logits, [V] float32 on the CPU."""
    runner: Any = llm.engine.runner
    sampler = runner.sampler

    class Rewriting:
        def __call__(self, logits: Tensor, step: Any, *rest: Any) -> Any:
            sampling = [row for row, yes in zip(step.rows, step.samples, strict=True) if yes]
            rows = [
                rewrite(sampler.rows.admitted[number].request_id, row)
                for row, number in zip(logits.float().cpu(), sampling, strict=True)
            ]
            return sampler(torch.stack(rows).to(logits.device), step, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(sampler, name)

    runner.sampler = Rewriting()
    try:
        yield
    finally:
        runner.sampler = sampler


@contextlib.contextmanager
def recorded_logits(llm: LLM) -> Iterator[Mapping[str, list[Tensor]]]:
    """The logits [V] of every draw within the ``with`` block, by request id."""
    seen = dict[str, list[Tensor]]()

    def record(request: str, row: Tensor) -> Tensor:
        seen.setdefault(request, []).append(row.clone())
        return row

    with rewritten_logits(llm, record):
        yield seen


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e-46, 1e300,
    math.nan, math.inf, "", "a", "\udcff", b"a", [], [None], [1], [-1], ["a"], [["a"]], [1.5],
    (), ("a", 1), {}, {1: 1}, {1: None}, {None: 1}, {"a": "b"}, set(), {3}, range(3), object(),
    np.nan, np.float32(0.3), np.int8(-1), np.bool_(True), np.array([]), np.array([[1]]),
    np.array(["a"]), np.array(3), np.array([1, 2]), torch.tensor(1), torch.tensor([1.0]), int,
    RequestOutputKind.DELTA, complex(1), memoryview(b"ab"), slice(1),
]  # fmt: skip
"""What nobody should hand in as an option: of every type, at every edge."""

TEXT_VOCAB = 340
CORPUS = [
    "Once upon a time there was a small cat. The cat had a red hat and a blue ball.",
    "12 + 34 = 46 and 50 - 8 = 42; x == y != z",
    "Grüße aus Köln, señor! Ça va? naïve façade",
    "漢字とかな、한국어, русский текст, ελληνικά",
    "👍🏽 👩‍👩‍👧 🎉🎉🎉 🇩🇪 ✅",
] * 4  # fmt: skip


def install_package(package: Path, site: Path) -> None:
    """Put a package of ours into ``site`` as pip would, its entry points too; needs no network."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    information = site / f"{module}-{project['version']}.dist-info"
    information.mkdir()
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(header)
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (information / "entry_points.txt").write_text("\n".join(lines))
    (site / module).symlink_to(package / module, target_is_directory=True)


def byte_level_tokenizer() -> Any:
    """Byte-level BPE over :data:`CORPUS`: any text goes in, and characters are cut anywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCAB,
        special_tokens=["<eos>", "<user>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        chat_template=(
            "{% for message in messages %}<user>{{ message.role }}: {{ message.content }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        ),
    )


def text_model(tiny: TinyModels, architecture: str = "llama", **fields: Any) -> TinyModel:
    """A checkpoint with a tokenizer; its random text has all kinds of characters."""
    model = tiny(architecture, vocab_size=TEXT_VOCAB, **fields)
    if not (model.path / "tokenizer.json").exists():
        byte_level_tokenizer().save_pretrained(model.path)
    return model

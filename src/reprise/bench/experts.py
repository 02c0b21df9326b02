"""How many experts a step reads: counted, since it follows from what the model computes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reprise.bench.drive import check_served
from reprise.engine import Engine
from reprise.layers import CausalLM, ScoredMLP, SparseMLP
from reprise.ops import Op
from reprise.ops.registry import intercept
from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape

STEPS = 4
"""Decode steps that are looked at."""
_ids = itertools.count()


def count_experts_hit(engine: Engine, prompts: Sequence[list[int]]) -> float | None:
    """Mean over layers and a few decode steps of all prompts: to how many experts some row is sent.

    The steps are computed once more, eagerly, and their calls of ``route`` looked at.

    Returns:
        None if the model has no experts, or if several ranks compute it: they compute steps
        together, and such a step is none.
    """
    if not engine.runner.model.routed or engine.config.tensor_parallel_size > 1:
        return None
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    names = [f"experts-{next(_ids)}" for _ in prompts]
    groups = [engine.add(name, prompt, params) for name, prompt in zip(names, prompts, strict=True)]
    hits: list[int] = []
    shape = StepShape.decode(len(prompts), 1 + engine.config.num_drafts)
    for _ in range(STEPS):
        engine.step()
        # Then the step that was submitted last decodes all of them.
        while any(len(each.output().outputs[0].token_ids) < 2 for each in groups):
            engine.step()
            check_served(groups)
        hits += _hits_of(engine, shape)
    engine.abort(names)
    while engine.has_work:
        engine.step()
    return statistics.mean(hits)


def expected_hits(experts: int, top: int, rows: int) -> float:
    """Experts that so many rows need, if each takes any ``top`` as likely as any others."""
    return float(experts * (1 - (1 - top / experts) ** rows))


def uniform_hits(model: CausalLM, rows: int) -> float | None:
    """How many it would be if each row was sent to any experts, all equally likely."""
    for each in model.modules():
        if isinstance(each, SparseMLP | ScoredMLP):
            return expected_hits(each.routing.experts, each.routing.top, rows)
    return None


def _hits_of(engine: Engine, shape: StepShape) -> list[int]:
    found: list[torch.Tensor] = []

    def note(
        op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = function(*args, **kwargs)
        if op.name == "route":
            found.append(op.named(args, kwargs)["ids"].clone())
        return result

    runner = engine.runner
    with runner.ops.computing(), intercept(note):
        runner.forward_pass.forward(shape)
    return [len(each[each >= 0].unique()) for each in found]

"""A model's ops against their references, layer by layer, on steps that are like real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from reprise.doctor.conformance.operations import TOLERANCE
from reprise.doctor.graphs.places import Places, layer_number
from reprise.loading import open_checkpoint
from reprise.ops import Op, OpTable
from reprise.ops.registry import all_ops, intercept
from reprise.runner import ModelRunner
from reprise.runner.model_choices import choose_model_len
from reprise.shape import StepShape

CONTEXT = 48
"""Tokens of a step's longest request."""
Progress = Callable[[str, int, int], None]


@dataclass
class CallReport:
    """One call of an op within a step."""

    step: str
    op: str
    index: int
    """Calls of the same op that came before it in the step."""
    module: str
    layer: int | None
    implementation: str
    difference: float = 0.0
    """The largest distance from the reference on the same inputs, relative to the largest magnitude
    of what the reference writes or returns; infinite where one is not finite and the other is."""
    allowed: float = 0.0
    drift: float = 0.0
    """The same of a pass in which every op is its reference: what has gathered until here."""

    @property
    def wrong(self) -> bool:
        return not self.difference <= self.allowed

    def __str__(self) -> str:
        where = self.module or "outside of the layers"
        return (
            f"{self.step}: {self.op} #{self.index} ({self.implementation}) in {where} differs from "
            f"the reference by {self.difference:.2g}, allowed are {self.allowed:.2g}"
        )


@dataclass
class ModelReport:
    """What comparing a model with its references has shown."""

    facts: dict[str, Any]
    calls: list[CallReport] = field(default_factory=list)
    agreeing: int = 0
    """Rows whose most likely token is the same in both passes."""
    rows: int = 0

    @property
    def wrong(self) -> list[CallReport]:
        return [each for each in self.calls if each.wrong]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **self.facts,
            "conforms": not self.wrong,
            "agreeing_rows": self.agreeing,
            "rows": self.rows,
            "calls": [{**asdict(each), "wrong": each.wrong} for each in self.calls],
        }


def small_engine(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LLM`` for :func:`compare_with_references`: small caches, since each call that
    writes into one is given a copy of it.

    Args:
        options: As the user gave them, the model among them.

    Raises:
        ModelError: The model's config cannot be read.
    """
    checkpoint = open_checkpoint(
        options["model"],
        revision=options.get("revision"),
        overrides=options.get("hf_overrides"),
        config_only=True,
    )
    return {
        "graph_mode": "none",
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_blocks": 65,
        "max_model_len": min(128, choose_model_len(None, checkpoint.config)),
        **options,
    }


def compare_with_references(
    runner: ModelRunner,
    facts: dict[str, Any],
    progress: Progress = lambda what, done, total: None,
) -> ModelReport:
    """Run steps through the model; each op call is computed by its reference, too.

    The two get the same inputs, so a difference is that call's own. A second pass with references
    alone shows what has gathered up to each call, and whether the most likely tokens agree.

    Args:
        runner: Has no requests and gets none afterwards: its inputs and caches are overwritten.
        facts: Go into the report as they are.
        progress: Told of every pass.
    """
    report = ModelReport(facts)
    most = runner.config.max_num_seqs
    tokens = min(24, runner.max_tokens)
    steps = [StepShape.decode(min(4, most)), StepShape.mixed(tokens, min(3, most, tokens))]
    references = OpTable(runner.platform, dict.fromkeys(all_ops(), "reference"))
    for done, shape in enumerate(steps):
        progress(str(shape), done, len(steps))
        _Comparison(runner, report, shape).run(references)
    return report


class _Comparison:
    """One step, twice."""

    def __init__(self, runner: ModelRunner, report: ModelReport, shape: StepShape) -> None:
        self.runner, self.report, self.shape = runner, report, shape
        self.probe = runner.forward_pass.probe(shape, min(CONTEXT, runner.max_model_len))
        self.counts: Counter[str] = Counter()
        self.calls: list[CallReport] = []
        self.written: list[dict[str, Tensor]] = []
        """What each call has written, of the pass with the implementations in use."""
        self.drifts: Iterator[tuple[CallReport, dict[str, Tensor]]] = iter(())

    def run(self, references: OpTable) -> None:
        runner = self.runner
        with torch.inference_mode():
            with runner.ops.activate():
                self.probe.fill()
                self.places = Places(runner.model, self._forward)
                self.probe.fill()
                with intercept(self._compare):
                    tokens = self._forward().argmax(dim=-1)
            with references.activate():
                self.probe.fill()
                self.drifts = zip(self.calls, self.written, strict=True)
                with intercept(self._measure_drift):
                    expected = self._forward().argmax(dim=-1)
        self.report.calls += self.calls
        self.report.agreeing += int((tokens == expected).sum())
        self.report.rows += len(tokens)

    def _forward(self) -> Tensor:
        """Logits of every row, [T, V]."""
        result = self.runner.forward_pass.forward(self.shape)
        return result if self.shape.phase == "decode" else self.runner.model.logits(result)

    def _compare(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reference = op.implementations["reference"]
        used = self.runner.ops.implementation_of(op, args, kwargs)
        index = self.counts[op.name]
        self.counts[op.name] += 1
        module = self.places.module(f"{op.name} #{index}")
        call = CallReport(str(self.shape), op.name, index, module, layer_number(module), used.name)
        named = op.named(args, kwargs)
        before = {name: each.clone() for name, each in op.written(named).items()}
        result = function(*args, **kwargs)
        got = _written(op, named, result)
        if used is not reference:
            expected = _written(op, before, reference.function(**{**named, **before}))
            call.difference = max(map(_distance, expected.values(), got.values()), default=0.0)
            dtypes = [each.dtype for each in expected.values() if each.is_floating_point()]
            call.allowed = max((TOLERANCE.get(each, 0.0) for each in dtypes), default=0.0)
        self.calls.append(call)
        self.written.append({k: v.clone() for k, v in got.items() if k not in op.state})
        return result

    def _measure_drift(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = function(*args, **kwargs)
        call, other = next(self.drifts)
        named = op.named(args, kwargs)
        here = _written(op, named, result)
        call.drift = max((_distance(here[name], each) for name, each in other.items()), default=0.0)
        return result


def _written(op: Op, named: Mapping[str, Any], result: Any) -> dict[str, Tensor]:
    found = op.written(named)
    if isinstance(result, Tensor):
        found["result"] = result
    return found


def _distance(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest magnitude; of whole numbers 0 or infinite."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else torch.inf
    wide, other = expected.double(), got.double()
    odd = ~(wide.isfinite() & other.isfinite())
    if bool(odd.any()) and not torch.equal(wide[odd].nan_to_num(), other[odd].nan_to_num()):
        return torch.inf
    wide, other = wide.masked_fill(odd, 0), other.masked_fill(odd, 0)
    scale = max(float(wide.abs().max()), torch.finfo(expected.dtype).tiny) if wide.numel() else 1.0
    return float((wide - other).abs().max()) / scale if wide.numel() else 0.0

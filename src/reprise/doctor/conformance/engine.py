"""The demo model: every executor gives the tokens of eager execution, every fault is caught."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from reprise.doctor.conformance.contract import Broken, Kit, Skipped, add, need
from reprise.graphs import Buckets, GraphPlan, GraphRunner, VerifyMode
from reprise.graphs.padding import compute_padding
from reprise.graphs.plan import Executor
from reprise.graphs.uses import uses_of
from reprise.loading import checkpoint
from reprise.ops import Op
from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape
from reprise.testing.faults import FAULTS
from reprise.testing.faults.base import Fault

if TYPE_CHECKING:
    from reprise.llm import LLM

STARTUP = VerifyMode()
VERIFY_SECONDS = 120.0
"""A device that is slow is not wrong: it has the time that all probes take."""
BUCKETS = Buckets(decode=(2, 4), mixed=(8, 32))
PROMPTS = [[5, 17, 3], list(range(20, 61)), [9], [7, 7, 100, 200, 300, 400, 500]]
TOKENS = 12
LEAST_ACCEPTED = 0.9
"""Of what a model drafts for itself. Rounding may decide between two tokens as good as equal."""
EXECUTORS: tuple[Executor, ...] = ("full", "breakable", "compiled")


def tokens(llm: LLM) -> list[list[int]]:
    """What a model answers, through whatever graphs its runner has."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": each} for each in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


@contextlib.contextmanager
def graphs_of(
    kit: Kit, llm: LLM, executor: Executor, buckets: Buckets, verify: VerifyMode = STARTUP
) -> Iterator[GraphRunner]:
    """A model with freshly captured graphs; afterwards it has none again."""
    kit.need_graphs()
    runner = llm.engine.runner
    made = GraphRunner(
        runner.forward_pass,
        kit.platform,
        GraphPlan(executor, executor),
        buckets,
        runner.config.max_num_seqs,
        verify=verify,
        query_lens=(1 + runner.num_drafts,),
    )
    made.prover.least_seconds, made.useless.enabled = VERIFY_SECONDS, False
    eager = runner.graphs
    for each in made.plan.downgrades:
        if each.wanted == executor:
            raise Skipped(f"{each.phase}: {each.reason}")
    runner.graphs = made
    try:
        made.captures.capture_all()
        runner.buffers.forget()
        yield made
    finally:
        runner.graphs = eager
        made.captures.discard()
        runner.buffers.forget()


def executor_is_exact(kit: Kit, executor: Executor) -> str:
    """Generate greedily with the executor on both phases; compare tokens with eager's."""
    expected = tokens(kit.llm)
    with graphs_of(kit, kit.llm, executor, BUCKETS) as graphs:
        for info in graphs.report().graphs:
            need(info.quarantined is None, f"{info.name}: {info.quarantined}")
            need(info.verified, f"{info.name} was captured and not verified")
        got = tokens(kit.llm)
        replays = graphs.report().replays
    for row, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        need(mine == theirs, f"request {row}: tokens {mine} and not {theirs}")
    need(replays > 0, "no step was replayed")
    return f"{len(got)} requests, {replays} replays"


def probes_reach_the_device(kit: Kit) -> str:
    """Start with as many tokens a step as servers have, and see whether every input changes."""
    kit.need_graphs()
    options = {"graph_mode": "full", "graph_buckets": "decode=4;mixed=32"}
    llm = kit.model("", {**options, "max_num_batched_tokens": 8192})
    report = llm.graph_report()
    need(report.graphs, "nothing was captured")
    blind = ", ".join(report.blind_inputs)
    need(not blind, f"what probes write does not arrive, so that graphs prove nothing: {blind}")
    return f"{len(report.graphs)} graphs, every input changes"


def drafts_change_nothing(kit: Kit, executor: Executor) -> str:
    """The demo model as its own draft: compare tokens with those of no drafts, and count drafts."""
    kit.need_graphs()
    expected = tokens(kit.model("", {"dtype": "float32"}))
    draft = {
        "method": "draft_model",
        "model": str(checkpoint.DEMO_MODEL),
        "num_speculative_tokens": 3,
    }
    llm = kit.model(
        "",
        {
            "dtype": "float32", "speculative_config": draft, "graph_mode": executor,
            "graph_buckets": "decode=4;mixed=32",
        },
    )  # fmt: skip
    report = llm.graph_report()
    for each in report.downgrades:
        if each["wanted"] == executor:
            raise Skipped(f"{each['phase']}: {each['reason']}")
    for info in report.graphs:
        need(info.quarantined is None, f"{info.name}: {info.quarantined}")
    got = tokens(llm)
    for row, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        need(mine == theirs, f"request {row}: tokens {mine} and not {theirs}")
    stats = llm.stats().drafts
    need(
        stats.acceptance_rate >= LEAST_ACCEPTED,
        f"the model drafts for itself, and no more than this counts: {stats}",
    )
    return str(stats)


def _places(llm: LLM, kind: type[Fault]) -> list[Op]:
    """The model's ops in which such a fault is to be planted: if it says nothing else, those that
    know how far requests reach."""
    computation, shape = llm.engine.runner.forward_pass, StepShape.decode(1)
    step = functools.partial(compute_padding, computation, shape)
    ops = [each for each, _ in uses_of(computation.ops, step)]
    return ops if kind.needs else [each for each in ops if each.extent is not None]


def fault_is_caught(kit: Kit, fault: str) -> str:
    """Put the fault into an op; verification must refuse the graph and name the op."""
    kind, caught, reasons = FAULTS[fault], [], []
    if "kv_cache_dtype" in kind.engine_options and kit.platform.fp8_dtype is None:
        raise Skipped("cannot exist here: the platform has no eight-bit floating-point numbers")
    llm = kit.model(kind.needs, kind.engine_options)
    for executor in ("full", "breakable"):
        for op in _places(llm, kind):
            reason = kind.inexpressible(op, executor, kit.platform)
            if reason is not None:
                reasons.append(reason)
                continue
            _inject(kit, llm, fault, op.name, executor)
            caught.append(f"{op.name} in {executor}")
            break
    if not caught:
        raise Skipped(f"cannot exist here: {reasons[0]}")
    return ", ".join(caught)


def _inject(kit: Kit, llm: LLM, fault: str, op: str, executor: Any) -> None:
    from reprise.testing import faults

    kind = FAULTS[fault]
    runner = llm.engine.runner
    kit.need_graphs()
    every_replay = kind.caught == "canary:1"
    expected = tokens(llm) if every_replay else []
    decode = kind.shows_in == "decode"
    buckets = Buckets(decode=(4,) if decode else (), mixed=() if decode else (32,))
    verify = VerifyMode(canary=int(every_replay))
    with (
        _quiet(),
        faults.inject(fault, runner.ops, op, runner.forward_pass),
        graphs_of(kit, llm, executor, buckets, verify) as graphs,
    ):
        if every_replay:
            need(tokens(llm) == expected, f"{fault} in {op} gave wrong tokens under canary:1")
        (info,) = graphs.report().graphs
    if info.quarantined is None:
        raise Broken(f"{fault} in {op} went unseen by the {executor} executor")
    if kind.traced:
        need(f"{op} #" in info.quarantined, f"{op} is not named: {info.quarantined}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about graphs that are meant to be bad."""
    logger = logging.getLogger("reprise.graphs")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


for _executor in EXECUTORS:
    add(
        f"executor_is_exact:{_executor}",
        "executors",
        f"The {_executor} executor gives the tokens that eager execution gives.\n\n"
        "The demo model, greedily, on both phases; every graph passes verification.",
        functools.partial(executor_is_exact, executor=_executor),
    )
add(
    "probes_reach_the_device",
    "executors",
    "What the probes of start-up write arrives on the device.\n\n"
    "The demo model with 8,192 tokens a step, whose inputs are too large to be sent in one copy:\n"
    "each of them has other values in some probe.",
    probes_reach_the_device,
)
add(
    "drafts_change_nothing:full",
    "executors",
    "With drafts by a model, and the full executor, no token is another one.\n\n"
    "The demo model as its own draft, in float32: no graph of target or draft is refused, the\n"
    "tokens are those without drafts, and nearly all drafts count.",
    functools.partial(drafts_change_nothing, executor="full"),
)
for _fault, _kind in FAULTS.items():
    add(
        f"fault_is_caught:{_fault}",
        "faults",
        f"Verification catches it when {_kind.summary}.\n\n"
        "In the full and in the breakable executor, wherever the fault can exist there: by the\n"
        "probes of start-up, or, if values alone decide, by canary:1.",
        functools.partial(fault_is_caught, fault=_fault),
    )

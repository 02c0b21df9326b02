from __future__ import annotations

import pytest

from reprise import ops
from reprise.errors import ConfigError
from reprise.graphs import (
    Buckets,
    GraphPlan,
    default_buckets,
    parse_buckets,
    parse_plan,
    parse_verify,
    resolve,
)
from reprise.graphs.plan import outside_of_graphs
from reprise.platforms import load
from reprise.shape import StepShape


@pytest.mark.parametrize(
    ("text", "decode", "mixed"),
    [
        ("auto", "auto", "auto"),
        ("none", "none", "none"),
        ("full", "full", "full"),
        ("breakable", "breakable", "breakable"),
        ("compiled", "compiled", "compiled"),
        ("decode=full,mixed=breakable", "full", "breakable"),
        (" mixed = compiled , decode = none ", "none", "compiled"),
        ("decode=full", "full", "auto"),
        ("mixed=none", "auto", "none"),
        # vLLM's names
        ("NONE", "none", "none"),
        ("FULL", "full", "full"),
        ("PIECEWISE", "breakable", "breakable"),
        ("FULL_DECODE_ONLY", "full", "none"),
        ("FULL_AND_PIECEWISE", "full", "breakable"),
        ("full_and_piecewise", "full", "breakable"),
    ],
)
def test_plans_and_their_aliases(text, decode, mixed):
    assert parse_plan(text) == GraphPlan(decode, mixed)


@pytest.mark.parametrize(
    "text",
    [
        "", "fast", "decode", "decode=", "decode=fast", "prefill=full", "decode=full;mixed=none",
        "decode=full,decode=none",
    ],
)  # fmt: skip
def test_a_bad_plan_names_field_value_and_choices(text):
    with pytest.raises(ConfigError) as error:
        parse_plan(text)
    for part in ("graph_mode", repr(text), "breakable", "FULL_AND_PIECEWISE"):
        assert part in str(error.value)


class WithGraphs(load("cpu")):
    graphs_by_default = True


class WithoutGraphs(load("cpu")):
    has_graphs = False


ALWAYS = {"paged_attention (triton)": "always"}
UNIFORM = {"paged_attention (uniform)": "uniform_batch"}
SINGLE = {"paged_attention (single)": "single_token_decode"}
NEVER = {"paged_attention (reference)": "never"}


def both(support):
    return {"decode": support, "mixed": support}


@pytest.mark.parametrize(
    ("text", "support", "query_len", "decode", "mixed", "why"),
    [
        ("auto", ALWAYS, 1, "full", "breakable", []),
        ("auto", NEVER, 1, "breakable", "breakable", ["decode: full -> breakable"]),
        ("full", ALWAYS, 1, "full", "full", []),
        ("full", {**ALWAYS, **UNIFORM}, 1, "full", "breakable", ["uniform_batch"]),
        ("full", UNIFORM, 4, "full", "breakable", ["mixed: full -> breakable"]),
        ("full", SINGLE, 1, "full", "breakable", ["single_token_decode"]),
        ("decode=full,mixed=none", SINGLE, 2, "breakable", "none", ["one new token a request"]),
        ("full", NEVER, 1, "breakable", "breakable", ["decode", "mixed"]),
        ("full", {}, 1, "full", "full", []),
        ("breakable", NEVER, 1, "breakable", "breakable", []),
        ("compiled", NEVER, 1, "compiled", "compiled", []),
        ("none", ALWAYS, 1, "none", "none", []),
    ],
)
def test_resolving_against_graph_support(text, support, query_len, decode, mixed, why):
    resolved = resolve(parse_plan(text), WithGraphs(), both(support), query_len=query_len)
    assert (resolved.decode, resolved.mixed) == (decode, mixed)
    assert len(resolved.downgrades) == len(why)
    for downgrade, expected in zip(resolved.downgrades, why, strict=True):
        assert expected in str(downgrade)
        assert next(iter(support)).split()[0] in downgrade.reason


def test_auto_captures_nothing_where_graphs_are_off_by_default():
    resolved = resolve(parse_plan("auto"), load("cpu")(), both(ALWAYS))
    assert not resolved.captures
    assert resolved.downgrades == ()


def test_a_platform_without_graphs_runs_eagerly_and_says_so(caplog):
    resolved = resolve(parse_plan("decode=full,mixed=compiled"), WithoutGraphs(), both(ALWAYS))
    assert not resolved.captures
    assert [each.reason for each in resolved.downgrades] == [
        "platform cpu has no device graphs"
    ] * 2
    assert len(caplog.records) == 2


@pytest.mark.parametrize("text", ["full", "breakable", "compiled", "auto"])
def test_an_op_within_segments_that_no_graph_may_hold_excludes_all(text):
    """A break op stands between them; what counts rows on the host does not."""

    class Device(WithGraphs):
        is_the_host = False

    uses = [(op, op.implementations["all_to_all"]) for op in (ops.dispatch, ops.combine)]
    assert outside_of_graphs(uses, load("cpu")()) is None
    reason = outside_of_graphs(uses, Device())
    assert reason is not None
    resolved = resolve(parse_plan(text), Device(), both(ALWAYS), refused={"mixed": reason})
    assert resolved.mixed == "none"
    assert resolved.decode == ("full" if text == "auto" else text)
    assert [each.phase for each in resolved.downgrades] == ["mixed"]
    assert "dispatch (all_to_all) can never run inside a graph" in resolved.downgrades[0].reason


def test_without_a_compiler_pieces_are_not_compiled():
    resolved = resolve(
        parse_plan("compiled"), WithGraphs(), both(NEVER), compiler_reason="no compiler here"
    )
    assert (resolved.decode, resolved.mixed) == ("breakable", "breakable")
    assert resolved.downgrades[0].reason == "no compiler here"


# ---- buckets ---------------------------------------------------------------------------------


def test_default_buckets():
    buckets = default_buckets(max_requests=256, max_tokens=8192)
    assert buckets.decode == (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256)
    assert buckets.mixed == (32, 128, 256, 512, 1024, 2048, 4096)


@pytest.mark.parametrize(
    ("requests", "tokens", "decode", "mixed"),
    [
        (1, 4, (1,), (4,)),
        (3, 100, (1, 2, 3), (32, 100)),
        (20, 64, (1, 2, 4, 8, 16, 20), (32, 64)),
    ],
)
def test_default_buckets_end_at_the_largest_step(requests, tokens, decode, mixed):
    assert default_buckets(requests, tokens) == Buckets(decode, mixed)


def test_bucket_for_is_the_next_larger_size():
    buckets = Buckets((1, 2, 4), (16, 32))
    assert [buckets.bucket_for("decode", n) for n in range(1, 6)] == [1, 2, 4, 4, None]
    assert [buckets.bucket_for("mixed", n) for n in (1, 16, 17, 33)] == [16, 16, 32, None]


@pytest.mark.parametrize(
    ("text", "decode", "mixed"),
    [
        ("1,2,4,8", (1, 2, 4, 8), (1, 2, 4, 8)),
        ("8, 1, 8", (1, 8), (1, 8)),
        ("decode=1,2;mixed=64,128", (1, 2), (64, 128)),
        ("mixed=32", (1, 2, 4, 8, 16), (32,)),
        ("decode=4,4096;mixed=16,4096", (4,), (16,)),
        (None, (1, 2, 4, 8, 16), (32, 128)),
    ],
)
def test_parsing_buckets(text, decode, mixed):
    assert parse_buckets(text, max_requests=16, max_tokens=128) == Buckets(decode, mixed)


@pytest.mark.parametrize(
    "text", ["a", "1,-2", "0", "decode:1", "prefill=4", "decode=1;decode=2", "1.5"]
)
def test_bad_buckets(text):
    with pytest.raises(ConfigError, match="graph_buckets") as error:
        parse_buckets(text, 8, 64)
    assert repr(text) in str(error.value)


# ---- verify mode -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "startup", "canary"),
    [("off", False, 0), ("startup", True, 0), ("canary:1", True, 1), ("CANARY:100", True, 100)],
)
def test_verify_modes(text, startup, canary):
    mode = parse_verify(text)
    assert (mode.startup, mode.canary) == (startup, canary)
    assert str(mode) == text.lower()


@pytest.mark.parametrize("text", ["", "on", "canary", "canary:", "canary:0", "canary:x", "off:1"])
def test_bad_verify_modes(text):
    with pytest.raises(ConfigError, match="graph_verify") as error:
        parse_verify(text)
    assert repr(text) in str(error.value)


def test_shapes():
    assert StepShape.decode(3, 4) == StepShape("decode", 12, 3, 4)
    assert StepShape.decode(3, 4).size == 3
    assert StepShape.mixed(12, 3).size == 12
    assert str(StepShape.decode(8)) == "decode[8]"


@pytest.mark.parametrize(
    ("decode", "kept"),
    [
        ((), ()),
        ((5,), (5,)),
        ((1, 2, 4, 8), (1, 2, 4, 8)),
        ((1, 2, 3, 4, 5), (1, 2, 4, 5)),
        ((8, 16, 32, 64, 96, 128, 160, 200), (8, 16, 32, 64, 128, 200)),
    ],
)
def test_sparse_buckets_double_and_hold_the_largest_step(decode, kept):
    assert Buckets(decode, (64, 65)).sparse() == Buckets(kept, (64, 65))

"""The kinds matrix: what start-up proves of each graph, and what a graph changes beside results."""

from __future__ import annotations

import io
import json
import re
from contextlib import contextmanager

import pytest
from rich.console import Console

from reprise import LLM
from reprise.cli.doctor.kinds_table import kinds_tables
from reprise.doctor.graphs import measure
from reprise.doctor.graphs.page import render
from reprise.doctor.graphs.proof import met
from reprise.doctor.graphs.report import STATES
from reprise.graphs import Buckets, GraphPlan, GraphRunner
from reprise.ops import all_ops
from reprise.platforms.device_graph import capturing, host_code, launch
from reprise.runner.kinds import FACTS

BUCKETS = Buckets(decode=(1, 4), mixed=(16,))


@pytest.fixture(scope="module")
def runner(device, tiny):
    llm = LLM(
        str(tiny("qwen3").path),
        device=device,
        dtype="float32",
        graph_mode="none",
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        num_blocks=33,
    )
    return llm.engine.runner


@contextmanager
def broken(runner, op, spoil):
    """``spoil(arguments)`` follows the op, in graphs alone."""
    table = runner.ops
    original = table.functions[op]

    def run(*args, **kwargs):
        named = all_ops()[op].named(args, kwargs)
        with host_code():
            result = launch(original, **named)
            if capturing():
                spoil(named)
            return result

    table.functions[op] = run
    try:
        yield
    finally:
        table.functions[op] = original


def measured(runner, contexts=(64,), executors=("full",)):
    return measure(runner, {}, executors=executors, buckets=BUCKETS, contexts=list(contexts))


@pytest.fixture(scope="module")
def clean(runner):
    return measured(runner, executors=("full", "breakable"))


def test_every_graph_and_every_fact_has_its_state(clean):
    places = [(each.executor, each.phase, each.bucket) for each in clean.proofs]
    sizes = [("decode", 1), ("decode", 4), ("mixed", 16)]
    assert sorted(places) == sorted((e, *size) for e in ("full", "breakable") for size in sizes)
    for each in clean.proofs:
        assert list(each.facts) == FACTS.names
        assert set(each.facts.values()) <= set(STATES[:4])
        assert each.probes >= 1
        assert each.pairs >= sum(state != "not yet met" for state in each.facts.values())
    by_place = dict(zip(places, clean.proofs, strict=True))
    # One request without padding is all that a bucket of one can have.
    one = by_place["full", "decode", 1]
    assert one.state("padding: none") == one.state("requests: one") == "start"
    assert one.state("padding: some") == one.state("decodes: beside chunks") == "not yet met"
    assert by_place["full", "mixed", 16].state("decodes: alone") == "not yet met"


def test_the_states_are_those_of_start_up(clean, runner):
    graphs = GraphRunner(
        runner.forward_pass, runner.platform, GraphPlan("full", "full"), BUCKETS, 4
    )
    graphs.captures.capture_all()
    for each in graphs.report().graphs:
        (proof,) = (
            e
            for e in clean.proofs
            if (e.executor, e.phase, e.bucket) == ("full", each.phase, each.bucket)
        )
        if each.verified and proof.verdict == "verified":  # time sufficed in both runs
            assert proof.facts == each.facts
            assert (proof.probes, proof.pairs) == (each.probes, each.pairs)
    graphs.captures.discard()


def test_page_table_and_json_show_them(clean):
    known, unknown = met([each for each in clean.proofs if each.phase == "decode"])
    assert set(known) | set(unknown) == set(FACTS.names)
    page = render(clean)
    assert "Kinds of steps that start-up proves" in page
    assert "full decode[4], " in page
    assert "padding: some: proven at start on this graph" in page
    console = Console(width=180, record=True, file=io.StringIO())
    for each in kinds_tables(clean):
        console.print(each)
    text = console.export_text()
    line = next(each for each in text.splitlines() if "decodes: alone" in each)
    assert line.split()[-4:] == ["●"] * 4
    assert "not yet met by any of these graphs: " in text
    data = json.loads(json.dumps(clean.to_dict()))
    assert data["ok"]
    assert data["proofs"][0]["facts"]["padding: none"] in STATES


def next_block(named):
    """A write into the block behind the first one that the step writes."""
    cache = named["key_cache"]
    block = (named["slot_mapping"][:1] // cache.shape[1] + 1) % len(cache)
    cache.index_add_(0, block, cache.new_ones(1, *cache.shape[1:]))


def test_a_changed_block_is_named_without_an_op(runner):
    with broken(runner, "rotary_cache", next_block):
        matrix = measured(runner)
    assert len(matrix.bad) == 3
    for each in matrix.bad:
        assert each.captured
        if each.largest_difference is None:
            assert each.where is None
            assert re.fullmatch(r"layer \d key, block \d+", each.tensor)
            assert each.tensor in each.reason
    assert any(each.largest_difference is None for each in matrix.bad)
    assert all(each.refused for each in matrix.proofs)
    page = render(matrix)
    for each in matrix.failures:
        assert f"<code>{each.tensor}</code>" in page
    assert "graph refused" in page


def test_a_changed_weight_is_named_and_made_good(runner):
    weight = runner.model.model.layers[0].self_attn.o_proj.weight
    before = weight.clone()

    def spoil(named):
        if named["weight"].data_ptr() == weight.data_ptr():
            named["weight"].mul_(1.5)

    with broken(runner, "linear_add", spoil):
        matrix = measured(runner)
    assert len(matrix.bad) == 3
    for each in matrix.failures:
        assert "layers.0.self_attn.o_proj.weight" in each.tensor
        assert "layers.0.self_attn.o_proj.weight" in each.reason
    assert (weight == before).all()


def test_what_start_up_alone_refuses_is_wrong_too(runner):
    """Short prompts with padding are no cell of the heat map."""

    def spoil(named):
        padded = (named["slot_mapping"] < named["key_cache"].shape[1]).any()
        named["key_cache"].mul_(1 + padded)

    with broken(runner, "rotary_cache", spoil):
        matrix = measured(runner)
    decode = [each for each in matrix.cells if (each.phase, each.bucket) == ("decode", 4)]
    assert not any(each.bad for each in decode)
    (refused,) = (e for e in matrix.refused if (e.phase, e.bucket) == ("decode", 4))
    assert "probe 'padded'" in refused.reason
    assert not matrix.ok
    assert not matrix.to_dict()["ok"]
    page = render(matrix)
    assert "full decode[4] at start-up" in page
    assert "Start-up refuses" in page

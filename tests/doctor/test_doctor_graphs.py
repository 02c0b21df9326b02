"""The graph matrix: clean where graphs are right, and exact about where they are not."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from reprise import LLM
from reprise.doctor.graphs import default_buckets, default_contexts, measure
from reprise.doctor.graphs.page import render
from reprise.doctor.graphs.report import Absent, GraphMatrix, MatrixCell
from reprise.graphs import Buckets

BUCKETS = Buckets(decode=(1, 4), mixed=(16,))
CONTEXTS = [1, 64, 200]


class Page(HTMLParser):
    """What matters of a page: cells, failures, links to anything outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.classes: list[str] = []
        self.tips: list[str] = []
        self.loads: list[str] = []
        self.failures: list[dict[str, str]] = []
        self._column: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.classes.append(given.get("class") or "")
        if "data-tip" in given:
            self.tips.append(given["data-tip"])
        if tag in ("link", "img", "iframe", "object", "embed", "source"):
            self.loads.append(tag)
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "xlink:href", "action")
            and value
            and not value.startswith("#")
        ]
        if given.get("class") == "failure":
            self.failures.append({})
        if tag == "td" and self.failures and given.get("class") in ("layer", "op", "name"):
            self._column = given["class"]

    def handle_endtag(self, tag):
        if tag == "td":
            self._column = None

    def handle_data(self, data):
        if self._column is not None and self.failures:
            self.failures[-1][self._column] = self.failures[-1].get(self._column, "") + data


@pytest.fixture(scope="module")
def runner(device, tiny):
    model = tiny("qwen3", num_hidden_layers=3)
    llm = LLM(
        str(model.path),
        device=device,
        dtype="float32",
        graph_mode="none",
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        num_blocks=33,
    )
    return llm.engine.runner


@pytest.fixture(scope="module")
def clean(runner):
    executors = ["none", "full", "breakable"]
    facts = {"model": "tiny <model>", "dtype": "float32"}
    return measure(runner, facts, executors=executors, buckets=BUCKETS, contexts=CONTEXTS)


@pytest.fixture(scope="module")
def broken(runner):
    return measure(
        runner,
        {"model": "tiny"},
        executors=["full", "breakable"],
        buckets=BUCKETS,
        contexts=CONTEXTS,
        fault=("wrong_extent", "paged_attention"),
    )


def test_a_clean_matrix_is_verified_everywhere(clean):
    assert len(clean.cells) == 3 * 3 * 3
    assert len(clean.graphs) == 2 * 3 * 3
    assert not clean.bad
    assert not clean.absent
    for each in clean.graphs:
        assert each.captured
        assert each.verified
        assert each.largest_difference == 0
        assert each.speedup == each.eager_ms / each.replay_ms > 0
    places = {(each.executor, each.phase, each.bucket, each.context) for each in clean.cells}
    assert len(places) == len(clean.cells)


def test_the_timeline_of_a_step_names_its_breaks(clean):
    by_executor = {each.executor: each for each in clean.timelines if each.phase == "decode"}
    full, breakable, eager = (by_executor[e] for e in ("full", "breakable", "none"))
    assert [each.kind for each in full.bars] == ["graph"]
    breaks = [each for each in breakable.bars if each.kind == "break"]
    assert [each.label for each in breaks] == [f"paged_attention #{n}" for n in range(3)]
    assert [each.module for each in breaks] == [f"model.layers.{n}.self_attn" for n in range(3)]
    assert sum(each.kind == "graph" for each in breakable.bars) == 4
    names = {each.label: each.module for each in eager.bars if each.kind == "op"}
    assert names["norm_gated_linear #1"] == "model.layers.1"
    assert names["rotary_cache #2"] == "model.layers.2.self_attn"
    assert names["linear_add #0"] == "model.layers.0.self_attn.o_proj"
    for each in clean.timelines:
        assert each.total_ms > 0
        assert all(bar.ms >= 0 for bar in each.bars)


def test_memory_is_told_for_each_bucket(clean):
    found = {(each.executor, each.phase, each.bucket) for each in clean.memory}
    sizes = [("decode", 1), ("decode", 4), ("mixed", 16)]
    assert found == {(each, *size) for each in ("full", "breakable") for size in sizes}
    assert any(each.actual > 0 for each in clean.memory)


def test_a_fault_is_located(broken):
    assert {each.executor for each in broken.bad} == {"full"}
    assert {each.context for each in broken.bad} == {200}
    assert all(each.verified for each in broken.graphs if not each.bad)
    for each in broken.bad:
        assert each.captured
        assert not each.verified
        assert each.replay_ms is None
        assert each.largest_difference > 0
        where = each.where
        assert (where.op, where.call, where.layer) == ("paged_attention", 0, 0)
        assert (where.tensor, where.module) == ("out", "model.layers.0.self_attn")
    assert "breakable: wrong_extent cannot exist in paged_attention here" in broken.notes[0]


def test_the_page_is_self_contained(clean, broken):
    for matrix in (clean, broken):
        page = Page(render(matrix))
        assert page.loads == []
        assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page.text)
        assert page.text.count("<svg") == page.text.count("</svg>") >= 3


def test_a_clean_page_has_no_broken_cell(clean):
    page = Page(render(clean))
    assert "broken" not in page.classes
    assert page.failures == []
    assert "tiny &lt;model&gt;" in page.text
    assert "All 18 cells" in page.text
    assert any("break op paged_attention #2" in each for each in page.tips)


def test_a_broken_page_names_layer_and_op(broken):
    page = Page(render(broken))
    assert page.classes.count("broken") == len(broken.bad) == len(page.failures)
    for failure, cell in zip(page.failures, broken.bad, strict=True):
        assert failure["name"] == cell.name
        assert failure["layer"] == "layer 0"
        assert failure["op"] == "paged_attention #0"
    wrong = [each for each in page.tips if "WRONG" in each]
    assert len(wrong) == len(broken.bad)
    assert all("paged_attention #0 in layer 0, tensor out" in each for each in wrong)
    assert "wrong_extent" in page.text


@pytest.mark.parametrize("fault", ["none", "host_sync:rotary_cache"])
def test_the_command(invoke, tiny, device, tmp_path, fault):
    model = tiny("qwen3", num_hidden_layers=3)
    page, given = tmp_path / "page.html", [] if fault == "none" else ["--fault", fault]
    arguments = (
        "doctor", "graphs", "--model", str(model.path), "--device", device, "--num-blocks", "33",
        "--executors", "full,breakable", "--contexts", "9,256", "--html", str(page),
        "--graph-buckets", "decode=2;mixed=8", "--dtype", "float32",
    )  # fmt: skip
    result = invoke(*arguments, "--json", *given)
    data = json.loads(result.stdout)
    assert data["ok"] == (fault == "none") == (result.exit_code == 0)
    assert data["buckets"] == {"decode": [2], "mixed": [8]}
    assert data["contexts"] == [9, 256]
    assert data["facts"]["versions"]["reprise"]
    assert len(data["cells"]) == 8
    assert Page(page.read_text()).classes.count("broken") == (0 if fault == "none" else 8)
    if fault != "none":
        for cell in data["cells"]:
            assert not cell["captured"]
            assert "rotary_cache #0" in cell["reason"]
            assert (cell["where"]["op"], cell["where"]["layer"]) == ("rotary_cache", 0)
        table = invoke(*arguments, *given).stdout
        assert "NO GRAPH" in table
        assert "rotary_cache #0" in table
        assert "8 of 8 cells are wrong" in table


def test_wrong_options_are_refused(invoke):
    for option, value, part in (
        ("--executors", "full,fast", "none,full,breakable,compiled"),
        ("--fault", "gremlins", "stale_scalar"),
        ("--fault", "stale_scalar:gremlin", "paged_attention"),
    ):
        result = invoke("doctor", "graphs", option, value)
        assert result.exit_code == 2
        assert part in result.stderr
    listed = invoke("doctor", "graphs", "--fault", "list")
    assert listed.exit_code == 0
    assert "wrong_extent" in listed.stdout


def test_defaults_reach_the_longest_context():
    assert default_contexts(2048) == [1, 64, 512, 2048]
    assert default_contexts(40960) == [1, 64, 512, 2048, 8192, 32768, 40960]
    assert default_contexts(16) == [1, 16]
    assert default_buckets(8, 100) == Buckets(decode=(1, 4), mixed=(16, 64))
    assert default_buckets(256, 8) == Buckets(decode=(1, 4, 16, 64), mixed=(8,))


def test_unwritten_values_survive_json():
    cell = MatrixCell("full", "decode", 1, 5, captured=True, largest_difference=math.nan)
    cell.reason = "logits differs"
    matrix = GraphMatrix({}, ["full"], {"decode": [1], "mixed": []}, [5], cells=[cell])
    matrix.absent.append(Absent("full", "mixed", "no reason"))
    data = json.loads(json.dumps(matrix.to_dict(), allow_nan=False))
    assert data["cells"][0]["largest_difference"] == "nan"
    assert data["ok"] is False
    assert "NaN (unwritten)" in render(matrix)

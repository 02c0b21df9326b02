"""``reprise doctor``: its facts are those of the platforms and of the op registry."""

from __future__ import annotations

import json

import pytest

import reprise
from reprise import ops, platforms
from reprise.doctor.facts import refusals
from reprise.errors import ConfigError


def one_json_line(result):
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def test_machine(invoke, device):
    report = one_json_line(invoke("doctor", "--device", device, "--json"))
    assert report["platforms"] == platforms.available()
    assert report["versions"]["reprise"] == reprise.__version__
    assert report["device"]["platform"] == device
    assert 0 < report["device"]["memory_free"] <= report["device"]["memory_total"]


def test_machine_as_tables(invoke):
    text = invoke("doctor").stdout
    for expected in ("Device", "Platforms", "Versions", "cpu", "torch"):
        assert expected in text


def test_ops_agree_with_the_registry(invoke, device, platform):
    report = one_json_line(invoke("doctor", "ops", "--device", device, "--json"))
    table = ops.OpTable(platform)
    assert set(report["ops"]) == set(ops.all_ops())
    for name, op in ops.all_ops().items():
        facts = report["ops"][name]
        assert facts["chosen"] == table.chosen[name].name
        assert facts["break_op"] == op.break_op
        assert set(facts["implementations"]) == set(op.implementations)
        for each in op.implementations.values():
            found = facts["implementations"][each.name]
            assert found == {
                "unusable": each.unusable(platform),
                "on_request": each.on_request,
                "refuses": refusals(op, each),
                "graph_support": each.graph_support_on(platform),
                "error": each.error,
                "batch_invariant": each.batch_invariant_on(platform),
            }


def test_ops_show_what_an_engine_of_the_same_bits_would_use(invoke):
    options = ("--device", "cpu", "--batch-invariant")
    report = one_json_line(invoke("doctor", "ops", *options, "--json"))["ops"]
    assert report["linear"]["chosen"] == "invariant"
    assert report["sparse_attention"]["chosen"] is None
    assert "invariant" in invoke("doctor", "ops", *options).stdout


def test_ops_say_what_an_implementation_refuses(invoke, device, monkeypatch):
    from reprise.ops.implementation import Implementation

    attention = ops.all_ops()["paged_attention"]
    narrow = Implementation(
        "paged_attention", "narrow", lambda *args: None,
        accepts=lambda query, **_: "heads are too wide" if query.shape[2] > 128 else None,
    )  # fmt: skip
    monkeypatch.setitem(attention.implementations, "narrow", narrow)
    report = one_json_line(invoke("doctor", "ops", "--device", device, "--json"))
    facts = report["ops"]["paged_attention"]["implementations"]
    assert facts["narrow"]["refuses"] == ["heads are too wide (heads of 256, decode 4 x 48)"]
    assert "heads are too wide" in " ".join(
        invoke("doctor", "ops", "--device", device).stdout.split()
    )


def test_ops_with_an_override(invoke, device):
    report = one_json_line(
        invoke("doctor", "ops", "--device", device, "--op", "rms_norm=reference", "--json")
    )
    assert report["ops"]["rms_norm"]["chosen"] == "reference"
    failed = invoke("doctor", "ops", "--device", device, "--op", "rms_norm=nothing")
    assert failed.exit_code == 2
    assert "has no implementation 'nothing'" in failed.stderr


@pytest.mark.parametrize(
    "option", [("--device", "nope"), ("--json",), ("--debug",), ("--log-level", "info")]
)
def test_options_before_a_subcommand_are_refused(invoke, option):
    result = invoke("doctor", *option, "ops", env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 2
    assert f"{option[0]} has no effect before a subcommand" in result.stderr
    assert result.stdout == ""


def test_the_graphs_are_shown_even_if_their_page_cannot_be_written(invoke, monkeypatch, tmp_path):
    from types import SimpleNamespace

    import reprise.doctor.graphs
    from reprise.cli.doctor import graphs

    def write_page(matrix, path):
        raise OSError(28, "No space left on device", str(path))

    matrix = SimpleNamespace(to_dict=lambda: {"cells": []}, ok=True)
    monkeypatch.setattr(graphs, "_measure", lambda *given: matrix)
    monkeypatch.setattr(reprise.doctor.graphs, "write_page", write_page)
    page = str(tmp_path / "page.html")
    result = invoke("doctor", "graphs", "--json", "--html", page)
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"cells": []}
    assert result.stderr == f"error: {page}: No space left on device\n"


@pytest.mark.parametrize("text", ["²", "0", "1,x", ""])
def test_contexts_that_are_no_lengths_are_refused(text):
    from reprise.cli.doctor.graphs import _contexts

    with pytest.raises(ConfigError, match="such as 1,512"):
        _contexts(text, 4096)


def test_ops_as_a_table(invoke):
    text = invoke("doctor", "ops", env={"COLUMNS": "160"}).stdout
    assert "paged_attention (break op)" in text

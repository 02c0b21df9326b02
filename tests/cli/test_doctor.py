"""``reprise doctor``: its facts are those of the platforms and of the op registry."""

from __future__ import annotations

import json

import reprise
from reprise import ops, platforms


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
                "unusable": each.requires(platform),
                "graph_support": each.graph_support,
            }


def test_ops_with_an_override(invoke, device):
    report = one_json_line(
        invoke("doctor", "ops", "--device", device, "--op", "rms_norm=reference", "--json")
    )
    assert report["ops"]["rms_norm"]["chosen"] == "reference"
    failed = invoke("doctor", "ops", "--device", device, "--op", "rms_norm=nothing")
    assert failed.exit_code == 2
    assert "has no implementation 'nothing'" in failed.stderr


def test_ops_as_a_table(invoke):
    text = invoke("doctor", "ops", env={"COLUMNS": "160"}).stdout
    assert "paged_attention (break op)" in text

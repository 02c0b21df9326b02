from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import verifying
from torch import Tensor

from reprise.ops import gated_delta
from reprise.ops.cases import Maker
from reprise.ops.gated_delta.cases import arguments
from reprise.ops.gated_delta.reference import prepared

reference = gated_delta.implementations["reference"].function
IMPLEMENTATIONS = ("reference", "torch", "triton")
CUTS = (1, 2, 3, 5, 63, 64, 65, 70)


def exact(call: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One request from its beginning in float64: answers [T, HV, V], state [HV, V, K]."""
    wide = {name: call[name].double() for name in ("qkv", "a", "b", "a_log", "dt_bias")}
    _, heads, values, keys = call["state"].shape
    rest = (wide["qkv"].shape[1] - heads * values) // 2
    q, k, v = wide["qkv"].split((rest, rest, heads * values), dim=1)
    q, k = (each.view(len(each), -1, keys) for each in (q, k))
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    group = heads // q.shape[1]
    now = torch.zeros(heads, values, keys, dtype=torch.float64, device=q.device)
    answers = []
    for token in range(len(q)):
        gate = wide["a"][token] + wide["dt_bias"]
        now = now * (-wide["a_log"].exp() * gate.exp().log1p()).exp()[:, None, None]
        heads_of = torch.arange(heads, device=q.device) // group
        key, query = k[token][heads_of], q[token][heads_of] / math.sqrt(keys)
        error = v[token].view(heads, values) - torch.einsum("hvk,hk->hv", now, key)
        now = now + torch.einsum("hv,hk->hvk", wide["b"][token].sigmoid()[:, None] * error, key)
        answers.append(torch.einsum("hvk,hk->hv", now, query))
    return torch.stack(answers), now


def whole(make: Maker, tokens: int, heads=(2, 4), sizes=(16, 8)) -> dict[str, Tensor]:
    call = arguments(make, heads, sizes, [0], [tokens], [True], 0)
    call["state"] = torch.full_like(call["state"], torch.nan)
    call["out"] = torch.full_like(call["out"], torch.nan)
    return call


def in_cuts(function, call: dict[str, Tensor], cuts: list[int]) -> tuple[Tensor, Tensor]:
    """The same request, computed in chunks, in one poisoned slot beside padding."""
    device = call["qkv"].device
    state, found, begin = call["state"].clone(), [], 0
    for cut in cuts:
        part = {name: call[name][begin : begin + cut] for name in ("qkv", "a", "b", "out")}
        numbers = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        step = {
            **call, **part, "out": part["out"].clone(), "state": state,
            "slots": numbers([1, 0]), "query_start_loc": numbers([0, cut, cut]),
            "seq_lens": numbers([begin + cut, 0]), "query_len": int(cut == 1),
            "fresh": torch.tensor([begin == 0, False], device=device),
        }  # fmt: skip
        function(**step)
        found.append(step["out"])
        begin += cut
    assert state[0].isnan().all(), "padding's slot is not written"
    return torch.cat(found), state[1]


def close(found, expected, atol=2e-5) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@pytest.fixture
def make(platform) -> Maker:
    return Maker(platform.device, torch.float32)


def _marks(name: str, cut: int) -> list[pytest.MarkDecorator]:
    """The interpreter is slow."""
    return [pytest.mark.long] if name == "triton" and cut not in (5, 65) else []


@pytest.mark.parametrize(
    ("name", "cut"),
    [pytest.param(name, cut, marks=_marks(name, cut)) for name in IMPLEMENTATIONS for cut in CUTS],
)
def test_any_cuts_give_the_rule_of_the_whole(implementation, make, name, cut) -> None:
    function = implementation(gated_delta, name)
    tokens = min(2 * cut + 3, 150)
    call = whole(make, tokens)
    answers, state = exact(call)
    cuts = [min(cut, tokens - begin) for begin in range(0, tokens, cut)]
    found, after = in_cuts(function, call, cuts)
    close(found, answers)
    close(after, state)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((1, 1), (8, 8)), ((1, 2), (16, 8)), ((2, 6), (8, 24)), ((1, 4), (32, 16))],
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS[:2])
def test_head_counts_and_sizes(implementation, make, name, heads, sizes) -> None:
    function = implementation(gated_delta, name)
    call = whole(make, 67, heads, sizes)
    answers, state = exact(call)
    for cuts in ([67], [66, 1]):
        found, after = in_cuts(function, call, cuts)
        close(found, answers)
        close(after, state)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strong_decay_stays_finite(implementation, make, name) -> None:
    """Summed over a chunk the decay is far beyond what float32 can raise to."""
    function = implementation(gated_delta, name)
    call = whole(make, 130)
    call["a_log"], call["a"] = torch.full_like(call["a_log"], math.log(16)), 8 * call["a"]
    answers, state = exact(call)
    found, after = in_cuts(function, call, [64, 66])
    close(found, answers)
    close(after, state)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_key_that_repeats(implementation, make, name) -> None:
    """Hardly any decay, and each token writes nearly all of its value over that of the one before:
    the triangle that a chunk inverts is full, and its powers grow beyond what float32 resolves."""
    function = implementation(gated_delta, name)
    call = whole(make, 130)
    call["qkv"][:, 2 * 16 : 2 * 2 * 16] = call["qkv"][:1, 2 * 16 : 2 * 2 * 16].clone()
    call["a_log"], call["a"] = torch.full_like(call["a_log"], -9.0), 0 * call["a"]
    call["b"] = torch.full_like(call["b"], 6.0)
    answers, state = exact(call)
    found, after = in_cuts(function, call, [64, 66])
    close(found, answers)
    close(after, state)


@pytest.mark.long
@pytest.mark.timeout(1200)  # in the interpreter, on a machine that is busy
@pytest.mark.parametrize("lengths", [range(1, 44), range(44, 87), range(87, 131)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (1, 3), (1, 4)])
def test_triton_at_every_length(implementation, make, heads, lengths) -> None:
    """Ends of chunks and of blocks in them, heads of every ratio, keys wider than values."""
    function = implementation(gated_delta, "triton")
    for tokens in lengths:
        call = whole(make, tokens, heads, (32, 16))
        answers, state = exact(call)
        first = 1 + 7 * tokens % 11 * tokens // 13
        for cuts in ([tokens], [first, tokens - first] if tokens > first else [tokens]):
            found, after = in_cuts(function, call, cuts)
            close(found, answers)
            close(after, state)


def test_requests_of_a_step_do_not_meet(implementation, make, platform) -> None:
    """In bfloat16 too: each is computed as if alone, from its own slot, and only there."""
    for dtype in (torch.float32, torch.bfloat16):
        begins, new = [5, 0, 9, 0, 3], [1, 70, 1, 0, 2]
        fresh = [False, True, False, True, False]
        call = arguments(Maker(platform.device, dtype), (2, 4), (16, 8), begins, new, fresh, 0, 4)
        call["out"].fill_(torch.nan)
        expected = {**call, "out": call["out"].clone(), "state": call["state"].clone()}
        reference(**expected)
        for name in IMPLEMENTATIONS[1:]:
            if name == "triton" and dtype == torch.bfloat16 and platform.device_type == "cpu":
                continue  # the interpreter truncates where devices round
            got = {**call, "out": call["out"].clone(), "state": call["state"].clone()}
            implementation(gated_delta, name)(**got)
            tolerance = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 4e-2}
            torch.testing.assert_close(got["out"], expected["out"], **tolerance)
            # Matrix units take what a chunk adds to a state rounded to the compute dtype.
            for slot, count in zip(call["slots"].tolist(), new, strict=True):
                apart = (got["state"][slot] - expected["state"][slot]).norm()
                rounded = dtype == torch.bfloat16 and count > 8
                allowed = (2**-7 if rounded else 2e-6) * expected["state"][slot].norm()
                assert apart <= allowed, (name, dtype, count)


def _drafting() -> list[Any]:
    """Implementations and how many tokens are drafted; of more than are computed one by one, too.
    The interpreter is slow."""
    found: list[Any] = [(name, drafts) for name in IMPLEMENTATIONS[:2] for drafts in (1, 3, 7)]
    for drafts in (1, 3, 7, 9):
        marks = [] if drafts == 3 else [pytest.mark.long]
        found.append(pytest.param("triton", drafts, marks=marks))
    return found


@pytest.mark.parametrize(("name", "num_drafts"), _drafting())
@pytest.mark.parametrize("uniform", [True, False])
def test_drafts_that_do_not_count_leave_no_trace(
    implementation, make, platform, name, num_drafts, uniform
) -> None:
    """Chunks and verifying steps in any order, drafts of any quality; poisoned slots."""
    function, tokens = implementation(gated_delta, name), 90
    for seed in range(1 if name == "triton" else 3):
        text = whole(make, tokens)
        answers, state = exact(text)
        kept = (4, 1 + num_drafts, text["qkv"].shape[1] - 2 * 16)
        own = {
            "state": text["state"].new_full((4, *text["state"].shape[1:]), torch.nan),
            "recent": text["qkv"].new_full(kept, torch.nan),
            "gates": text["state"].new_full((*kept[:2], 2, 4), torch.nan),
        }

        def call(rows, *, text=text, own=own, **step):
            given = {
                each: torch.where((rows < 0).unsqueeze(1), 9.0, text[each][rows.clamp(min=0)])
                for each in ("qkv", "a", "b")
            }
            out = torch.full_like(text["out"][: len(rows)], torch.nan)
            function(**{**text, **given, **own, **step, "out": out})
            return out

        plan = verifying.plans(seed, num_drafts, tokens)
        found = verifying.run(call, plan, num_drafts, platform.device, uniform=uniform)
        close(found, answers)
        # All is known in the end: what is left is the state, and zeros.
        for each in own.values():
            assert each[[0, 1, 3]].isnan().all(), "no other slot is written"
        if plan[-1].known:
            close(own["state"][verifying.SLOT], state)
            assert not own["recent"][verifying.SLOT].count_nonzero()


def test_is_what_transformers_computes(make) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    call = whole(make, 70)
    query, key, value, decay, beta = prepared(
        *(call[name] for name in ("qkv", "a", "b", "a_log", "dt_bias", "state"))
    )
    inputs = (query * math.sqrt(query.shape[-1]), key, value, decay, beta)
    for function in (theirs.torch_recurrent_gated_delta_rule, theirs.torch_chunk_gated_delta_rule):
        answers, state = function(
            *(each.unsqueeze(0) for each in inputs), initial_state=None, output_final_state=True
        )
        found, after = in_cuts(reference, call, [70])
        close(found, answers[0].double())
        close(after, state[0].mT.double())

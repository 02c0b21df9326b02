"""LLM.update_weights: as if the engine had been made with the new weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from torch import Tensor

from reprise import LLM
from reprise.errors import LoadError, RequestError

PROMPTS = [random_ids(seed, 4 + 12 * seed) for seed in range(4)]
GRAPHS: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 32, "graph_buckets": "decode=1,4;mixed=32",
    "graph_verify": "canary:1",
}  # fmt: skip


def weights(model: TinyModel) -> dict[str, Tensor]:
    return dict(model.reference.state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("executor", ["full", "breakable"])
def test_as_a_fresh_engine(tiny: TinyModels, device: str, architecture: str, executor: str) -> None:
    old, new = tiny(architecture), tiny(architecture, seed=5)
    llm = make_llm(old, device, **GRAPHS, graph_mode=executor)
    expected = [generate(make_llm(each, device), PROMPTS, greedy(12)) for each in (old, new)]
    assert generate(llm, PROMPTS, greedy(12)) == expected[0]
    addresses = {name: each.data_ptr() for name, each in llm.engine.runner.model.named_parameters()}
    llm.update_weights(weights(new))
    for _ in range(2):  # with prefixes of the old weights forgotten, and with those of the new
        assert generate(llm, PROMPTS, greedy(12)) == expected[1]
    llm.update_weights(iter(weights(old).items()))
    assert generate(llm, PROMPTS, greedy(12)) == expected[0]
    report = llm.graph_report()
    assert report.canaries > 20
    assert report.canary_failures == 0
    assert not report.quarantined
    for name, each in llm.engine.runner.model.named_parameters():
        assert each.data_ptr() == addresses[name]


def test_a_head_that_the_checkpoint_has_untied(
    tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    """The config ties it to the embedding, what is stored does not, so neither do new weights."""
    old, new = tiny("llama"), tiny("llama", seed=5)
    path = Path(shutil.copytree(old.path, tmp_path / "model"))
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    llm = make_llm(path, device)
    llm.update_weights(weights(new))
    assert generate(llm, PROMPTS, greedy(12)) == generate(
        make_llm(new, device), PROMPTS, greedy(12)
    )


def test_some_weights_alone_and_other_dtypes(tiny: TinyModels, device: str) -> None:
    old, new = tiny("qwen3"), tiny("qwen3", seed=5)
    llm = make_llm(old, device)
    some = {name: each.double() for name, each in weights(new).items() if "layers.1" in name}
    llm.update_weights(some)
    mixed = make_llm(old, device)
    mixed.update_weights({**weights(old), **some})
    assert generate(llm, PROMPTS, greedy(8)) == generate(mixed, PROMPTS, greedy(8))
    rest = {name: each for name, each in weights(new).items() if name not in some}
    llm.update_weights((name, each.mT.contiguous().mT if each.dim() == 2 else each)
                       for name, each in rest.items())  # fmt: skip
    assert new.is_greedy(PROMPTS[2], generate(llm, PROMPTS, greedy(8))[2])


@pytest.mark.parametrize("names", [("embed",), ("head",), ("head", "embed"), ("embed", "head")])
def test_tied_weights(tiny: TinyModels, device: str, names: tuple[str, ...]) -> None:
    old = tiny("qwen3", tie_word_embeddings=True)
    new = tiny("qwen3", tie_word_embeddings=True, seed=5)
    llm = make_llm(old, device)
    given = weights(new)
    tied = {"embed": given.pop("model.embed_tokens.weight"), "head": given.pop("lm_head.weight")}
    full = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    llm.update_weights({**given, **{full[each]: tied[each] for each in names}})
    assert new.is_greedy(PROMPTS[1], generate(llm, PROMPTS, greedy(8))[1])
    if len(names) == 2:
        with pytest.raises(LoadError, match=f"ties it to .1.: {full[names[1]]}"):
            llm.update_weights({full[names[0]]: tied["embed"], full[names[1]]: tied["head"] + 1})
        assert new.is_greedy(PROMPTS[1], generate(llm, PROMPTS, greedy(8))[1])


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w | {"model.layers.9.x": w[Q]}, ["unexpected (1): model.layers.9.x"]),
        (lambda w: w | {Q: w[Q][1:]}, [f"wrong shape (1): {Q}: [63, 64] given, [64, 64] needed"]),
        (lambda w: w | {Q: w[Q].to(torch.int8)}, [f"wrong dtype (1): {Q}: torch.int8"]),
        (lambda w: w | {Q: w[Q].to(torch.float8_e4m3fn)}, ["wrong dtype (1)"]),
        (lambda w: w | {Q: w[Q].to("meta")}, [f"wrong dtype (1): {Q}: meta given"]),
        (lambda w: w | {Q: w[Q].to_sparse()}, ["wrong dtype (1)", "sparse"]),
        (lambda w: w | {Q: w[Q].tolist()}, [f"no tensors (1): {Q!r}: list"]),
        (lambda w: [*w.items(), (Q, w[Q])], [f"given twice (1): {Q}"]),
        (lambda w: [Q], ["pairs of a name and a tensor"]),
        (lambda w: 5, ["pairs of a name and a tensor"]),
        (
            lambda w: w | {"a": w[Q], "b": w[Q], Q: w[Q][1:], "lm_head.weight": w[Q].int()[:0]},
            ["unexpected (2): a, b", "wrong shape (2): lm_head.weight"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(
    tiny: TinyModels, device: str, change: Any, parts: list[str]
) -> None:
    old, new = tiny("qwen3"), tiny("qwen3", seed=5)
    llm = make_llm(old, device)
    before = {name: each.clone() for name, each in llm.engine.runner.model.named_parameters()}
    with pytest.raises(LoadError) as error:
        llm.update_weights(change(weights(new)))
    for part in parts:
        assert part in str(error.value)
    after = dict(llm.engine.runner.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert old.is_greedy(PROMPTS[1], generate(llm, PROMPTS, greedy(8))[1])


def test_while_requests_run_it_is_refused(tiny: TinyModels, device: str) -> None:
    llm: LLM = make_llm(tiny("qwen3"), device)
    llm.engine.add("running", PROMPTS[0], greedy(8))
    llm.engine.step()
    with pytest.raises(RequestError, match=r"while 1 request\(s\) are running"):
        llm.update_weights(weights(tiny("qwen3", seed=5)))
    while llm.engine.has_work:
        llm.engine.step()


def test_an_interrupted_update_must_be_made_good(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tiny("qwen3", seed=5)
    llm = make_llm(tiny("qwen3"), device)
    with monkeypatch.context() as broken:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr("reprise.loading.update.transfer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights({name: each.cpu() for name, each in weights(new).items()})
    with pytest.raises(LoadError, match=f"interrupted: .*{Q}"):
        generate(llm, PROMPTS, greedy(8))
    llm.update_weights({Q: weights(new)[Q]})
    with pytest.raises(LoadError, match="interrupted"):
        generate(llm, PROMPTS, greedy(8))
    llm.update_weights(weights(new))
    assert new.is_greedy(PROMPTS[1], generate(llm, PROMPTS, greedy(8))[1])

"""What replicas send and are sent comes out as it went in."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from reprise.engine.driver import settle
from reprise.engine.tokenizing import Tokenizing
from reprise.errors import LoadError, RepriseError
from reprise.logprobs import Logprob, WholeLogprobs
from reprise.outputs import CompletionOutput, RequestMetrics, RequestOutput
from reprise.replicas.deltas import pack, unpack
from reprise.replicas.outstanding import Outstanding
from reprise.replicas.replicas import Replicas
from reprise.replicas.router import Router
from reprise.replicas.weights import read_weights, write_weights


def output(**changes: object) -> RequestOutput:
    values = {
        "request_id": "a", "prompt": "text", "prompt_token_ids": [1, 2, 3],
        "outputs": [
            CompletionOutput(0, "x", [4], -0.5, [{4: Logprob(-0.5, 1, "x")}], None, None, 2),
            CompletionOutput(1, "y", [5, 6], None, None, "stop", "y", None),
        ],
        "finished": False, "metrics": RequestMetrics(1.0, 2.0, 3.0, None, 4, 5),
        "prompt_logprobs": [None, {2: Logprob(-1.0, 2, None)}],
    }  # fmt: skip
    return RequestOutput(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [output(), output(outputs=[], prompt_logprobs=None)])
def test_a_delta(delta: RequestOutput) -> None:
    sent = pickle.loads(pickle.dumps(pack(delta, delta.metrics)))
    known = ("a", "text", [1, 2, 3])
    assert unpack(sent, *known, None, None) == delta
    again = pickle.loads(pickle.dumps(pack(delta, None)))
    assert unpack(again, *known, delta.metrics, None) == delta


def test_the_whole_vocabulary_is_sent_as_numbers() -> None:
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    whole = WholeLogprobs(7, values)
    whole.decode = lambda token: f"<{token}>"
    delta = output(prompt_logprobs=[None, whole])
    sent = pickle.dumps(pack(delta, None), pickle.HIGHEST_PROTOCOL)
    assert len(sent) < 2 * values.nbytes
    got = unpack(pickle.loads(sent), "a", "text", [1], delta.metrics, lambda token: f"[{token}]")
    assert got.prompt_logprobs is not None
    found = got.prompt_logprobs[1]
    assert isinstance(found, WholeLogprobs)
    assert list(found) == list(whole)
    assert found[9].logprob == whole[9].logprob
    assert found[9].decoded_token == "[9]"


def test_a_tokenizer_that_panics() -> None:
    """What libraries in Rust raise then is no Exception, and its caller waits in another thread."""

    class Panic(BaseException):
        pass

    def prompt() -> object:
        raise Panic("index out of bounds")

    replicas: Any = object.__new__(Replicas)
    replicas._outstanding = Outstanding(Router(16, [1], 1))
    replicas._tokenizing = Tokenizing()
    replicas.prepare_params = lambda params: params
    accepted = replicas.submit("a", prompt, None, 0, object())
    with pytest.raises(RepriseError, match="Panic: index out of bounds"):
        accepted.result(10)
    answer: Future[None] = Future()
    settle(answer, prompt)  # type: ignore[arg-type]
    assert isinstance(answer.exception(10), RepriseError)


def test_weights() -> None:
    weights = {
        "matrix": torch.randn(3, 5),
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(7).to(torch.bfloat16),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "codes": torch.arange(9, dtype=torch.uint8),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
    }
    file, index = write_weights(iter(weights.items()))
    with file:
        found = read_weights(os.dup(file.fileno()), index)
    assert found.keys() == weights.keys()
    for name, each in weights.items():
        assert found[name].dtype == each.dtype
        assert found[name].shape == each.shape
        assert torch.equal(found[name].float(), each.float()), name
    nothing, index = write_weights({})
    with nothing:
        assert read_weights(os.dup(nothing.fileno()), index) == {}


def test_what_is_no_weight() -> None:
    with pytest.raises(LoadError, match="'x'"):
        write_weights({"x": 3})  # type: ignore[dict-item]

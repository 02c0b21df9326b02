from __future__ import annotations

import pytest
import torch
from toy import Toy

from reprise.graphs import Buckets, GraphRunner, parse_plan, parse_verify


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny; more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(platform):
    return Toy(platform)


@pytest.fixture
def make_runner(platform):
    def make(toy, plan="full", *, decode=(1, 2, 4), mixed=(16, 32), verify="startup", **more):
        return GraphRunner(
            toy, platform, parse_plan(plan), Buckets(tuple(decode), tuple(mixed)),
            toy.max_requests, **more,
            verify=parse_verify(verify) if isinstance(verify, str) else verify,
        )  # fmt: skip

    return make

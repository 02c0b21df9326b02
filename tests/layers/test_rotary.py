"""Rotary tables against transformers' inverse frequencies, over random scaling parameters."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reprise.errors import ModelError
from reprise.layers import rotary_table

THETA = st.sampled_from([100.0, 10_000.0, 500_000.0, 1_000_000.0])
FACTOR = st.floats(1.0, 40.0)
ORIGINAL = st.sampled_from([16, 64, 512, 8192])

LINEAR = st.fixed_dictionaries(
    {"rope_type": st.just("linear"), "rope_theta": THETA, "factor": FACTOR}
)
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "rope_theta": THETA,
        "factor": FACTOR,
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 8.0),
        "original_max_position_embeddings": ORIGINAL,
    }
)
YARN = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "rope_theta": THETA,
        "factor": FACTOR,
        "original_max_position_embeddings": ORIGINAL,
    },
    optional={
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "attention_factor": st.floats(0.5, 2.0),
        "mscale": st.floats(0.5, 2.0),
        "mscale_all_dim": st.floats(0.5, 2.0),
        "truncate": st.booleans(),
    },
)


def check(parameters: dict[str, Any], head_size: int, length: int, device: torch.device) -> None:
    config = tiny_config(
        "llama", head_dim=head_size, max_position_embeddings=4096, rope_parameters=parameters
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config, torch.device("cpu")
    )
    table = rotary_table(
        parameters,
        head_size=head_size,
        max_position_embeddings=4096,
        length=length,
        device=device,
    ).cpu()
    angles = torch.outer(torch.arange(length).float(), frequencies.float())
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude
    assert table.shape == (length, head_size)
    # A rounding error of a frequency grows with the position.
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=2e-6 * length)


@settings(max_examples=150)
@given(parameters=st.one_of(LINEAR, LLAMA3, YARN), head_size=st.sampled_from([8, 16, 64, 128, 192]))
def test_scalings(platform: Any, parameters: dict[str, Any], head_size: int) -> None:
    check(parameters, head_size, 64, platform.device)


@given(theta=THETA, head_size=st.sampled_from([2, 16, 96]))
@settings(max_examples=20)
def test_unscaled(platform: Any, theta: float, head_size: int) -> None:
    table = rotary_table(
        {"rope_theta": theta},
        head_size=head_size,
        max_position_embeddings=64,
        length=32,
        device=platform.device,
    ).cpu()
    for position in (0, 1, 31):
        for channel in range(head_size // 2):
            angle = torch.tensor(position * theta ** (-2 * channel / head_size))
            assert float(table[position, channel]) == pytest.approx(float(angle.cos()), abs=1e-4)
            assert float(table[position, head_size // 2 + channel]) == pytest.approx(
                float(angle.sin()), abs=1e-4
            )


def test_part_of_a_head(platform: Any) -> None:
    """The rotated channels are those of a smaller head."""

    def table(head_size: int, **more: float) -> torch.Tensor:
        return rotary_table(
            {"rope_theta": 1e4, **more},
            head_size=head_size,
            max_position_embeddings=64,
            length=40,
            device=platform.device,
        )

    assert torch.equal(table(32, partial_rotary_factor=0.5), table(16))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, "rope_type='longrope'"),
        ({"rope_type": "default"}, "rope_theta=None"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor=None"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor=0"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}, "factor='x'"),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": "x"},
            "beta_fast='x'",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": "x"}, "partial_rotary_factor='x'"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, "low_freq_factor=None"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as caught:
        rotary_table(
            parameters,
            head_size=8,
            max_position_embeddings=64,
            length=8,
            device=torch.device("cpu"),
        )
    assert named in str(caught.value)

"""``generation_config.json``: what a checkpoint recommends for generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.errors import LoadError, RequestError
from reprise.loading.files import read_object
from reprise.loading.hf_config import check_token_ids
from reprise.neutral import is_neutral
from reprise.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_FOLLOWED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "dola_layers": (),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "bad_words_ids": ([],), "force_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ([], {}),
    "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "guidance_scale": (1,), "watermarking_config": ({},),
    "typical_p": (1,), "top_h": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "stop_strings": ([],),
}  # fmt: skip
"""What transformers would do, and neither this engine nor vLLM does; and where it asks for nothing.
"""


def read_generation_config(path: Path) -> Mapping[str, Any]:
    """The generation config of a checkpoint's directory; empty: it has none.

    Raises:
        LoadError: The file is not valid, or recommends what no request can ask for.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    try:
        content = read_object(file)
        check_token_ids(content.get("eos_token_id"))
        samples = content.get("do_sample")
        if not isinstance(samples, bool | None):
            raise ValueError(f"do_sample={samples!r} must be true or false")
        SamplingParams(**recommended(content))
    except (ValueError, OSError, RequestError) as error:
        raise LoadError(f"{file} is not valid: {error}") from error
    left = [
        f"{name}={content[name]!r}"[:200]
        for name, neutral in _NOT_FOLLOWED.items()
        if not is_neutral(content.get(name), neutral)
    ]
    if left:
        logger.warning("%s also says %s: not followed", file, ", ".join(left))
    return content


def recommended(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`reprise.SamplingParams`, of a generation config."""
    found = {name: content.get(name) for name in _FOLLOWED}
    found["max_tokens"] = content.get("max_new_tokens")
    if content.get("do_sample") is False:
        found["temperature"] = 0.0
    return {name: value for name, value in found.items() if value is not None}

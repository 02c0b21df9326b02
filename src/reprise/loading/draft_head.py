"""Read what an EAGLE-3 head is from its checkpoint, whichever tool wrote it, and load it.

SafeAILab's EAGLE and SpecForge write the layers' fields beside the head's; ``speculators`` writes
them as ``transformer_layer_config``. Both name the depths of the hidden states that a head reads,
and count them differently.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reprise.errors import LoadError, ModelError
from reprise.layers import Build, CausalLM
from reprise.layers.formats import PLAIN
from reprise.loading.checkpoint import DEMO_MODEL, locate
from reprise.loading.destinations import Misfits, by_our_names
from reprise.loading.files import read_object
from reprise.loading.hf_config import layer_config
from reprise.loading.weight_files import stored_tensors
from reprise.loading.weights import load_weights
from reprise.models.eagle3 import RENAMES, Eagle3, HeadConfig
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

DEMO_HEAD = DEMO_MODEL / "eagle3"
"""Of the demo model."""
_KINDS = ("llama", "qwen3")
"""What ``model_type`` may be: a decoder layer of this family with one more input."""
_IDS = "eagle_aux_hidden_state_layer_ids"
_FIXED: Mapping[str, Any] = {
    "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True,
    "parallel_draft_step": 1, "has_lm_head": True, "parallel_drafting": False,
    "mask_token_id": None, "pard_token": None, "ptd_token_id": None, "dflash_config": None,
    "quantization_config": None, "fc_bias": False, "bias": False, "eagle_fc_bias": False,
}  # fmt: skip
"""Fields of relatives, with the value at which they ask for an EAGLE-3 head as it is here."""
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_SIZES = ("draft_vocab_size", "target_hidden_size")
_NESTED = {*_FIXED, *_FLAGS, *_SIZES, _IDS, "eagle_decoder_type", "draft_vocab_cache"}


@dataclass(frozen=True)
class Target:
    """What a head's config is read against."""

    num_layers: int
    hidden_size: int
    vocab_size: int


class _Fields:
    """A head's own fields, which stand at the top of its config or in ``eagle_config``."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self._raw, self._file = raw, file
        nested = raw.get("eagle_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise self.refusal("eagle_config", nested, "an object")
        self.nested: Mapping[str, Any] = nested or {}
        unknown = sorted(set(self.nested) - _NESTED)
        if unknown:
            raise ModelError(
                f"{file}: eagle_config has {', '.join(unknown)}, which is not known here; "
                "only what is known can be computed as it was trained"
            )
        for name, value in _FIXED.items():
            found = self.get(name)
            if found is not None and found != value:
                raise self.refusal(name, found, repr(value), "is not supported")

    def get(self, name: str) -> Any:
        """A field, or None.

        Raises:
            ModelError: It stands in both places with different values.
        """
        above, below = self._raw.get(name), self.nested.get(name)
        if above is not None and below is not None and above != below:
            raise ModelError(
                f"{self._file}: {name}={above!r} and eagle_config with {name}={below!r} "
                "contradict each other; remove one"
            )
        return below if above is None else above

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def size(self, name: str) -> int | None:
        value = self.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise self.refusal(name, value, "a whole number of at least 1")
        return value

    def refusal(self, name: str, value: Any, right: str, but: str = "") -> ModelError:
        wrong = but and f" {but};"
        return ModelError(f"{self._file}: config field {name}={value!r}{wrong} must be {right}")


def read_head(
    raw: Mapping[str, Any], file: Path, target: Target, names: Collection[str] | None
) -> HeadConfig:
    """What a head is.

    Args:
        raw: Its ``config.json``.
        file: That file.
        target: What it drafts for.
        names: Of the tensors that its checkpoint has, as :class:`Eagle3` names them; None: weights
            are made up.

    Raises:
        ModelError: It is another kind of head, or asks for something that is not computed here.
        LoadError: A tensor is missing without which it is no head of this target.
    """
    kind = raw.get("speculators_model_type")
    theirs = kind is not None or "transformer_layer_config" in raw
    if theirs and kind != "eagle3":
        raise ModelError(
            f"{file}: speculators_model_type={kind!r} is not supported; supported: 'eagle3'"
        )
    fields = _Fields(raw, file)
    described = raw.get("transformer_layer_config") if theirs else raw
    if not isinstance(described, Mapping):
        raise fields.refusal("transformer_layer_config", described, "an object")
    if described.get("model_type") not in _KINDS:
        raise ModelError(
            f"{file}: model_type={described.get('model_type')!r} of a head is not supported; "
            f"supported: {', '.join(map(repr, _KINDS))}"
        )
    own = {"eagle_config", *_NESTED}
    layers = layer_config({k: v for k, v in described.items() if k not in own}, file)
    if layers.vocab_size != target.vocab_size:
        raise ModelError(
            f"{file}: vocab_size={layers.vocab_size} is not the model's, {target.vocab_size}: "
            "the head was made for another one"
        )
    width = fields.size("target_hidden_size")
    if width not in (None, target.hidden_size):
        raise ModelError(
            f"{file}: target_hidden_size={width} is not the model's hidden_size="
            f"{target.hidden_size}: the head was made for another one"
        )
    if fields.flag("fc_norm") and fields.flag("norm_before_fc"):
        raise ModelError(f"{file}: fc_norm and norm_before_fc exclude each other; which is meant?")
    residual = fields.get("norm_before_residual")
    if theirs and residual is None:
        logger.info(
            "norm_before_residual: true (speculators' config does not say, as vLLM reads it)"
        )
    draft_vocab = fields.size("draft_vocab_size") or target.vocab_size
    if draft_vocab > target.vocab_size:
        raise fields.refusal(
            "draft_vocab_size", draft_vocab, f"at most vocab_size={target.vocab_size}"
        )
    embedding, head, mapped = _own(raw, file, target, layers.hidden_size, draft_vocab, names)
    return HeadConfig(
        layers=layers,
        taps=_depths(raw, fields, target, file),
        draft_vocab_size=draft_vocab,
        input_norm="each"
        if fields.flag("fc_norm")
        else "joint"
        if fields.flag("norm_before_fc")
        else "none",
        norm_before_residual=fields.flag("norm_before_residual", theirs),
        norm_output=fields.flag("norm_output"),
        qk_norm=described["model_type"] == "qwen3"
        if names is None
        else "layers.0.self_attn.q_norm.weight" in names,
        embedding=embedding,
        head=head,
        mapped=mapped,
    )


def _depths(raw: Mapping[str, Any], fields: _Fields, target: Target, file: Path) -> tuple[int, ...]:
    """At the top of a config a number v is the residual stream behind v layers; in ``eagle_config``
    it is the layer whose output is taken, which is behind one more."""
    above, below = raw.get(_IDS), fields.nested.get(_IDS)
    for value in (above, below):
        if value is not None and not (
            isinstance(value, list) and value and all(type(each) is int for each in value)
        ):
            raise fields.refusal(_IDS, value, "a list of layers")
    said = f"{_IDS}={above}"
    depths = above
    if below is not None:
        depths = [each + 1 for each in below]
        said = f"eagle_config {_IDS}={below}, each one the layer whose output is taken"
        if above is not None and above != depths:
            raise ModelError(
                f"{file}: {_IDS}={above} and eagle_config with {below} contradict each other: the "
                "second ones name layers by their outputs, so each is one less; remove one"
            )
    if depths is None:
        count = target.num_layers
        depths, said = [2, count // 2, count - 3], "the default, since the config names none"
    if sorted(set(depths)) != depths or not 0 <= depths[0] <= depths[-1] <= target.num_layers:
        raise ModelError(
            f"{file}: a head that reads hidden states behind {depths} layers ({said}) does not "
            f"fit a model of {target.num_layers}: they must ascend, from 0 to that; name "
            f"them in {_IDS}"
        )
    logger.info("head: reads hidden states behind %s of %d layers (%s)",
                ", ".join(map(str, depths)), target.num_layers, said)  # fmt: skip
    return tuple(depths)


def _own(
    raw: Mapping[str, Any],
    file: Path,
    target: Target,
    hidden_size: int,
    draft_vocab: int,
    names: Collection[str] | None,
) -> tuple[Literal["own", "target's"], Literal["own", "target's", "embedding"], bool]:
    """Whose the embedding and the last product are, and whether the head has a table of tokens."""
    as_wide, whole = hidden_size == target.hidden_size, draft_vocab == target.vocab_size
    if names is None:
        return "target's" if as_wide else "own", "own", not whole
    own = "embed_tokens.weight" in names
    if not own and not as_wide:
        raise LoadError(
            f"{file.parent} lacks embed_tokens.weight: the model's has hidden_size="
            f"{target.hidden_size}, the head {hidden_size}"
        )
    embedding: Literal["own", "target's"] = "own" if own else "target's"
    mapped = not whole or "d2t" in names
    if "lm_head.weight" in names:
        return embedding, "own", mapped
    if whole and raw.get("tie_word_embeddings") is True:
        return embedding, "embedding", mapped
    if whole and as_wide:
        return embedding, "target's", mapped
    raise LoadError(
        f"{file.parent} lacks lm_head.weight: the model's is [{target.vocab_size}, "
        f"{target.hidden_size}], the head needs [{draft_vocab}, {hidden_size}]"
    )


def find_head(model: str | None, target: Path, revision: str | None, *, config_only: bool) -> Path:
    """The directory of a head's checkpoint.

    Args:
        model: Directory or hub id; None: the one that ships with the demo model.
        target: Directory of the model that it drafts for.
        revision: Of a hub id.
        config_only: Do not download weights.

    Raises:
        ModelError: There is none.
    """
    if model is None:
        if target.resolve() != DEMO_MODEL.resolve():
            raise ModelError(
                "method='eagle3' needs 'model': the directory or hub id of a head that was "
                "trained for this model"
            )
        return DEMO_HEAD
    path = locate(model, revision, config_only)
    return path.parent if path.name == "config.json" and path.is_file() else path


def build_head(path: Path, target: CausalLM, build: Build, *, made_up: bool) -> Eagle3:
    """The head in a directory, with unset weights.

    Args:
        path: The directory.
        target: What it drafts for: what both have is the target's.
        build: How the target was made.
        made_up: Weights will not be read: the config alone says what they are.

    Raises:
        ModelError: It is another kind of head, or one of another model, or asks for something that
            is not computed here.
        LoadError: A file is missing or corrupted, or a tensor without which it is no head.
    """
    file = path / "config.json"
    try:
        raw = read_object(file)
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not valid: {error}") from error
    names = None
    if not made_up:
        misfits = Misfits("in the file", "in the head")
        names = by_our_names(stored_tensors(path).items(), RENAMES, misfits).keys()
        misfits.refuse("the checkpoint does not fit the head")
    sizes = Target(target.num_layers, target.hidden_size, target.vocab_size)
    config = read_head(raw, file, sizes, names)
    return Eagle3(config, replace(build, formats=PLAIN, path=""), target)


def load_head(
    path: Path,
    target: CausalLM,
    build: Build,
    platform: Platform,
    *,
    load_format: str = "auto",
    seed: int = 0,
) -> Eagle3:
    """The head in a directory, with its weights.

    Args:
        path: The directory.
        target: What it drafts for, with its weights: what both have is kept once.
        build: How the target was made.
        platform: Drives the device.
        load_format: See :func:`reprise.loading.load_weights`.
        seed: See :func:`reprise.loading.load_weights`.

    Raises:
        ModelError: See :func:`build_head`.
        LoadError: Likewise, or tensors do not fit.
    """
    head = build_head(path, target, build, made_up=load_format == "dummy")
    load_weights(head, path, load_format, platform, seed)
    ids = head.vocabulary.target_ids
    if bool(((ids < 0) | (ids >= target.vocab_size)).any()):
        raise LoadError(
            f"{path}: d2t leads to tokens from {int(ids.min())} to {int(ids.max())}; the model has "
            f"0 to {target.vocab_size - 1}"
        )
    head.share_embedding(target)
    return head

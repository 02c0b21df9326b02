"""Read a checkpoint's config: file, overrides and older spellings into one transformers config."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reprise import models
from reprise.errors import ConfigError, ModelError
from reprise.loading.files import read_object
from reprise.loading.plain_config import plain_config
from reprise.loading.quantization import with_quantization
from reprise.loading.rope import resolve_rope
from reprise.loading.text_part import text_part

logger = logging.getLogger(__name__)

_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Fields with one entry a layer."""
_CLASSIFIERS = ("id2label", "label2id", "num_labels", "problem_type")
"""Fields of classification heads; a language model has none, and transformers makes lists of
``num_labels`` entries."""
_READ_WHERE_GIVEN = frozenset(
    {"architectures", "dtype", "head_dim", "model_type", "original_max_position_embeddings",
     "partial_rotary_factor", "quantization_config", "rope_parameters", "rope_scaling",
     "rope_theta", "torch_dtype"}
)  # fmt: skip
"""Fields that mean something also where neither the file nor transformers' class has them."""


def read_config(file: Path, overrides: Mapping[str, Any]) -> Any:
    """transformers' ``PretrainedConfig`` of a ``config.json``, or what says the same.

    Args:
        file: The config.
        overrides: Fields to replace; objects are merged, field by field. RoPE may be spelled as
            transformers 4 or 5 does, in the file and here.

    Raises:
        ConfigError: An override has no meaning for such a config.
        ModelError: The config cannot be read, or its model not be built or loaded.
    """
    try:
        given = read_object(file)
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not valid: {error}") from error
    given, overrides = text_part(given, overrides)
    raw = merged(given, overrides)
    raw["architectures"] = _architectures(raw, file)
    models.require_known(raw)
    raw = with_quantization(file.parent, raw, overrides)
    raw = resolve_rope(raw, given, overrides)
    _cut_layer_lists(raw, given, overrides)
    config = _config(raw.pop("model_type"), raw, given, overrides, file)
    try:
        check_token_ids(config.eos_token_id)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error
    return config


def layer_config(given: Mapping[str, Any], file: Path) -> Any:
    """transformers' ``PretrainedConfig`` of the layers of a head, which is no model of its own.

    Args:
        given: The config, or the part of it that describes the layers. RoPE may be spelled as
            transformers 4 or 5 does.
        file: Where it is from.

    Raises:
        ModelError: It cannot be read.
    """
    nowhere: dict[str, Any] = {"architectures": ["a head"], "eos_token_id": None}
    raw = resolve_rope({**nowhere, **given}, given, {})
    return _config(raw.pop("model_type"), raw, given, {}, file)


def _config(
    kind: str,
    raw: Mapping[str, Any],
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
    file: Path,
) -> Any:
    if raw.get("per_layer_config"):
        raise ModelError(
            f"config field per_layer_config={str(raw['per_layer_config'])[:200]} is not supported: "
            "layers of one kind have the same sizes and fields here, and none is skipped; use "
            "the model that this one was made from"
        )
    # Before anybody makes lists of that many entries.
    models.require_layer_count(raw.get("num_hidden_layers", 1))
    raw = {name: value for name, value in raw.items() if name not in _CLASSIFIERS}
    # Which names an override may have, transformers alone knows.
    plain = None if overrides else plain_config(kind, raw)
    if plain is not None:
        return plain
    known = _known_class(kind, raw, file)
    _refuse_unknown(overrides, given, known)
    return _construct(known, raw, file)


def check_token_ids(eos_token_id: Any) -> None:
    """Check the ids in a config or a generation config.

    Raises:
        ValueError: It is no token id, list of them, or None.
    """
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if eos_token_id is not None and not all(type(each) is int for each in ids):
        raise ValueError(f"eos_token_id={eos_token_id!r} must be a token id or a list of them")


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` laid over ``lower``; objects in objects likewise."""
    result = dict(lower)
    for name, value in upper.items():
        below = result.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged(below, value)
        result[name] = value
    return result


def _architectures(raw: Mapping[str, Any], file: Path) -> list[str]:
    """As given, or what transformers' AutoModelForCausalLM makes of the model_type."""
    kind, names = raw.get("model_type"), raw.get("architectures")
    if not isinstance(kind, str):
        raise ModelError(f"{file}: model_type={kind!r} must name a kind of model")
    if names is not None and (
        not isinstance(names, list) or not all(isinstance(each, str) for each in names)
    ):
        raise ModelError(f"{file}: architectures={names!r} must be a list of names")
    if names:
        return names
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    derived = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if derived is None:
        raise ModelError(
            f"{file} names no architectures, and model_type={kind!r} has no causal language model "
            "in transformers"
        )
    names = [derived] if isinstance(derived, str) else list(derived)
    logger.info("architectures: %s (none given; by model_type %r)", ", ".join(names), kind)
    return names


def _cut_layer_lists(
    raw: dict[str, Any], given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Fewer layers by an override: the file's lists of layers end there too."""
    layers = overrides.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    for name in _LAYER_LISTS:
        values = given.get(name)
        if name not in overrides and isinstance(values, list) and len(values) > layers > 0:
            raw[name] = values[:layers]
            logger.info("%s: first %d of %d (num_hidden_layers)", name, layers, len(values))


def _refuse_unknown(overrides: Mapping[str, Any], given: Mapping[str, Any], known: type) -> None:
    fields = {
        each.name
        for base in known.__mro__
        for each in inspect.signature(base).parameters.values()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    fields = (fields | given.keys() | _READ_WHERE_GIVEN).difference(_CLASSIFIERS)
    for name in overrides:
        if name not in fields:
            near = difflib.get_close_matches(str(name), sorted(fields), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"hf_overrides has {name!r}, which {known.__name__} does not have{hint}"
            )


def _known_class(kind: str, raw: Mapping[str, Any], file: Path) -> type:
    from transformers import CONFIG_MAPPING

    try:
        with _without_docstrings():
            known: type = CONFIG_MAPPING[kind]
    except KeyError as error:
        raise ModelError(
            f"{file}: model_type={kind!r} of {', '.join(raw['architectures'])} is not one that "
            "the installed transformers knows; a newer one may"
        ) from error
    return known


def _construct(known: type, raw: Mapping[str, Any], file: Path) -> Any:
    try:
        return known(**raw)
    except Exception as error:  # transformers validates fields with errors of many types
        names = _culprits(known, raw)
        shown = ", ".join(f"{name}={raw[name]!r}" for name in names)
        raise ModelError(
            f"{file}: cannot read the config of {', '.join(raw['architectures'])}"
            f"{f' ({shown})' if shown else ''}: {type(error).__name__}: {error}"
        ) from error


def _culprits(known: type, raw: Mapping[str, Any]) -> list[str]:
    """Fields without any one of which the config can be read: many errors name none."""
    found = []
    for name in raw:
        with contextlib.suppress(Exception):
            known(**{other: value for other, value in raw.items() if other != name})
            found.append(name)
    return found


@contextlib.contextmanager
def _without_docstrings() -> Iterator[None]:
    """Import transformers' config classes without having their docstrings completed.

    That step alone imports the auto classes of all models and the compiler: seconds at start.
    """
    import transformers.utils

    completing = transformers.utils.auto_docstring

    def leave(*args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else leave

    transformers.utils.auto_docstring = leave
    try:
        yield
    finally:
        transformers.utils.auto_docstring = completing

"""Reading the ``quantization_config`` of a checkpoint, field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reprise.errors import ModelError
from reprise.layers.formats.base import Format
from reprise.layers.formats.dense import DENSE

HOW_IT_WAS_MADE = (
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "dataset",
    "model_name_or_path", "model_file_base_name", "meta", "tokenizer", "model_seqlen",
    "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "use_cuda_fp16", "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs",
    "backend", "hessian_mse", "mse", "act_group_aware", "mock_quantization", "rotation", "v2",
    "v2_alpha", "v2_memory_device", "adapter", "offload_to_disk", "offload_to_disk_path",
    "device", "parallel_packing", "compute_device_filter", "hyb_act", "gptaq", "gptaq_alpha",
    "quantizer", "use_exllama_v2", "disable_exllama", "gptaq_memory_device", "foem", "fallback",
)  # fmt: skip
"""Fields of GPTQModel and of what wrote such configs before it: how the numbers were found, which
are stored. transformers writes many of them for AWQ as well, which GPTQModel makes for it."""


class Fields:
    """An object of a config. What is not asked for is refused in the end: what changes numbers and
    is ignored would be a bug.

    A field that is null is not there, so that ``hf_overrides`` can take one away.

    Args:
        raw: As JSON has it.
        where: How messages call it.
    """

    def __init__(self, raw: Any, where: str = "quantization_config") -> None:
        if not isinstance(raw, Mapping):
            raise ModelError(f"{where}={raw!r} must be an object")
        self.where = where
        self._left = {name: value for name, value in raw.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field; its reader looks at it."""
        return self._left.pop(name, default)

    def require(self, name: str, *supported: Any, default: Any, instead: str = "") -> Any:
        """A field that must have one of these values, or be absent, which means the default.

        Args:
            name: Of the field.
            supported: Values.
            default: What it means that it is not there.
            instead: What to use where it has another value.
        """
        value = self.take(name, default)
        # 1 is no true, though it is equal.
        if not any(type(value) is type(each) and value == each for each in supported):
            shown = ", ".join(map(repr, supported))
            hint = f"; {instead}" if instead else ""
            raise self.refused(f"{name}={value!r} is not supported; supported: {shown}{hint}")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A field that is a whole number."""
        value = self.take(name, default)
        if type(value) is not int or value < least:
            raise self.refused(f"{name}={value!r} must be a whole number of at least {least}")
        return value

    def names(self, *spellings: str) -> list[str]:
        """A field that is a list of names; several spellings are one field."""
        found: list[str] = []
        for name in spellings:
            value = self.take(name, [])
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise self.refused(f"{name}={value!r} must be a list of names")
            found += value
        return found

    def group_size(self, name: str, default: Any) -> int | None:
        """Inputs that share a scale; None: all."""
        group = self.take(name, default)
        if type(group) is not int or (group != -1 and (group < 8 or group % 8)):
            raise self.refused(f"group_size={group!r} must be -1 (all inputs) or a multiple of 8")
        return None if group == -1 else group

    def nothing(self, name: str, instead: str) -> None:
        """A field that must be absent, or empty."""
        value = self.take(name)
        if value:
            raise self.refused(f"{name}={value!r} is not supported; {instead}")

    @property
    def names_left(self) -> list[str]:
        """Names of the fields that no reader has taken."""
        return list(self._left)

    def inside(self, name: str) -> Fields | None:
        """A field that is an object."""
        value = self.take(name)
        return None if value is None else Fields(value, f"{self.where}.{name}")

    def leave(self, *names: str) -> None:
        """Fields that say how a checkpoint was made, and nothing about its numbers."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Refuse fields that no reader has taken."""
        if self._left:
            known = ", ".join(f"{name}={value!r}" for name, value in sorted(self._left.items()))
            away: Mapping[str, Any] = dict.fromkeys(sorted(self._left))
            for name in reversed(self.where.split(".")):
                away = {name: away}
            raise self.refused(
                f"{known} is not known, and may change what the weights mean; if it does not, take "
                f"it away: hf_overrides={away}"
            )

    def refused(self, why: str) -> ModelError:
        return ModelError(f"{self.where}: {why}")


def check_cache_scheme(fields: Fields) -> None:
    """Refuse a ``kv_cache_scheme`` that asks for another cache than ``kv_cache_dtype="fp8"`` is."""
    scheme = fields.inside("kv_cache_scheme")
    if scheme is None:
        return
    scheme.require("type", "float", default="int")  # as compressed-tensors reads it
    scheme.require("num_bits", 8, default=8)
    scheme.require("symmetric", True, default=True)
    one = "calibrate one scale for all keys and one for all values of a layer, or none"
    scheme.require("strategy", "tensor", default="tensor", instead=one)
    scheme.leave("dynamic", "observer", "observer_kwargs", "actorder", "group_size",
                 "block_structure", "scale_dtype", "zp_dtype")  # fmt: skip
    scheme.end()


def chosen_modules(fields: Fields) -> list[str] | None:
    """Those that are quantised, by ``modules_in_block_to_quantize``; None: all."""
    value = fields.take("modules_in_block_to_quantize", [])
    groups = value if isinstance(value, list) else [value]
    names = [name for each in groups for name in (each if isinstance(each, list) else [each])]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in names):
        raise fields.refused(
            f"modules_in_block_to_quantize={value!r} must be lists of names of modules"
        )
    return names or None


class AllBut:
    """One format for all products but some, whose weights are plain.

    Args:
        format: Of the others.
        plain: Says by its path whether a product is plain.
    """

    def __init__(self, format: Format, plain: Callable[[str], bool]) -> None:
        self._format, self._plain = format, plain

    def of(self, path: str) -> Format:
        return DENSE if self._plain(path) else self._format


def is_head(path: str) -> bool:
    """Whether it is the language-model head, which most methods leave plain."""
    return path.rpartition(".")[2] == "lm_head"


def is_router(path: str) -> bool:
    """Whether it sends rows to experts. The tools that leave routers plain without saying so know
    architectures by name."""
    return path.rpartition(".")[2] in ("gate", "shared_expert_gate")


def is_within(path: str, names: Sequence[str]) -> bool:
    """Whether a module has one of these names, or lies in one that has, or some last or middle part
    of its path is one of them: ``mlp.gate`` and ``model.layers.3`` both have
    ``model.layers.3.mlp.gate``, and ``mlp.gate`` does not have ``mlp.gate_proj``."""
    whole = f".{path}."
    return any(f".{each}." in whole for each in names)


def stays_plain(fields: Fields) -> Callable[[str], bool]:
    """Read which products are quantised: what is returned says by its path whether one is plain.

    Raises:
        As methods of ``fields``.
    """
    head = fields.require("lm_head", True, False, default=False)
    fields.nothing("dynamic", "all products must be quantised alike")
    plain, only = fields.names("modules_to_not_convert"), chosen_modules(fields)

    def is_plain(path: str) -> bool:
        if is_head(path):
            return not head
        return (
            is_router(path)
            or is_within(path, plain)
            or (only is not None and not is_within(path, only))
        )

    return is_plain

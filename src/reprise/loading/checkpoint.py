"""Find a checkpoint and read what describes it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprise.errors import LoadError, ModelError
from reprise.loading.tokenizer import load_tokenizer

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"


@dataclass(frozen=True)
class Checkpoint:
    """A directory in Hugging Face format."""

    path: Path
    config: Any
    """transformers' ``PretrainedConfig``."""
    generation_config: Mapping[str, Any]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation, by the generation config and the model's config."""
        ids: set[int] = set()
        for value in (self.generation_config.get("eos_token_id"), self.config.eos_token_id):
            ids.update([value] if isinstance(value, int) else value or ())
        return frozenset(ids)

    def tokenizer(self, name: str | None = None, revision: str | None = None) -> Any:
        """transformers' tokenizer of this checkpoint, or of the directory or id ``name``.

        Raises:
            ModelError: There is none; the message tells how to go without.
        """
        source = name or str(self.path)
        try:
            path = _locate(name, revision, config_only=True) if name else self.path
            return load_tokenizer(path.parent if path.is_file() else path)
        except Exception as error:  # transformers raises many types for a missing tokenizer
            missing = _is_path(source) and not Path(source).expanduser().exists()
            reason = "no such directory" if missing else f"{type(error).__name__}: {error}"
            raise ModelError(
                f"no tokenizer in {source!r} ({reason}); give tokenizer=, "
                "or skip_tokenizer_init=True and prompts as token ids"
            ) from error


def open_checkpoint(
    model: str | None,
    *,
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    config_only: bool = False,
) -> Checkpoint:
    """Open a local directory, a hub id, or (None) the bundled demo model.

    Args:
        model: Directory, config file, or hub id.
        revision: Of a hub id.
        overrides: Fields of the config to replace.
        config_only: Do not download weights.

    Raises:
        ModelError: Not found, or its config cannot be read.
    """
    path = DEMO_MODEL if model is None else _locate(model, revision, config_only)
    if path.is_file():
        path = path.parent
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"model={str(path)!r} has no config.json: it is no checkpoint")
    return Checkpoint(path, _read_config(config_file, overrides or {}), _generation_config(path))


def _is_path(name: str) -> bool:
    """It cannot be a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _locate(model: str, revision: str | None, config_only: bool) -> Path:
    local = Path(model).expanduser()
    if local.exists():
        return local
    if _is_path(model):
        raise ModelError(f"model={model!r}: no such directory")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    if not config_only:
        patterns.append("*.safetensors")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                # The same weights once more, in the formats of other tools. Further chat templates
                # lie in a folder too.
                ignore_patterns=[
                    "consolidated*",
                    *(f"*/{each}" for each in patterns if each != "*.jinja"),
                ],
            )
        )
    except Exception as error:  # the hub client raises network and HTTP errors of many types
        raise ModelError(
            f"model={model!r} is neither a local directory nor a model that could be fetched from "
            f"the Hugging Face hub ({type(error).__name__}: {error})"
        ) from error


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


def _read_config(file: Path, overrides: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        raw = _read_object(file)
    except ValueError as error:
        raise ModelError(f"{file} is not valid: {error}") from error
    kind = raw.pop("model_type", None)
    if not isinstance(kind, str):
        raise ModelError(f"{file} names no model_type; is it a model's config?")
    raw.update(overrides)
    try:
        with _without_docstrings():
            return AutoConfig.for_model(kind, **raw)
    except Exception as error:  # transformers validates fields with errors of many types
        named = raw.get("architectures") or kind
        raise ModelError(f"{file}: cannot read the config of {named}: {error}") from error


def _generation_config(path: Path) -> Mapping[str, Any]:
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return _read_object(file)
    except ValueError as error:
        raise LoadError(f"{file} is not valid: {error}") from error


def _read_object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, not {content!r}")
    return content

"""Find a checkpoint and read what describes it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprise.config import EngineConfig
from reprise.errors import ModelError
from reprise.loading.chat_encoder import FILE as ENCODER
from reprise.loading.foreign import foreign_content
from reprise.loading.generation_config import read_generation_config
from reprise.loading.hf_config import read_config
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
            path = locate(name, revision, config_only=True) if name else self.path
            return load_tokenizer(path.parent if path.is_file() else path)
        except Exception as error:  # transformers raises many types for a missing tokenizer
            missing = _is_path(source) and not Path(source).expanduser().exists()
            reason = (
                f"no such directory{_similar(source)}"
                if missing
                else f"{type(error).__name__}: {error}"
            )
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
    path = DEMO_MODEL if model is None else locate(model, revision, config_only)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ModelError(
            f"model={str(path)!r} is no directory and no config.json"
            f"{_in_brackets(foreign_content(path))}; give the checkpoint's directory"
        )
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"model={str(path)!r} has no config.json: it is no checkpoint"
            f"{_in_brackets(foreign_content(path))}"
        )
    return Checkpoint(path, read_config(config_file, overrides or {}), read_generation_config(path))


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _is_path(name: str) -> bool:
    """Whether the name cannot be a hub id, or is hardly one: the directory that it would be in is
    here."""
    if name.startswith((".", "/", "~")) or name.endswith(("/", *_FILES)) or name.count("/") > 1:
        return True
    return "\\" in name or ("/" in name and Path(name).parent.is_dir())


_FILES = (".json", ".safetensors", ".bin", ".gguf")


def _similar(name: str) -> str:
    """A hint at a directory or file here whose name is nearly this one, or nothing."""
    path = Path(name).expanduser()
    with contextlib.suppress(OSError):
        known = [each.name for each in path.parent.iterdir()]
        found = difflib.get_close_matches(path.name, known, n=1)
        if found:
            return f"; did you mean {str(path.parent / found[0])!r}?"
    return ""


def locate(model: str, revision: str | None, config_only: bool) -> Path:
    """The directory or file that ``model`` names, or its files from the hub, as
    :func:`open_checkpoint` takes the arguments.

    Raises:
        ModelError: There is none.
    """
    try:
        local = Path(model).expanduser()
        if local.exists():
            return local
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, no such user
        raise ModelError(f"model={model!r} is no path: {error}") from error
    if _is_path(model):
        raise ModelError(f"model={model!r}: no such directory{_similar(model)}")
    from huggingface_hub import snapshot_download

    within = ["*.jinja", ENCODER.as_posix()]
    """Further chat templates, and what stands for one, lie in folders."""
    patterns = ["*.json", "*.txt", "*.model", *within]
    if not config_only:
        patterns.append("*.safetensors")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                # The same weights once more, in the formats of other tools.
                ignore_patterns=[
                    "consolidated*",
                    *(f"*/{each}" for each in patterns if each not in within),
                ],
            )
        )
    except Exception as error:  # the hub client raises network and HTTP errors of many types
        raise ModelError(
            f"model={model!r} is neither a local directory nor a model that could be fetched from "
            f"the Hugging Face hub ({type(error).__name__}: {error}){_similar(model)}"
        ) from error


def checkpoint_of(config: EngineConfig) -> Checkpoint:
    """The model's files, not read yet.

    Raises:
        RepriseError: They are not found, or not a model that is known.
    """
    return open_checkpoint(
        config.model,
        revision=config.revision,
        overrides=config.hf_overrides,
        config_only=config.load_format == "dummy",
    )

"""A checkpoint's tokenizer: the file ``tokenizer.json``, and what the files beside it say of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.arguments import shown
from reprise.loading.chat_encoder import encoder_texts
from reprise.loading.files import read_object
from reprise.loading.json_tokenizer import JsonTokenizer, read_backend

logger = logging.getLogger(__name__)

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory: transformers', or what stands for it.

    ``tokenizer.json`` alone decides the ids, as the ``tokenizers`` library reads it: transformers
    builds pipelines anew from the name of a class, which many checkpoints have wrong.

    Raises:
        Exception: Of many types, if the files are missing or spoiled.
    """
    if (path / "tokenizer.json").is_file():
        found = _of_tokenizer_json(path)
    else:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(path))
        # That is what transformers makes of a directory without a tokenizer's files.
        if len(found) <= len(set(found.all_special_ids)):
            raise FileNotFoundError("it would know special tokens alone")
        # The first call may change the tokenizer, which no thread may do while others use it.
        found.encode("")
    return found


def end_of_text_id(tokenizer: Any) -> int | None:
    """The id of the tokenizer's ``eos_token``, if it has both."""
    token = getattr(tokenizer, "eos_token", None)
    if token is None:
        return None
    found = tokenizer.convert_tokens_to_ids(token)
    # An unknown name has the id of the token for unknown text.
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def _of_tokenizer_json(path: Path) -> JsonTokenizer:
    file = path / "tokenizer.json"
    backend = read_backend(file)
    config = _read(path / "tokenizer_config.json")
    names = _read(path / "special_tokens_map.json")
    # As transformers has it: the older file counts unless the newer one lists all tokens.
    settings = {**names, **config} if "added_tokens_decoder" in config else {**config, **names}
    template = _chat_template(path, config)
    return JsonTokenizer(
        file,
        backend,
        _special_tokens(settings, backend),
        {name: settings[name] for name in _SETTINGS if settings.get(name) is not None},
        template,
        encoder_texts(path) if template is None else None,
    )


def _special_tokens(settings: Mapping[str, Any], backend: Any) -> dict[str, Any]:
    """The roles of special tokens, without those that ``tokenizer.json`` does not have."""
    missing: list[str] = []

    def known(value: Any) -> str | None:
        token = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(token, str):
            raise ValueError(f"special token {value!r}: a string is expected")
        if backend.token_to_id(token) is not None:
            return token
        missing.append(token)
        return None

    named = {name: known(settings[name]) for name in _NAMED if settings.get(name) is not None}
    extra = [settings.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    others = [each for group in extra if isinstance(group, list) for each in group]
    # Names that a model's own templates use, such as image_token.
    own = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str | Mapping)
    }
    for group in extra:
        own |= group if isinstance(group, Mapping) else {}
    found = {
        **named,
        "extra_special_tokens": [each for each in map(known, others) if each is not None],
        "model_specific_special_tokens": {
            name: token for name, value in own.items() if (token := known(value)) is not None
        },
    }
    if missing:
        logger.warning(
            "special tokens %s are dropped: tokenizer.json does not have them",
            list(dict.fromkeys(missing)),
        )
    return found


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name. Files of their own come before older places."""
    template = _stated_template(config)
    if template is None:
        template = _stated_template(_read(path / "chat_template.json"))
    files = {each.stem: each for each in (path / "additional_chat_templates").glob("*.jinja")}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if set(named) == {"default"}:
        return named["default"]
    return named or template


def _stated_template(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """What a JSON file says, where several are a list or an object."""
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    if not isinstance(template, dict) or not all(isinstance(v, str) for v in template.values()):
        raise ValueError(f"chat_template={shown(template)}: a text, or texts by name, are expected")
    return template


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error

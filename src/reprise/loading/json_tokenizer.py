"""A tokenizer of which ``tokenizer.json`` says everything that an engine asks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reprise.errors import ModelError
from reprise.loading.chat_encoder import EncoderTexts
from reprise.loading.files import require_regular

LONG = 1 << 11
"""Characters or tokens, from which on the library is given a batch of one: it lets other threads
have the interpreter for a batch alone, and for one text holds all of them up to its end."""


class JsonTokenizer:
    """What the engine asks of transformers' tokenizer, answered by the ``tokenizers`` library
    alone: importing transformers takes longer than a small model takes to answer.

    Whatever else is asked transformers' tokenizer answers, which is made when it is first needed.

    Args:
        file: A ``tokenizer.json``.
        backend: What :func:`read_backend` made of it.
        special_tokens: As ``PreTrainedTokenizerFast`` takes them: roles by name,
            ``extra_special_tokens`` and ``model_specific_special_tokens``.
        settings: Other arguments of that class.
        chat_template: One, or several by name.
        encoder_texts: What makes prompts of conversations in place of one.
    """

    def __init__(
        self,
        file: Path,
        backend: Any,
        special_tokens: Mapping[str, Any],
        settings: Mapping[str, Any],
        chat_template: str | dict[str, str] | None,
        encoder_texts: EncoderTexts | None = None,
    ) -> None:
        self._file = file
        self._special_tokens = special_tokens
        self._settings = settings
        self._lock = threading.Lock()
        self._made: Any = None
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.encoder_texts = encoder_texts

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @functools.cached_property
    def special_tokens_map(self) -> dict[str, str]:
        """Special tokens by their roles."""
        named = {
            name: token for name, token in self._special_tokens.items() if isinstance(token, str)
        }
        return {**named, **self._special_tokens["model_specific_special_tokens"]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        backend = self.backend_tokenizer
        if len(text) < LONG:
            found = backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            (found,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        ids, backend = list(token_ids), self.backend_tokenizer
        if len(ids) < LONG:
            return str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
        return str(backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(each) for each in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        found: int | None = self.backend_tokenizer.token_to_id(token)
        if found is None and "unk_token" in self.special_tokens_map:
            found = self.backend_tokenizer.token_to_id(self.special_tokens_map["unk_token"])
        return found

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The template itself, or one of the tokenizer's by name; None: the one for such tools.

        Raises:
            ValueError: There is none.
        """
        known = self.chat_template
        if not isinstance(known, dict):
            known = {} if known is None else {"default": known}
            if chat_template is not None:
                return chat_template
        if chat_template is not None:
            return known.get(chat_template, chat_template)
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in known:
                return known[name]
        if known:
            raise ValueError(f"it has several, give the name of one: {', '.join(sorted(known))}")
        raise ValueError("its files have none")

    def as_transformers(self) -> Any:
        """transformers' tokenizer, for callers of their own: what they set there changes nothing
        here.

        Raises:
            ModelError: transformers does not take its files.
        """
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> Any:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        try:
            found = PreTrainedTokenizerFast(
                # The class adds tokens to what it is given, so it gets the real one afterwards.
                tokenizer_object=Tokenizer(BPE()),
                **self._special_tokens,
                **self._settings,
                chat_template=self.chat_template,
                # Of text that tokenizer.json decodes; it would drop spaces.
                clean_up_tokenization_spaces=False,
            )
        except Exception as error:  # of many types
            raise ModelError(f"{self._file.parent}: transformers refuses it: {error}") from error
        found._tokenizer = read_backend(self._file)
        found.name_or_path = str(self._file.parent)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of Python's own protocols
            raise AttributeError(name)
        return getattr(self.as_transformers(), name)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))


def read_backend(file: Path) -> Any:
    """The ``tokenizers`` library's tokenizer of a ``tokenizer.json``.

    Raises:
        Exception: Of many types, if it is none.
    """
    from tokenizers import Tokenizer

    require_regular(file)

    backend = Tokenizer.from_file(str(file))
    # Left behind by training; a prompt is neither cut nor filled.
    backend.no_truncation()
    backend.no_padding()
    return backend


def as_transformers(tokenizer: Any) -> Any:
    """transformers' tokenizer of what the engine has."""
    return tokenizer.as_transformers() if isinstance(tokenizer, JsonTokenizer) else tokenizer

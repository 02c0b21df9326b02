"""A tokenizer as xgrammar wants to know it."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from reprise.errors import RequestError, describe
from reprise.loading import as_transformers

INSTALL = "pip install 'reprise[structured]'"


def installed() -> bool:
    """Whether grammars can be compiled here."""
    return importlib.util.find_spec("xgrammar") is not None


def token_infos(tokenizer: Any, vocab_size: int, stop_token_ids: frozenset[int]) -> tuple[Any, Any]:
    """xgrammar's ``TokenizerInfo``: one by which special tokens are no text, since they are left
    out of a request's text; and one by which they are, for formats that are made of them.

    Raises:
        RequestError: xgrammar is not installed, does not import, or cannot read the tokenizer.
    """
    try:
        import xgrammar
    except Exception as error:  # its libraries may be of another machine
        raise RequestError(
            f"structured_outputs needs the package xgrammar ({describe(error)}): {INSTALL}"
        ) from error
    stops = sorted(stop_token_ids)
    transformers = as_transformers(tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = xgrammar.TokenizerInfo.from_huggingface(
                transformers, vocab_size=vocab_size, stop_token_ids=stops or None
            )
        tokens = [""] * vocab_size
        for token, number in transformers.get_vocab().items():
            if number < vocab_size:
                tokens[number] = token
        special = {each for each in transformers.all_special_ids if each < vocab_size}
        added = getattr(transformers, "added_tokens_decoder", {})
        special |= {number for number, each in added.items() if each.special}

        def info(without: set[int]) -> Any:
            return xgrammar.TokenizerInfo(
                ["" if number in without else each for number, each in enumerate(tokens)],
                vocab_type=found.vocab_type,
                vocab_size=vocab_size,
                stop_token_ids=stops or None,
                add_prefix_space=found.add_prefix_space,
            )

        return info(special), info(set())
    except Exception as error:  # of many types
        raise RequestError(
            f"structured_outputs: xgrammar cannot read this model's tokenizer ({error})"
        ) from error

"""Text that grows a token at a time, against decoding everything at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers import byte_level_tokenizer
from hypothesis import example, given

from reprise.engine.detokenizer import Detokenizer
from reprise.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
SPECIAL = 0

# At the end of a text the replacement character itself is held back like half a character.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT)
TEXTS = st.text(
    st.one_of(CHARACTERS, st.sampled_from("aeé漢字👍🏽\u200d \n")),
    max_size=40,
)
STOPS = st.lists(st.text("ab漢👍 ", min_size=1, max_size=3), min_size=1, max_size=3)
STOPPABLE = st.text("ab漢👍 ", max_size=30)


@functools.cache
def byte_level() -> Any:
    return byte_level_tokenizer()


@functools.cache
def byte_fallback() -> Any:
    """As SentencePiece models have it: words begin with a lower one eighth block."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "e", "b", "▁a", "é", "▁b", "ab", "👍"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@functools.cache
def pieces(tokenizer: Any) -> dict[bytes, int]:
    """The bytes of each token of the byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    return {
        bytes(to_byte[character] for character in piece): index
        for piece, index in tokenizer.get_vocab().items()
        if index not in tokenizer.all_special_ids
    }


@st.composite
def cut_anywhere(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> tuple[str, list[int]]:
    """A text and tokens that spell it, though the tokenizer might have chosen others."""
    text = draw(texts)
    rest, ids = text.encode(), list[int]()
    known = pieces(byte_level())
    longest = max(map(len, known))
    while rest:
        fitting = [n for n in range(1, min(longest, len(rest)) + 1) if rest[:n] in known]
        length = draw(st.sampled_from(fitting))
        ids.append(known[rest[:length]])
        rest = rest[length:]
    return text, ids


def feed(
    tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = (), **params: Any
) -> tuple[list[str], Detokenizer]:
    """The text after each token."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**params))
    states = []
    for token_id in ids:
        assert detokenizer.append([token_id]) is None
        states.append(detokenizer.text)
    return states, detokenizer


def check_growth(states: list[str], expected: str) -> None:
    for earlier, later in zip(["", *states], states, strict=False):
        assert later.startswith(earlier)
    assert (states[-1] if states else "") == expected
    assert not any(REPLACEMENT in each for each in states)


@given(text=TEXTS, prompt=TEXTS)
@example(text="漢字" * 12, prompt="漢")
def test_tokenized_text(text: str, prompt: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    states, _ = feed(tokenizer, ids, tokenizer.encode(prompt))
    assert tokenizer.decode(ids) == text
    check_growth(states, text)


@given(case=cut_anywhere())
def test_characters_cut_anywhere(case: tuple[str, list[int]]) -> None:
    text, ids = case
    states, _ = feed(byte_level(), ids)
    check_growth(states, text)
    # As early as possible: only the bytes of the last character are held back.
    for count, state in enumerate(states, 1):
        assert state == byte_level().decode(ids[:count]).rstrip(REPLACEMENT)


@given(text=TEXTS.map(str.strip), prompt=st.sampled_from(["", "a", " b", "👍"]))
def test_byte_fallback(text: str, prompt: str) -> None:
    """Each byte of a rare character is a token; the first word's space is not text."""
    tokenizer = byte_fallback()
    text = text.replace("▁", "_")
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)[len(before) :]
    states, _ = feed(tokenizer, ids, before)
    check_growth(states, tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :])


@given(ids=st.lists(st.integers(0, 339), max_size=60))
def test_any_tokens(ids: list[int]) -> None:
    """Invalid text grows too, is never revised and never gets stuck."""
    states, _ = feed(byte_level(), ids)
    for earlier, later in zip(["", *states], states, strict=False):
        assert later.startswith(earlier)
    for count in range(12, len(ids) + 1):
        if byte_level().decode(ids[count - 12 : count], skip_special_tokens=True):
            assert states[count - 1] != (states[count - 13] if count > 12 else "")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(cut=st.integers(0, 10), count=st.integers(1, 3), skip=st.booleans())
def test_special_tokens(make: Any, cut: int, count: int, skip: bool) -> None:
    tokenizer = make()
    ids = tokenizer.encode("ab a b ab")
    ids[cut:cut] = [SPECIAL] * count
    states, _ = feed(tokenizer, ids, tokenizer.encode("a"), skip_special_tokens=skip)
    before = tokenizer.encode("a")
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=skip)
    check_growth(states, whole[len("a") :])


@given(case=cut_anywhere(STOPPABLE), stops=STOPS, include=st.booleans(), minimum=st.integers(0, 9))
def test_stop_strings(
    case: tuple[str, list[int]], stops: list[str], include: bool, minimum: int
) -> None:
    _, ids = case
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=minimum, max_tokens=None
    )
    detokenizer = Detokenizer(byte_level(), [], params)
    before = ""
    for count in range(1, len(ids) + 1):
        found = detokenizer.append([ids[count - 1]])
        text = byte_level().decode(ids[:count]).rstrip(REPLACEMENT)
        expected = naive_stop(text, len(before), stops) if count >= minimum else None
        if expected is None:
            assert found is None
            assert detokenizer.text == text
            # What a stream has shown is never taken back.
            shown = text[: detokenizer.stable_length(finished=False)]
            assert include or not any(stop in shown for stop in stops if minimum == 0)
        else:
            position, stop = expected
            assert found == stop
            assert detokenizer.text == text[: position + (len(stop) if include else 0)]
            return
        before = text


def naive_stop(text: str, num_old: int, stops: list[str]) -> tuple[int, str] | None:
    """The first occurrence of a stop string that ends behind the first ``num_old`` characters."""
    for position in range(len(text)):
        for stop in stops:
            if text.startswith(stop, position) and position + len(stop) > num_old:
                return position, stop
    return None


@given(case=cut_anywhere(STOPPABLE), stops=STOPS)
def test_streams_show_no_part_of_a_stop_string(
    case: tuple[str, list[int]], stops: list[str]
) -> None:
    _, ids = case
    detokenizer = Detokenizer(byte_level(), [], SamplingParams(stop=stops))
    shown = ""
    for token_id in ids:
        found = detokenizer.append([token_id])
        now = detokenizer.text[: detokenizer.stable_length(finished=found is not None)]
        assert now.startswith(shown)
        shown = now
        if found is not None:
            break
    assert detokenizer.text[: detokenizer.stable_length(finished=True)].startswith(shown)


def test_many_tokens_at_once_are_as_one_by_one() -> None:
    ids = byte_level().encode("Once upon a time, 漢字 👍🏽 END of it")
    params = SamplingParams(stop=["END"])
    at_once = Detokenizer(byte_level(), [], params)
    assert at_once.append(ids) == "END"
    assert at_once.text == "Once upon a time, 漢字 👍🏽 "

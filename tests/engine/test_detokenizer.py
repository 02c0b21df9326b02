"""Text that grows a token at a time, against decoding everything at once."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers import byte_level_tokenizer
from hypothesis import example, given

from reprise.engine.detokenizer import UNFINISHED, Detokenizer, TokenTexts
from reprise.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
SPECIAL = 0

CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from("aeé漢字👍🏽\u200d \n\ufffd")
)
TEXTS = st.text(CHARACTERS, max_size=40)
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
) -> list[str]:
    """The text after each token, and at last the whole text."""
    detokenizer = Detokenizer(TokenTexts(tokenizer), prompt, SamplingParams(**params))
    states = []
    for token_id in ids:
        assert detokenizer.append([token_id]) is None
        states.append(detokenizer.text)
    assert detokenizer.finish() is None
    assert detokenizer.finish() is None
    return [*states, detokenizer.text]


def library(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = (), **options: Any) -> str:
    """What the library makes of all ids, behind what it makes of the prompt's.

    A character that the prompt begins belongs to the ids that complete it.
    """
    decode = tokenizer.backend_tokenizer.decode
    before, whole = (decode(each, **options) for each in ([*prompt], [*prompt, *ids]))
    while not whole.startswith(before):
        assert before.endswith(REPLACEMENT)
        before = before[:-1]
    return whole[len(before) :]


def check_growth(states: list[str], expected: str) -> None:
    for earlier, later in itertools.pairwise(["", *states]):
        assert later.startswith(earlier)
    assert states[-1] == expected


@given(
    ids=st.lists(st.integers(0, 345), max_size=60), prompt=st.lists(st.integers(0, 339)),
    skip=st.booleans(), stops=st.sampled_from([(), ("a",)]),
)  # fmt: skip
def test_tokens_that_are_added_write_what_they_do_when_they_are_appended(
    ids: list[int], prompt: list[int], skip: bool, stops: tuple[str, ...]
) -> None:
    params = SamplingParams(skip_special_tokens=skip, stop=list(stops))
    texts = TokenTexts(byte_level())
    one, other = (Detokenizer(texts, prompt, params) for _ in range(2))
    added = 0
    for token in ids:
        expected, before = one.append([token]), other.text
        if other.add(token):
            added += 1
            assert not stops
            assert expected is None
        else:
            assert other.text == before
            assert other.append([token]) == expected
        assert one.text == other.text
        if expected is not None:
            return
    whole = [each for each in ids if texts.whole(each, skip)]
    assert added <= len(whole)
    assert stops or added > 0 or len(whole) < len(ids) or not ids
    assert one.finish() == other.finish()
    assert one.text == other.text


def test_a_token_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is asked of it, in whatever texts it comes."""
    texts, asked = TokenTexts(byte_level()), list[Any]()

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(byte_level().backend_tokenizer, name)

    monkeypatch.setattr(texts, "_backend", Asked())
    for number in range(3):
        text = Detokenizer(texts, [], SamplingParams())
        assert all(text.add(each) for each in byte_level().encode("ab ab"))
        assert text.text == "ab ab"
        assert asked == ["decode"] * len({*byte_level().encode("ab ab")}), number


@given(text=TEXTS, prompt=TEXTS)
@example(text="漢字" * 12, prompt="漢")
@example(text="a\ufffd", prompt="\ufffd")
def test_tokenized_text(text: str, prompt: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    check_growth(feed(tokenizer, ids, tokenizer.encode(prompt)), text)


@given(case=cut_anywhere())
def test_characters_cut_anywhere(case: tuple[str, list[int]]) -> None:
    text, ids = case
    states = feed(byte_level(), ids)
    check_growth(states, text)
    # As early as possible: only what may be the bytes of the last character is held back.
    for count, state in enumerate(states[:-1], 1):
        so_far = byte_level().decode(ids[:count])
        assert so_far.rstrip(REPLACEMENT) == state.rstrip(REPLACEMENT)
        assert len(so_far) - len(state) <= UNFINISHED


@given(
    text=TEXTS.map(str.strip),
    prompt=st.one_of(st.sampled_from(["", "a", " b", "👍", "🎉🎉", "é" * 40]), TEXTS),
)
@example(text="👍", prompt="🎉🎉")
@example(text="🎉" * 30 + "é" * 30, prompt="a🎉🎉")
@example(text="\ufffd\u2028 漢", prompt="")
@example(text="\ufffd\ufffd漢\ufffd🎉", prompt="漢")
def test_byte_fallback(text: str, prompt: str) -> None:
    """Each byte of a rare character is a token; the first word's space is not text."""
    tokenizer = byte_fallback()
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)[len(before) :]
    check_growth(feed(tokenizer, ids, before), library(tokenizer, ids, before))


@given(
    ids=st.lists(st.integers(0, 339), max_size=60), prompt=st.lists(st.integers(0, 339)),
    skip=st.booleans(),
)  # fmt: skip
@example(ids=[*range(130, 200)], prompt=[130, 131], skip=True)
def test_any_tokens(ids: list[int], prompt: list[int], skip: bool) -> None:
    """Invalid text grows too, is never revised and never gets stuck."""
    states = feed(byte_level(), ids, prompt, skip_special_tokens=skip)
    check_growth(states, library(byte_level(), ids, prompt, skip_special_tokens=skip))
    for count, state in enumerate(states[:-1], 1):
        so_far = library(byte_level(), ids[:count], prompt, skip_special_tokens=skip)
        assert len(so_far) - len(state) <= UNFINISHED


@given(
    ids=st.lists(st.integers(0, 266), max_size=60),
    prompt=st.lists(st.integers(0, 266)),
    skip=st.booleans(),
)
def test_any_byte_tokens(ids: list[int], prompt: list[int], skip: bool) -> None:
    """One wrong byte spoils its neighbours, but not what is out, and not what comes later."""
    tokenizer = byte_fallback()
    after = tokenizer.convert_tokens_to_ids(["▁a", "ab", "<0xC3>", "<0xA9>", "▁b"])
    states = feed(tokenizer, [*ids, *after], prompt, skip_special_tokens=skip)
    check_growth(states, states[-1])
    assert states[-1].endswith("aabé b")
    whole = tokenizer.backend_tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    if REPLACEMENT not in whole:
        expected = library(tokenizer, ids, prompt, skip_special_tokens=skip)
        check_growth(feed(tokenizer, ids, prompt, skip_special_tokens=skip), expected)


WORDS = ["<eos>", "<unk>", "▁", "▁a", "a", "##a", "b</w>", "</w>", "c", "▁▁", "."]


@functools.cache
def words(kind: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    decoder = {
        "none": None,
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
        "suffix": decoders.BPEDecoder(),
    }[kind]
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("kind", ["none", "metaspace", "wordpiece", "suffix"])
@given(
    ids=st.lists(st.integers(0, len(WORDS) + 3), max_size=40),
    prompt=st.lists(st.integers(0, len(WORDS) + 3), max_size=20),
    skip=st.booleans(),
)
def test_other_decoders(kind: str, ids: list[int], prompt: list[int], skip: bool) -> None:
    """Also ids that the tokenizer does not have, for a model may have more."""
    states = feed(words(kind), ids, prompt, skip_special_tokens=skip)
    check_growth(states, library(words(kind), ids, prompt, skip_special_tokens=skip))


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(cut=st.integers(0, 10), count=st.integers(1, 80), skip=st.booleans(), before=st.booleans())
def test_special_tokens(make: Any, cut: int, count: int, skip: bool, before: bool) -> None:
    tokenizer = make()
    prompt = tokenizer.encode("a")
    ids = tokenizer.encode("ab a b ab")
    if before:
        prompt += [SPECIAL] * count
    else:
        ids[cut:cut] = [SPECIAL] * count
    expected = library(tokenizer, ids, prompt, skip_special_tokens=skip)
    check_growth(feed(tokenizer, ids, prompt, skip_special_tokens=skip), expected)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(data=st.data())
def test_texts_of_tokens(make: Any, data: st.DataObject) -> None:
    """Those of a text's tokens, one after the other, are the text."""
    tokenizer = make()
    ids = tokenizer.encode(data.draw(st.text("ab e", max_size=12)))
    texts = TokenTexts(tokenizer)
    joined = "".join(map(texts.of, ids))
    assert tokenizer.decode(ids) in (joined, joined.removeprefix(" "))
    assert texts.of(SPECIAL) == "<eos>"


def test_texts_of_tokens_keep_their_space() -> None:
    tokenizer = byte_fallback()
    texts = TokenTexts(tokenizer)
    named = {token: texts.of(tokenizer.convert_tokens_to_ids(token)) for token in ("▁a", "a", "▁")}
    assert named == {"▁a": " a", "a": "a", "▁": " "}
    assert texts.of(tokenizer.convert_tokens_to_ids("<0xC3>")) == REPLACEMENT


@given(case=cut_anywhere(STOPPABLE), stops=STOPS, include=st.booleans(), minimum=st.integers(0, 9))
def test_stop_strings(
    case: tuple[str, list[int]], stops: list[str], include: bool, minimum: int
) -> None:
    _, ids = case
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=minimum, max_tokens=None
    )
    detokenizer = Detokenizer(TokenTexts(byte_level()), [], params)
    before = ""
    for count in range(1, len(ids) + 1):
        found = detokenizer.append([ids[count - 1]])
        text = byte_level().decode(ids[:count]).rstrip(REPLACEMENT)  # STOPPABLE has none
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
    """The stop string that is complete first behind the first ``num_old`` characters, as if each
    character came alone; of two at once the longer one."""
    for end in range(num_old + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


@pytest.mark.parametrize("stops", [["cat", "a"], ["a", "cat"], ["a c", "a"], ["at"]])
def test_one_token_completes_two_stop_strings(stops: list[str]) -> None:
    ids = byte_level().encode("The cat")
    assert byte_level().decode(ids[-1:]) == " cat"
    detokenizer = Detokenizer(TokenTexts(byte_level()), [], SamplingParams(stop=stops))
    assert detokenizer.append(ids) == next(each for each in ("a", "at") if each in stops)
    assert detokenizer.text == "The c"


@given(case=cut_anywhere(STOPPABLE), stops=STOPS)
def test_streams_show_no_part_of_a_stop_string(
    case: tuple[str, list[int]], stops: list[str]
) -> None:
    _, ids = case
    detokenizer = Detokenizer(TokenTexts(byte_level()), [], SamplingParams(stop=stops))
    shown = ""
    for token_id in ids:
        found = detokenizer.append([token_id])
        now = detokenizer.text[: detokenizer.stable_length(finished=found is not None)]
        assert now.startswith(shown)
        shown = now
        if found is not None:
            break
    assert detokenizer.text[: detokenizer.stable_length(finished=True)].startswith(shown)


def test_thousands_of_stop_strings_are_looked_for_as_fast_as_one() -> None:
    """All requests wait for a step's texts."""
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("abc de" * 100)

    def seconds(stops: list[str]) -> float:
        detokenizer = Detokenizer(texts, [], SamplingParams(stop=stops))
        detokenizer.append(ids)
        began = time.thread_time()
        for _ in range(5):
            assert detokenizer.append(ids) is None
        return time.thread_time() - began

    many = [f"{number} e" for number in range(100_000)]
    assert seconds(many) < 20 * seconds(["1 e"])


def test_many_tokens_at_once_are_as_one_by_one() -> None:
    ids = byte_level().encode("Once upon a time, 漢字 👍🏽 END of it")
    params = SamplingParams(stop=["END"])
    at_once = Detokenizer(TokenTexts(byte_level()), [], params)
    assert at_once.append(ids) == "END"
    assert at_once.text == "Once upon a time, 漢字 👍🏽 "


def test_tokens_of_whole_characters_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer whose text is its tokens' bytes; what a step costs follows from it."""
    text = "Once upon a time, "
    ids, texts = byte_level().encode(text), TokenTexts(byte_level())
    first, second = (Detokenizer(texts, ids[:1], SamplingParams()) for _ in range(2))
    assert first.append(ids * 4) is None

    def decode(*given: Any) -> str:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(texts, "decode", decode)
    assert second.append(ids * 4) is None
    assert first.text == second.text == text * 4

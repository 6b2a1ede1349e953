"""What tokenizers leave out is reported, and nothing else changes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepweave.compat.locks import LockedTokenizer
from stepweave.truncation.cuts import Cut
from stepweave.truncation.tokenizers import Reporter, listening
from tests.support.tokenizers import MAKERS

LIMIT = 16  # tokens
TEXT = "a large red circle  on a BLUE background, a large red circle on a blue background"
LONG = {"max_length": LIMIT, "truncation": True}


@functools.cache
def plain(kind: str) -> Any:
    return MAKERS[kind]()


def locked(kind: str) -> LockedTokenizer:
    return LockedTokenizer(plain(kind), threading.RLock(), Reporter(plain(kind), f"the {kind}"))


@pytest.fixture
def cuts() -> Iterator[list[Cut]]:
    found: list[Cut] = []
    with listening(cut=found.append):
        yield found


every_kind = pytest.mark.parametrize("kind", MAKERS)


@pytest.mark.parametrize(
    ("kind", "position"), [("clip", 63), ("qwen", 17), ("t5", 14), ("byt5", 15)]
)
def test_a_cut_says_where(kind: str, position: int, cuts: list[Cut]) -> None:
    """CLIP reads 14 words and signs; T5 an end token and marks of where words begin, too; the
    others are of bytes."""
    locked(kind)(["x", TEXT], padding=kind != "qwen", **LONG)
    assert cuts == [Cut(TEXT, 1, 2, "right", position, TEXT[position:], LIMIT, f"the {kind}")]


@every_kind
@settings(max_examples=100, deadline=None, database=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_every_cut_is_reported_and_the_output_is_the_tokenizers_own(
    kind: str, texts: list[str]
) -> None:
    tokenizer, found = plain(kind), []
    with listening(cut=found.append):
        output = locked(kind)(texts, **LONG)
    assert output == tokenizer(texts, **LONG)
    longer = [
        i
        for i, text in enumerate(texts)
        if len(tokenizer(text, verbose=False)["input_ids"]) > LIMIT
    ]
    assert [cut.index for cut in found] == longer
    for cut in found:
        assert cut.text == texts[cut.index]
        assert cut.tokens == LIMIT
        if cut.position is not None:
            assert 0 <= cut.position < len(cut.text)
            assert cut.left_out.strip() == cut.text[cut.position :].strip()
        assert cut.position is not None or not tokenizer.is_fast


@every_kind
def test_what_is_not_truncated_is_not_cut(kind: str, cuts: list[Cut]) -> None:
    """Pipelines tokenize once more without truncation, to log a warning of their own."""
    tokenizer = locked(kind)
    tokenizer([TEXT, "x"], padding="longest" if kind != "qwen" else False, verbose=False)
    tokenizer(TEXT, max_length=1000, truncation=True)
    tokenizer.encode(TEXT, verbose=False)
    assert tokenizer("x", **LONG) == plain(kind)("x", **LONG)
    assert cuts == []


def test_with_nobody_to_tell_nothing_is_tokenized_twice() -> None:
    for kind in MAKERS:
        with mock.patch.object(
            type(plain(kind)), "_encode_plus", autospec=True, side_effect=AssertionError
        ) as encode:
            with pytest.raises(AssertionError):
                locked(kind)(TEXT, **LONG)
        assert encode.call_count == 1
        encode = type(plain(kind))._encode_plus
        with mock.patch.object(
            type(plain(kind)), "_encode_plus", autospec=True, side_effect=encode
        ) as counted:
            locked(kind)(TEXT, **LONG)
            assert counted.call_count == 1
            with listening(cut=lambda cut: None):
                locked(kind)(TEXT, **LONG)
            assert counted.call_count == (2 if plain(kind).is_fast else 3)


def test_pairs_words_and_numbers_alone(cuts: list[Cut]) -> None:
    tokenizer = locked("clip")
    letters = " ".join("bcdefghijklmnopqrstuvwxyz")
    tokenizer("a", letters, **LONG)
    tokenizer([("a", letters)], max_length=LIMIT, truncation="only_second")
    tokenizer(["a"], [letters], **LONG)
    assert {(cut.text, cut.position, cut.count) for cut in cuts} == {(letters, 21, 1)}
    assert len(cuts) == 3
    cuts.clear()
    words = TEXT.split()
    tokenizer(words, is_split_into_words=True, **LONG)
    tokenizer([["a"], words], is_split_into_words=True, **LONG)
    assert [(cut.text, cut.index, cut.position) for cut in cuts] == [
        (" ".join(words), i, 62) for i in (0, 1)
    ]
    cuts.clear()
    for kind in MAKERS:
        assert locked(kind).encode(TEXT, **LONG) == plain(kind).encode(TEXT, **LONG)
    assert [cut.position for cut in cuts] == [63, 17, 14, 15]
    cuts.clear()
    tokenizer(TEXT, return_overflowing_tokens=True, **LONG)
    assert cuts == []


def test_a_character_of_many_tokens_is_left_out_whole(cuts: list[Cut]) -> None:
    locked("clip")("a red circle " + "🔴" * 6, **LONG)  # the limit goes through the third
    assert [(cut.position, cut.left_out) for cut in cuts] == [(15, "🔴" * 4)]


@pytest.mark.parametrize(("kind", "position"), [("clip", 12), ("byt5", 66)])
def test_tokenizers_that_cut_the_beginning(kind: str, position: int, cuts: list[Cut]) -> None:
    with mock.patch.object(plain(kind), "truncation_side", "left"):
        locked(kind)(TEXT, **LONG)
    plain(kind)("x", **LONG)  # a fast one keeps the side until the next call
    assert [(cut.side, cut.position, cut.left_out.strip()) for cut in cuts] == [
        ("left", position, TEXT[:position].strip())
    ]


@pytest.mark.parametrize("dictionary", [True, False])
def test_chats_are_cut_where_the_text_that_they_make_is(cuts: list[Cut], dictionary: bool) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    chat = [{"role": "user", "content": TEXT}]
    arguments = {"chat_template": template, "return_dict": dictionary}
    tokenizer, own = locked("clip"), plain("clip")
    for one in (chat, [chat, chat]):
        given = tokenizer.apply_chat_template(one, **LONG, **arguments)
        assert given == own.apply_chat_template(one, **LONG, **arguments)
    assert {(cut.text, cut.position) for cut in cuts} == {(f"[{TEXT}]", 66)}
    assert [(cut.index, cut.count) for cut in cuts] == [(0, 1), (0, 2), (1, 2)]
    tokenizer.apply_chat_template(chat, **arguments)
    tokenizer.apply_chat_template(chat, tokenize=False, **LONG, chat_template=template)
    assert len(cuts) == 3


def test_a_report_that_fails_leaves_the_output_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(cut: Cut) -> None:
        raise KeyError(cut.text)

    with listening(cut=fail):
        assert len(locked("clip")(TEXT, **LONG)["input_ids"]) == LIMIT
    assert "cannot check for truncation by the clip" in caplog.text


def test_reports_are_of_one_context(cuts: list[Cut]) -> None:
    thread = threading.Thread(target=lambda: locked("clip")(TEXT, **LONG))
    thread.start()
    thread.join()
    assert cuts == []

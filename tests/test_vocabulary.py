"""Agreeing tokenizers pass with padded vocabularies; disagreeing ones are refused by their first tokens."""

import pytest
from conftest import WORDS, make_tokenizer

from hpd_verl.vocabulary import shared_vocabulary_size


def test_padded_vocabularies_are_cut_to_the_shorter() -> None:
    tokenizer = make_tokenizer(WORDS)
    assert shared_vocabulary_size(tokenizer, tokenizer, len(WORDS) + 3, len(WORDS) + 9, "the models") == len(WORDS) + 3


def test_disagreeing_tokenizers_are_refused() -> None:
    other = [*WORDS[:9], *reversed(WORDS[9:])]
    with pytest.raises(ValueError, match=r"disagree at 20 token ids \(id 9: student '0', teacher '19'"):
        shared_vocabulary_size(make_tokenizer(WORDS), make_tokenizer(other), len(WORDS), len(WORDS), "the models")


def test_student_tokens_without_teacher_logits_are_refused() -> None:
    tokenizer = make_tokenizer(WORDS)
    with pytest.raises(ValueError, match="the student defines 4 tokens from id 25"):
        shared_vocabulary_size(tokenizer, tokenizer, len(WORDS), len(WORDS) - 4, "the models")

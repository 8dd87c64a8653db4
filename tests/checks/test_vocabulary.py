"""Agreeing tokenizers pass with padded vocabularies; disagreeing ones are refused by their first tokens."""

import pytest
from conftest import WORDS, make_tokenizer

from hpd_verl.checks.vocabulary import check_embedded, check_vocabularies


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "said"),
    [(3, 9, "the teacher's 38 logits"), (9, 3, "the student's last 6 logits (of 38)"), (9, 9, None)],
)
def test_padded_vocabularies_pass(
    student_size: int, teacher_size: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Of any two sizes; the log says what becomes of the logits that one of them lacks."""
    tokenizer = make_tokenizer(WORDS)
    check_vocabularies(tokenizer, tokenizer, len(WORDS) + student_size, len(WORDS) + teacher_size, "the models")
    assert said in caplog.text if said else not caplog.text


def test_disagreeing_tokenizers_are_refused() -> None:
    other = [*WORDS[:9], *reversed(WORDS[9:])]
    with pytest.raises(ValueError, match=r"disagree at 20 token ids \(id 9: student '0', teacher '19'"):
        check_vocabularies(make_tokenizer(WORDS), make_tokenizer(other), len(WORDS), len(WORDS), "the models")


def test_student_tokens_without_teacher_logits_are_refused() -> None:
    tokenizer = make_tokenizer(WORDS)
    with pytest.raises(ValueError, match="the student defines 4 tokens from id 25"):
        check_vocabularies(tokenizer, tokenizer, len(WORDS), len(WORDS) - 4, "the models")


def test_tokens_without_a_row_of_the_embedding() -> None:
    """Refused where one occurs: in the template, a role, a row, or of the base vocabulary, in any text."""
    tokenizer = make_tokenizer(WORDS)
    size = len(tokenizer)

    def check(rows: list[tuple[str, str]], embedded: int = size) -> None:
        check_embedded("model.path=STUDENT", tokenizer, embedded, {}, iter(rows))

    check([("row 0", "1 plus 2")])
    with pytest.raises(ValueError, match=r"^model\.path=STUDENT: its tokenizer has 4 tokens beyond the .* in any text"):
        check([], size - 4)
    tokenizer.add_tokens(["<new>"])
    check([("row 0", "1 plus 2")])
    with pytest.raises(ValueError, match=rf"1 tokens beyond the {size} rows .*'<new>' \(id {size}\) occurs in row 1"):
        check([("row 0", "1 plus 2"), ("row 1", "1 <new> 2")])
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<turn>", "<new>")
    with pytest.raises(ValueError, match=r"'<new>' .* is what its chat template writes"):
        check([])
    tokenizer.chat_template = template
    tokenizer.pad_token = "<new>"
    with pytest.raises(ValueError, match=r"'<new>' .* is its pad_token; resize the embedding"):
        check([])

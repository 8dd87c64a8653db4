"""Whether student and teacher share a vocabulary that covers all rows. Checked once at start, by their tokenizers."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from hpd_verl.data.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

# Splits differently under tokenizers that share a vocabulary but not their merges or their pre-tokenisation.
_PROBE = "Let x_1 = 3.14159 + 2024;  so  f(x) = \\frac{x}{2}.\n\n    def step(self): return 'naïve café 你好'  # 100%"


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_size: int,
    teacher_size: int,
    settings: str,
) -> None:
    """Check that the tokenizers of student and teacher agree.

    Models pad their vocabulary, so sizes may differ while tokenizers agree. The student is normalised over all its
    logits, the teacher over the common ones; tokens that only the student has get teacher probability 0. A token that
    only one tokenizer defines is allowed if the other has none at that id.

    Args:
        student, teacher: tokenizers.
        student_size, teacher_size: rows of the models' output heads.
        settings: names the two models' settings in errors.

    Raises:
        ValueError: the tokenizers disagree (the message shows the first differing tokens), or the student uses tokens
            the teacher has no logits for.
    """
    size = min(student_size, teacher_size)
    student_tokens, teacher_tokens = _tokens_by_id(student), _tokens_by_id(teacher)
    differing = [
        index
        for index in sorted(student_tokens.keys() & teacher_tokens.keys())
        if index < size and student_tokens[index] != teacher_tokens[index]
    ]
    if differing:
        examples = ", ".join(
            f"id {index}: student {student_tokens[index]!r}, teacher {teacher_tokens[index]!r}"
            for index in differing[:5]
        )
        raise ValueError(
            f"{settings}: their tokenizers disagree at {len(differing)} token ids ({examples}); choose models with "
            "one vocabulary"
        )
    pieces = {
        name: tokenizer.encode(_PROBE, add_special_tokens=False)
        for name, tokenizer in (("student", student), ("teacher", teacher))
    }
    if pieces["student"] != pieces["teacher"]:
        raise ValueError(
            f"{settings}: their tokenizers share token ids but split text differently (student into "
            f"{len(pieces['student'])} tokens, teacher into {len(pieces['teacher'])}, of {_PROBE!r}); "
            "choose models of one family"
        )
    # Tokens past the student's own head cannot occur: some tokenizers define more than their model embeds.
    beyond = [index for index in student_tokens if teacher_size <= index < student_size]
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"{settings}: the student defines {len(beyond)} tokens from id {first} ({student_tokens[first]!r}) on, but "
            f"the teacher's head has {teacher_size} rows; choose a teacher that knows them"
        )
    for name, only in (
        ("student", student_tokens.keys() - teacher_tokens.keys()),
        ("teacher", teacher_tokens.keys() - student_tokens.keys()),
    ):
        if only:
            tokens = student_tokens if name == "student" else teacher_tokens
            shown = ", ".join(repr(tokens[index]) for index in sorted(only)[:5])
            logger.warning("%d tokens are defined by the %s only: %s", len(only), name, shown)
    if student_size < teacher_size:
        logger.warning("the teacher's %d logits are cut to the student's %d", teacher_size, size)
    if student_size > teacher_size:
        logger.warning(
            "the teacher lacks the student's last %d logits (of %d): their teacher probability is 0",
            student_size - teacher_size,
            student_size,
        )


_ROLES = ("bos_token", "eos_token", "pad_token")


def check_embedded(
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    template_kwargs: Mapping[str, Any],
    texts: Iterable[tuple[str, str]],
) -> None:
    """Check that the model embeds every token that can occur.

    Tokenizers may define more tokens than their model embeds, as long as none of them occurs.

    Args:
        setting: ``NAME=VALUE`` of the student's path, for errors.
        tokenizer: the student's.
        size: rows of its embedding.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        texts: of all rows, each with the row's name; read only where the tokenizer defines more.

    Raises:
        ValueError: one that occurs, or may occur in any text, has no row.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= size}
    if not beyond:
        return

    def refusal(token: str, where: str) -> ValueError:
        return ValueError(
            f"{setting}: its tokenizer has {len(beyond)} tokens beyond the {size} rows of the model's embedding, and "
            f"{token!r} (id {beyond[token]}) {where}; resize the embedding to the tokenizer "
            "(model.resize_token_embeddings), or remove the token"
        )

    added = tokenizer.added_tokens_decoder
    for token, index in beyond.items():
        if index not in added:
            raise refusal(token, "may occur in any text")
    for role in _ROLES:
        if getattr(tokenizer, role, None) in beyond:
            raise refusal(getattr(tokenizer, role), f"is its {role}")
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    template = ChatTemplate(tokenizer, template_kwargs)
    for rendered in (template.render(chat), template.prompt(chat[:1])):
        for token in beyond:
            if token in rendered:
                raise refusal(token, "is what its chat template writes")
    for where, text in texts:
        for token in beyond:
            if token in text:
                raise refusal(token, f"occurs in {where}")

"""A demonstration becomes the tokens a rollout of the same answer would have."""

from conftest import WORDS, make_tokenizer

from hpd_verl.demonstration import DemonstrationTokenizer

MESSAGES = [{"role": "user", "content": "1 plus 2 ?"}]


def test_prompt_and_demonstration_are_the_templates_own_tokens() -> None:
    tokenizer = make_tokenizer(WORDS)
    ids, truncated = DemonstrationTokenizer(tokenizer, {}, max_length=10).encode(MESSAGES, "1 plus 2 is 3")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": "1 plus 2 is 3"}], tokenize=False
    )
    assert tokenizer.encode(prompt) + ids == tokenizer.encode(whole)
    assert ids[-1] == tokenizer.eos_token_id
    assert not truncated


def test_truncated_demonstration_has_no_end() -> None:
    tokenizer = make_tokenizer(WORDS)
    ids, truncated = DemonstrationTokenizer(tokenizer, {}, max_length=5).encode(MESSAGES, "1 plus 2 is 3")
    assert truncated
    assert tokenizer.decode(ids) == "1 plus 2 is 3"


def test_exact_fit_keeps_its_end() -> None:
    tokenizer = make_tokenizer(WORDS)
    ids, truncated = DemonstrationTokenizer(tokenizer, {}, max_length=6).encode(MESSAGES, "1 plus 2 is 3")
    assert not truncated
    assert len(ids) == 6

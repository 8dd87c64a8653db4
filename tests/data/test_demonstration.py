"""A demonstration becomes the tokens a rollout of the same answer would have."""

import logging

import pytest
from conftest import WORDS, Tiny, make_rows, make_tokenizer, write_parquet
from omegaconf import OmegaConf
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.config import HFModelConfig

from hpd_verl.data import fields
from hpd_verl.data.dataset import HPDDataset
from hpd_verl.data.demonstration import DemonstrationTokenizer, SequenceBuilder, prompt_family
from hpd_verl.sft.demonstrations import DemonstrationDataset

MESSAGES = [{"role": "user", "content": "1 plus 2 ?"}]


def test_prompt_and_demonstration_are_the_templates_own_tokens() -> None:
    tokenizer = make_tokenizer(WORDS)
    found = DemonstrationTokenizer(tokenizer, {}, max_length=10).encode(MESSAGES, "1 plus 2 is 3")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": "1 plus 2 is 3"}], tokenize=False
    )
    assert tokenizer.encode(prompt) + found.ids == tokenizer.encode(whole)
    assert found.ids[-1] == tokenizer.eos_token_id
    assert not found.truncated


def test_truncated_demonstration_has_no_end() -> None:
    tokenizer = make_tokenizer(WORDS)
    found = DemonstrationTokenizer(tokenizer, {}, max_length=5).encode(MESSAGES, "1 plus 2 is 3")
    assert found.truncated
    assert tokenizer.decode(found.ids) == "1 plus 2 is 3"


def test_exact_fit_keeps_its_end() -> None:
    tokenizer = make_tokenizer(WORDS)
    found = DemonstrationTokenizer(tokenizer, {}, max_length=6).encode(MESSAGES, "1 plus 2 is 3")
    assert not found.truncated
    assert found.ids[-1] == tokenizer.eos_token_id


def test_a_word_of_the_vocabulary_that_ends_turns_is_refused() -> None:
    """A word-level vocabulary knows the end token's text as that token, however it is written."""
    with pytest.raises(ValueError, match="holds '<end>', at which rollouts stop"):
        DemonstrationTokenizer(make_tokenizer(WORDS), {}, max_length=10).encode(MESSAGES, "1 <end> 2")


def test_overlong_prompts_are_flagged_and_named(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    model = HFModelConfig(path=str(tiny.student))
    whole, _ = SequenceBuilder(model, {}, 9, 16).build(MESSAGES, "3", "row 7")
    assert "start is cut off" not in caplog.text
    with caplog.at_level(logging.WARNING):
        cut, flags = SequenceBuilder(model, {}, 8, 16).build(MESSAGES, "3", "row 7")
    assert cut["prompts"].tolist() == whole["prompts"].tolist()[1:]
    assert flags == {fields.TRUNCATED: False, fields.REOPENED: False, fields.TRUNCATED_PROMPT: True}
    assert "row 7: prompt of 9 tokens, data.max_prompt_length=8; its start is cut off" in caplog.text


def test_data_set_counts_flags_and_names_rows(tiny: Tiny) -> None:
    rows = make_rows(4)
    rows[1]["prompt"] = [{"role": "user", "content": "1 plus 2 plus 3 ?"}]
    rows[2]["demonstration"] = "1 <end> 2"
    file = write_parquet(rows, tiny.folder / "flags.parquet")
    hpd = {"on_policy_fraction": 0.0, "missing_demonstration": "error", "overlong_demonstration": "truncate"}
    data = {"train_files": str(file), "prompt_key": "prompt", "filter_overlong_prompts": False, "hpd": hpd}
    checked = HPDDataset(str(file), make_tokenizer(WORDS), OmegaConf.create(data))
    dataset = DemonstrationDataset(checked, SequenceBuilder(HFModelConfig(path=str(tiny.student)), {}, 9, 16))
    assert [dataset[index][fields.TRUNCATED_PROMPT].tolist() for index in (0, 1, 3)] == [[0], [1], [0]]
    with pytest.raises(ValueError, match="row 2: the demonstration holds '<end>'"):
        dataset[2]


def test_a_token_without_an_embedding_is_named(tiny: Tiny) -> None:
    """Of rows that could not be looked at before the start."""
    model = HFModelConfig(path=str(tiny.student))
    model.hf_config.vocab_size = WORDS.index("3")
    assert SequenceBuilder(model, {}, 9, 16).build(MESSAGES, "2", "row 7")
    with pytest.raises(ValueError, match=r"^row 7: it holds token 12, but the model's embedding has 12 rows"):
        SequenceBuilder(model, {}, 9, 16).build(MESSAGES, "3", "row 7")


def test_a_tokenizer_without_the_tokens_of_later_turns() -> None:
    """verl's builder of GLM's prompts asks for tokens that join turns; a prompt has one, and is any family's."""
    tokenizer = make_tokenizer(WORDS)
    with pytest.raises(ValueError, match="does not define required token"):
        create_continuous_token_builder(tokenizer, hf_model_type="glm4_moe")
    assert prompt_family(tokenizer, "glm4_moe") is None
    assert prompt_family(tokenizer, "deepseek_v4") == "deepseek_v4"  # whose prompts are its own
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<|observation|>", "<|user|>"]})
    assert prompt_family(tokenizer, "glm4_moe") == "glm4_moe"
    prompts = [
        create_continuous_token_builder(tokenizer, hf_model_type=family).build_initial_tokens(MESSAGES)
        for family in ("glm4_moe", None)
    ]
    assert prompts[0] == prompts[1]

"""Demonstrations are what the chat template writes, over every family of templates that trl ships and some it does not.

Each family has a small tokenizer whose control tokens are added as the real one adds them: with a named role, special
without one, or added and not special. The reference is what the template writes for the whole chat, tokenised at once.
"""

# ruff: noqa: RUF001 (DeepSeek's tags are written in full-width letters)

import asyncio
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hpd_verl.data.demonstration import DemonstrationTokenizer, PromptTokenizer
from hpd_verl.ppo.agent_loop import HPDAgentLoop

TRL = Path(sys.prefix) / "share" / "trl"
ANSWERS = ["d", "e", "i", "m", "n", "o", "t", "4", "id", "im", "end", "s", "4 t", "<b>x</b>", "a\n\nb"]
REASONED = "<think>\nr\n</think>\n\na"
USER = {"role": "user", "content": "question"}
CHATS = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "be terse"}, USER],
    "several turns": [USER, {"role": "assistant", "content": "d"}, {"role": "user", "content": "next"}],
}


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer knows its control tokens, and what its template does."""

    eos: str
    end: str | None = None
    """The token that ends a turn; None: the template writes none, and the EOS does."""
    bos: str | None = None
    special: str = ""
    """Special tokens without a named role."""
    added: str = ""
    """Added tokens that are not special."""
    opens_reasoning: bool = False
    """The generation prompt ends with <think>, and the template does not put plain answers behind it."""
    parts_only: bool = False
    """Content is known as a list of parts only."""
    refuses_system: bool = False
    newline_at_the_border: bool = False
    """Plain answers begin with a newline that would make one token with the prompt's last."""


THINK = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
LLAMA3 = "<|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>"
CHATML = Family(eos="<|im_end|>", end="<|im_end|>", special="<|im_start|> <|endoftext|>", added=THINK)
DEEPSEEK = Family(
    eos="<｜end▁of▁sentence｜>",
    end="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    added="<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁outputs▁end｜>",
    opens_reasoning=True,
)
GEMMA = Family(eos="<eos>", end="<end_of_turn>", bos="<bos>", special="<start_of_turn>", refuses_system=True)
GEMMA4 = Family(
    eos="<eos>", end="<turn|>", bos="<bos>", special="<|turn> <|channel> <channel|> <|think|>", added="<|tool_call>"
)
# By the start of the template's file name; the longest that fits counts.
FAMILIES = {
    "cohere": Family(
        eos="<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        special="<|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|> "
        "<|START_RESPONSE|> <|END_RESPONSE|>",
    ),
    "deepseek": DEEPSEEK,
    "diffusion_gemma": GEMMA4,
    "gemma": GEMMA,
    "gemma3": Family(eos="<eos>", end="<end_of_turn>", bos="<bos>", special="<start_of_turn> <start_of_image>"),
    "gemma4": GEMMA4,
    "glm4moe": Family(
        eos="<|endoftext|>", special="[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", added=THINK
    ),
    "glm4moe_training": Family(
        eos="<|endoftext|>",
        end="<|user|>",
        special="[gMASK] <sop> <|system|> <|assistant|> <|observation|>",
        added=THINK,
    ),
    "gptoss": Family(
        eos="<|return|>", end="<|return|>", special="<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|call|>"
    ),
    "idefics3": Family(eos="<end_of_utterance>", end="<end_of_utterance>", special="<image>", parts_only=True),
    "lfm2": Family(
        eos="<|im_end|>",
        end="<|im_end|>",
        bos="<|startoftext|>",
        special="<|im_start|> <|tool_call_start|> <|tool_call_end|>",
        added="<think> </think>",
    ),
    "llama3": Family(eos="<|eot_id|>", end="<|eot_id|>", bos="<|begin_of_text|>", special=LLAMA3),
    "llava_next": Family(eos="</s>", end="</s>", bos="<s>", parts_only=True),
    "muse_glimmer": Family(eos="<|eot|>", end="<|eot|>", bos="<|bot|>", special="<|start|> <|message|> <|eom|>"),
    "nemotron": Family(
        eos="<|im_end|>", end="<|im_end|>", bos="<s>", special="<|im_start|>", added=THINK, opens_reasoning=True
    ),
    "phi3": Family(eos="<|endoftext|>", end="<|end|>", bos="<s>", special="<|system|> <|user|> <|assistant|>"),
    "qwen": CHATML,
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), replace(CHATML, newline_at_the_border=True)),
    "smolvlm": Family(eos="<end_of_utterance>", end="<end_of_utterance>", special="<|im_start|>", parts_only=True),
}
LOOP = "{% for m in messages %}"
WRITTEN_HERE = {
    "mistral": (
        Family(eos="</s>", end="</s>", bos="<s>", special="[INST] [/INST] [TOOL_CALLS]"),
        "{{ bos_token }}" + LOOP + "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}",
    ),
    "llama2": (
        Family(eos="</s>", end="</s>", bos="<s>"),
        LOOP + "{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
        "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    ),
    "phi4": (
        Family(eos="<|endoftext|>", end="<|im_end|>", special="<|im_start|> <|im_sep|>"),
        LOOP + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% else %}{{ eos_token }}{% endif %}",
    ),
    "end by an added token that is not special": (
        Family(eos="<eos>", end="<|turn_end|>", added="<|turn|> <|turn_end|>"),
        LOOP + "<|turn|>{{ m.role }}\n{{ m.content }}<|turn_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
    ),
    "newline before the end unless the answer has one": (
        CHATML,
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.content[-1] != '\n' %}\n{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "no generation prompt": (
        CHATML,
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    ),
}


def shipped_templates() -> dict[str, str]:
    """The templates of the trl that the Makefile puts beside Python's path, read as files."""
    return {file.stem: file.read_text() for file in sorted(TRL.glob("trl/chat_templates/*.jinja"))}


def family_of(name: str) -> Family:
    return FAMILIES[max((start for start in FAMILIES if name.startswith(start)), key=len)]


TEMPLATES = {name: (family_of(name), template) for name, template in shipped_templates().items()} | WRITTEN_HERE


def byte_level() -> Tokenizer:
    """Bytes, with merges that could reach over the end of a prompt."""
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("i", "d"), ("e", "n"), ("en", "d")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    # As in Llama 3 and Qwen, newlines stay together and leave the word behind them alone.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Llama 2's way with spaces: one before every piece of text, and none of its own kept apart."""
    pieces = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n", "▁t", "▁d"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "t"), ("▁", "d")], unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer


def make(family: Family, template: str, tokenizer: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or byte_level(), eos_token=family.eos, bos_token=family.bos, pad_token="<pad>"
    )
    special, added = family.special.split(), family.added.split()
    if family.end is not None and family.end not in (family.eos, *special, *added):
        special.append(family.end)
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    fast.chat_template = template
    return fast


@dataclass
class Case:
    name: str
    family: Family
    tokenizer: PreTrainedTokenizerFast
    settings: dict[str, Any] = field(default_factory=dict)

    def ids(self, chat: list[Any], **kwargs: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(chat, return_dict=False, **kwargs, **self.settings)

    @property
    def end(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.family.end or self.family.eos)

    @property
    def reasoned(self) -> str:
        """A demonstration, with reasoning unless the generation prompt has ended it."""
        prompt = self.tokenizer.decode(self.ids(self.chat([USER]), add_generation_prompt=True))
        return "and so on" if prompt.rstrip().endswith("</think>") else REASONED

    def message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.family.parts_only else text}

    def chat(self, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
        return [self.message(message["role"], message["content"]) for message in messages]

    def whole(self, messages: list[Any], answer: str) -> list[int]:
        """The template's tokens of the chat, up to and including the end of the answer's turn."""
        ids = self.ids([*messages, self.message("assistant", answer)])
        if self.family.end is None:
            return [*ids, self.end]
        return ids[: len(ids) - ids[::-1].index(self.end)]

    def demonstration(self, max_length: int = 1000) -> DemonstrationTokenizer:
        return DemonstrationTokenizer(self.tokenizer, self.settings, max_length)


@pytest.fixture(params=TEMPLATES)
def case(request: pytest.FixtureRequest) -> Case:
    family, template = TEMPLATES[request.param]
    return Case(request.param, family, make(family, template))


def test_trl_ships_templates() -> None:
    assert len(shipped_templates()) >= 28, f"no templates in {TRL}; see the Makefile's install"


@pytest.mark.parametrize("chat", CHATS)
def test_prompt_and_demonstration_are_the_templates_own_tokens(case: Case, chat: str) -> None:
    messages = case.chat(CHATS[chat])
    if chat == "system" and case.family.refuses_system:
        with pytest.raises(ValueError, match="template rejects the chat: System role not supported"):
            case.demonstration().encode(messages, "d")
        return
    if case.family.opens_reasoning:
        for answer in ANSWERS:
            with pytest.raises(ValueError, match="generation prompt ends with <think>"):
                case.demonstration().encode(messages, answer)
        return
    prompt = case.ids(messages, add_generation_prompt=True)
    tokenizer = case.demonstration()
    for answer in ANSWERS:
        found = tokenizer.encode(messages, answer)
        sequence, whole = prompt + found.ids, case.whole(messages, answer)
        if case.family.newline_at_the_border:  # the prompt ends with a newline and what is written begins with one
            assert whole[: len(prompt)] != prompt
            sequence, whole = case.tokenizer.decode(sequence), case.tokenizer.decode(whole)
        assert sequence == whole, answer
        assert not found.truncated
        assert not found.reopened


def test_truncated_demonstration_is_a_prefix(case: Case) -> None:
    messages, answer = case.chat([USER]), f"{case.reasoned} and more"
    whole = case.demonstration().encode(messages, answer).ids
    assert whole.count(case.end) == 1
    for length in (1, 5, len(whole) - 1):
        found = case.demonstration(length).encode(messages, answer)
        assert found.ids == whole[:length]
        assert found.truncated
    assert case.demonstration(len(whole)).encode(messages, answer).ids == whole
    assert case.demonstration().length(messages, answer) == len(whole)


def test_text_only_prompts_of_templates_for_parts_are_refused(case: Case) -> None:
    if not case.family.parts_only:
        assert case.demonstration().encode([USER], case.reasoned)
        return
    with pytest.raises(ValueError, match="does not write the text of the prompt's user message"):
        case.demonstration().encode([USER], "d")
    with pytest.raises(ValueError, match="does not write the text of the prompt's user message"):
        roll_out(case, [USER], Server([case.end]))


def test_reasoning_is_opened_once(case: Case) -> None:
    if case.reasoned != REASONED:
        with pytest.raises(ValueError, match="has already ended the reasoning"):
            case.demonstration().encode([USER], REASONED)
        return
    messages = case.chat([USER])
    prompt = case.tokenizer.decode(case.ids(messages, add_generation_prompt=True))
    for answer in (REASONED, "<think>cut off"):
        found = case.demonstration().encode(messages, answer)
        assert (prompt + case.tokenizer.decode(found.ids)).count("<think>") == 1
        assert found.reopened == prompt.endswith("<think>\n")
        assert case.tokenizer.decode(found.ids).count("</think>") == answer.count("</think>")


def closed_reasoning() -> list[str]:
    """Templates whose generation prompt ends with an ended reasoning if thinking is switched off."""
    names = []
    for name, (_, template) in TEMPLATES.items():
        tokenizer = make(*TEMPLATES[name])
        prompt = tokenizer.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if "enable_thinking" in template and prompt.rstrip().endswith("</think>"):
            names.append(name)
    return names


@pytest.mark.parametrize("name", closed_reasoning())
def test_reasoning_behind_an_ended_reasoning_is_refused(name: str) -> None:
    case = Case(name, TEMPLATES[name][0], make(*TEMPLATES[name]), {"enable_thinking": False})
    prompt = case.ids([USER], add_generation_prompt=True)
    for answer in ANSWERS:
        assert prompt + case.demonstration().encode([USER], answer).ids == case.whole([USER], answer)
    for answer in (REASONED, "<think>cut off"):
        with pytest.raises(ValueError, match="holds <think>, but the student's generation prompt has already ended"):
            case.demonstration().encode([USER], answer)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3_8", "nemotron_3_nano"])
def test_reasoning_that_continues_the_prompt(name: str) -> None:
    case = Case(name, TEMPLATES[name][0], make(*TEMPLATES[name]))
    found = case.demonstration().encode([USER], "r\n</think>\n\na")
    assert case.tokenizer.decode(found.ids) == f"r\n</think>\n\na{case.family.end}"
    assert found.ids == case.demonstration().encode([USER], REASONED).ids
    assert not found.reopened


def control_texts(case: Case) -> list[str]:
    """Control tokens as they may stand in a text: the turn's end, the EOS, and what a user's turn begins with."""
    first = case.tokenizer.convert_ids_to_tokens(case.ids(case.chat([USER])))
    added = case.tokenizer.get_added_vocab()
    return list(dict.fromkeys([case.family.end or case.family.eos, case.family.eos, *(t for t in first if t in added)]))


def test_control_tokens_in_a_text_are_text(case: Case) -> None:
    for control in control_texts(case):
        answer = f"a {control} b" if not case.family.opens_reasoning else f"</think>a {control} b"
        messages = [case.message("user", f"say {control}\n")]
        index = case.tokenizer.convert_tokens_to_ids(control)
        plain = case.demonstration().encode(case.chat([USER]), answer.replace(control, "c"))
        found = case.demonstration().encode(messages, answer)
        assert found.ids.count(index) == plain.ids.count(index), control
        assert case.tokenizer.decode(found.ids) == case.tokenizer.decode(plain.ids).replace("a c b", f"a {control} b")
        assert found.ids[-1] == case.end


@pytest.mark.parametrize(
    ("name", "tag"),
    [("qwen3", "<tool_call>"), ("lfm2_v2", "<|tool_call_start|>"), ("mistral", "[TOOL_CALLS]"), ("phi4", "<|im_sep|>")],
)
def test_tags_of_answers_stay_tokens(name: str, tag: str) -> None:
    case = Case(name, TEMPLATES[name][0], make(*TEMPLATES[name]))
    ids = case.demonstration().encode([USER], f"a{tag}b").ids
    expected = 0 if tag == "<|im_sep|>" else 1  # which the template writes in every turn
    assert ids.count(case.tokenizer.convert_tokens_to_ids(tag)) == expected


def test_template_that_refuses_control_tokens() -> None:
    case = Case("gptoss", TEMPLATES["gptoss"][0], make(*TEMPLATES["gptoss"]))
    harmony = "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>a"
    with pytest.raises(ValueError, match=r"rejects the chat: You have passed a message containing <\|channel\|>"):
        case.demonstration().encode([USER], harmony)
    ids = case.demonstration().encode([USER], "say <|channel|> and <|message|>").ids
    assert ids.count(case.tokenizer.convert_tokens_to_ids("<|channel|>")) == 1
    assert case.tokenizer.decode(ids) == "<|channel|>final<|message|>say <|channel|> and <|message|><|return|>"


@pytest.mark.parametrize("text", ["d \uf8fd", "\uf8fe1\uf8fe d"])
def test_private_characters_are_kept(text: str) -> None:
    case = Case("qwen2_5", CHATML, make(*TEMPLATES["qwen2_5"]))
    messages = [case.message("user", text)]
    prompt = case.ids(messages, add_generation_prompt=True)
    assert prompt + case.demonstration().encode(messages, text).ids == case.whole(messages, text)
    with pytest.raises(ValueError, match="both a control token and U"):
        case.demonstration().encode(messages, f"{text} <|im_end|>")


def test_spaces_of_a_sentence_piece_tokenizer() -> None:
    for name in ("mistral", "llama2"):
        case = Case(name, TEMPLATES[name][0], make(*TEMPLATES[name], sentence_pieces()))
        prompt = case.ids([USER], add_generation_prompt=True)
        for answer in ("d", "t", "4 t", "id"):
            found = case.demonstration().encode([USER], answer)
            assert prompt + found.ids == case.whole([USER], answer), answer


def test_token_shared_by_prompt_and_answer_is_not_written() -> None:
    """A rollout starts after the prompt's last token, whatever the answer begins with."""
    case = Case("qwen2_5", CHATML, make(*TEMPLATES["qwen2_5"]))
    prompt = case.ids([USER], add_generation_prompt=True)
    found = case.demonstration().encode([USER], "\nd")
    assert case.tokenizer.decode(prompt + found.ids) == case.tokenizer.decode(case.whole([USER], "\nd"))
    assert prompt + found.ids != case.whole([USER], "\nd")


def test_end_of_one_ordinary_token() -> None:
    template = (
        LOOP + "{{ m.role }} : {{ m.content }} ] {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tokenizer = make(Family(eos="<eos>"), template)
    demonstration = DemonstrationTokenizer(tokenizer, {}, 100)
    assert tokenizer.convert_ids_to_tokens(demonstration.encode([USER], "d").ids) == ["d", "]"]
    with pytest.raises(ValueError, match=r"holds '\]', at which rollouts stop"):
        demonstration.encode([USER], "x[0]")


def test_template_that_drops_the_answer() -> None:
    tokenizer = make(CHATML, LOOP + "{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match="does not write the answer's text"):
        DemonstrationTokenizer(tokenizer, {}, 100).encode([USER], "d")


class Server:
    """Serves a fixed continuation as vLLM does: up to the first stop token, which it returns too."""

    def __init__(self, continuation: list[int]) -> None:
        self.continuation = continuation
        self.seeds: list[int] = []

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        self.seeds.append(sampling_params["seed"])
        stops = [self.continuation.index(token) for token in sampling_params["stop_token_ids"]]
        ids = self.continuation[: min(stops) + 1]
        return SimpleNamespace(token_ids=ids, log_probs=None, num_preempted=0, routed_experts=None, extra_fields={})


def roll_out(
    case: Case,
    messages: list[Any],
    server: Server | list[int],
    prompt_length: int = 10_000,
    seed: int = 42,
    **row: Any,
) -> Any:
    """Of a server, or of one that gives these tokens."""
    server = server if isinstance(server, Server) else Server(server)
    rollout = {"name": "vllm", "prompt_length": prompt_length, "response_length": 1000}
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": rollout},
            "algorithm": {"hpd": {"score_rollouts": True, "seed": seed}},
        }
    )

    async def run() -> Any:
        loop = HPDAgentLoop(
            trainer_config=SimpleNamespace(config=config),
            server_manager=server,
            tokenizer=case.tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=SimpleNamespace(config={"apply_chat_template_kwargs": case.settings}),
        )
        return await loop.run({}, raw_prompt=messages, **{"session_id": 0, "tools": None, **row})

    return asyncio.run(run())


@pytest.mark.parametrize("chat", ["one turn", "several turns"])
def test_rollout_of_the_same_answer_is_the_same_sequence(case: Case, chat: str) -> None:
    control = case.family.end or case.family.eos
    messages = [*case.chat(CHATS[chat][:-1]), case.message("user", f"say {control}")]
    ids = case.demonstration().encode(messages, case.reasoned).ids
    beyond = case.tokenizer.encode("and on", add_special_tokens=False)
    output = roll_out(case, messages, Server([*ids, *beyond]))
    assert output.response_ids == ids
    escaped = [*case.chat(CHATS[chat][:-1]), case.message("user", "say c")]
    assert output.prompt_ids.count(case.end) == case.ids(escaped, add_generation_prompt=True).count(case.end)
    assert output.extra_fields["truncated_prompt"] is False


def test_rollout_marks_a_cut_prompt() -> None:
    case = Case("qwen2_5", CHATML, make(*TEMPLATES["qwen2_5"]))
    prompt = case.ids([USER], add_generation_prompt=True)
    output = roll_out(case, [USER], Server([case.end]), prompt_length=len(prompt) - 1)
    assert output.prompt_ids == prompt[1:]
    assert output.extra_fields["truncated_prompt"] is True


def test_each_answer_has_a_seed_of_its_own() -> None:
    """The same in every run: of a training row by its place, of a validation row, whose uid is not, by what it is."""
    case = Case("qwen2_5", CHATML, make(*TEMPLATES["qwen2_5"]))
    server, again = Server([case.end]), Server([case.end])
    training: list[dict[str, Any]] = [{"on_policy": True, "uid": f"{step}r{row}"} for step in (1, 2) for row in (0, 1)]
    rows: list[dict[str, Any]] = [
        *(each | {"session_id": session} for each in training for session in (0, 1)),
        {**training[0], "seed": 43},
        *({"uid": "of this run", "index": index, "session_id": session} for index in (0, 1) for session in (0, 1)),
    ]
    for row in rows:
        roll_out(case, [USER], server, **row)
    roll_out(case, [case.message("user", "another")], server, uid="of this run", index=0)
    assert len(set(server.seeds)) == len(server.seeds) == 14
    assert all(0 <= seed < 2**63 for seed in server.seeds)
    for row in rows:
        roll_out(case, [USER], again, **(row if "on_policy" in row else row | {"uid": "of another run"}))
    assert again.seeds == server.seeds[:-1]


# Messages of more than text, tools, prompts that begin the answer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "the weather", "parameters": PARAMETERS},
}


def call(city: str) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


ANSWER_MESSAGES: dict[str, dict[str, Any]] = {
    "reasoning_content": {"content": "It is.", "reasoning_content": "A thought"},
    "thinking": {"content": "It is.", "thinking": "A thought"},
    "call": {"content": "", "tool_calls": [call("Rome")]},
    "text and call": {"content": "Let me see.", "tool_calls": [call("Rome")]},
    "two calls": {"content": "", "tool_calls": [call("Rome"), call("Bonn")]},
    "reasoning and call": {"content": "", "reasoning_content": "A thought", "tool_calls": [call("Rome")]},
}
PROMPTS_WITH_MORE: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "tool's answer": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call("Rome")]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"},
    ],
    "earlier reasoning": [USER, {"role": "assistant", "content": "d", "reasoning_content": "old"}, USER],
}
WRITES_CALLS = ("glm4moe", "gptoss", "lfm2_v2", "llama3_1", "nemotron", "qwen2_5", "qwen3")


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
def test_a_message_is_what_the_template_writes_or_is_refused(case: Case, tools: Any) -> None:
    """Against the template's text of prompt and answer at once; what is left out of that text is refused."""
    trained = refused = 0
    for messages in PROMPTS_WITH_MORE.values():
        for fields in ANSWER_MESSAGES.values():
            answer = {"role": "assistant", **fields}
            try:
                found = case.demonstration().encode(messages, answer, tools).ids
            except ValueError:
                refused += 1
                continue
            trained += 1
            prompt = case.ids(messages, add_generation_prompt=True, tools=tools)
            assert PromptTokenizer(case.demonstration().template).encode(messages, tools) == prompt
            whole = case.tokenizer.decode(case.ids([*messages, answer], tools=tools))
            text = case.tokenizer.decode(prompt + found)
            if case.family.end is None:
                text = text.removesuffix(case.family.eos)
            assert whole.startswith(text), (fields, text, whole)
            assert not whole[len(text) :].strip()
            for value in fields.values():
                assert not isinstance(value, str) or value in text
            cities = [each["function"]["arguments"]["city"] for each in fields.get("tool_calls", [])]
            assert all(city in case.tokenizer.decode(found) for city in cities)
    if case.name.startswith(WRITES_CALLS) and not case.name.startswith("qwen2_5_vl"):
        assert trained
    if "tool_calls" not in case.tokenizer.chat_template and "reasoning" not in case.tokenizer.chat_template:
        assert not trained
    assert trained + refused == len(PROMPTS_WITH_MORE) * len(ANSWER_MESSAGES)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3", {"content": "a", "thinking": "r"}, "ignores the demonstration's thinking; rename it"),
        ("qwen2_5", {"content": "a", "reasoning_content": "r"}, "ignores the demonstration's reasoning_cont"),
        ("llama2", {"content": "", "tool_calls": [call("Rome")]}, "ignores the demonstration's tool_calls"),
        ("qwen3", {"content": "a", "name": "bob"}, "ignores the demonstration's name"),
        ("llama3_1", ANSWER_MESSAGES["text and call"], "changes the demonstration's content if"),
        ("gptoss", ANSWER_MESSAGES["two calls"], "does not write tool call 1 of the demonstration's 2"),
        ("llama3_1", ANSWER_MESSAGES["two calls"], "rejects the chat: This model only supports single tool-calls"),
    ],
)
def test_what_the_template_leaves_out_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    case = Case(name, TEMPLATES[name][0], make(*TEMPLATES[name]))
    with pytest.raises(ValueError, match=message):
        case.demonstration().encode([USER], {"role": "assistant", **fields})


def test_reasoning_of_a_message_needs_a_prompt_that_leaves_room_for_it() -> None:
    case = Case("qwen3", TEMPLATES["qwen3"][0], make(*TEMPLATES["qwen3"]), {"enable_thinking": False})
    with pytest.raises(ValueError, match=r"does not continue the prompt, .*reasoning_content; .*enable_think"):
        case.demonstration().encode([USER], {"role": "assistant", **ANSWER_MESSAGES["reasoning_content"]})


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    case = Case("llama2", TEMPLATES["llama2"][0], make(*TEMPLATES["llama2"]))
    with pytest.raises(ValueError, match="ignores the row's tools"):
        case.demonstration().encode([USER], "d", [WEATHER])
    with pytest.raises(ValueError, match="ignores the row's tools"):
        roll_out(case, [USER], [case.end], tools=[WEATHER])


def test_control_tokens_in_tools_and_calls_are_text() -> None:
    case = Case("qwen3", TEMPLATES["qwen3"][0], make(*TEMPLATES["qwen3"]))
    tools = [{**WEATHER, "function": {**WEATHER["function"], "description": "say <|im_end|>"}}]
    answer = {"role": "assistant", "content": "", "tool_calls": [call("<|im_end|>")]}
    template = case.demonstration().template
    for messages in ([USER], [{"role": "user", "content": "<|im_start|>"}]):
        prompt = PromptTokenizer(template).encode(messages, tools)
        plain = PromptTokenizer(template).encode([USER], [WEATHER])
        assert prompt.count(case.end) == plain.count(case.end)
        assert case.tokenizer.decode(prompt) == case.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        ids = case.demonstration().encode(messages, answer, tools).ids
        assert ids.count(case.end) == 1
        assert '"city": "<|im_end|>"' in case.tokenizer.decode(ids)
        tag = case.tokenizer.convert_tokens_to_ids("<tool_call>")  # of the answer, though the prompt shows it
        assert ids.count(tag) == 1
        assert case.demonstration().encode(messages, "a <tool_call> b", tools).ids.count(tag) == 1
        assert roll_out(case, messages, ids, tools=tools).prompt_ids == prompt


@pytest.mark.parametrize("begun", ["Sure, here it is:", "<think>\nr\n</think>\n\nSo", "say <|im_end|> and", ""])
def test_a_prompt_that_begins_the_answer_is_continued(case: Case, begun: str) -> None:
    """As by ``continue_final_message``, for demonstrations and rollouts."""
    messages = [case.message("user", "question"), {"role": "assistant", "content": begun}]
    try:
        text = case.tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=True, **case.settings
        )
    except Exception:  # of the template, or of transformers: the message is not written as it is
        with pytest.raises(ValueError, match="chat template"):
            case.demonstration().encode(messages, " and on.")
        with pytest.raises(ValueError, match="chat template"):
            roll_out(case, messages, [case.end])
        return
    prompt = PromptTokenizer(case.demonstration().template).encode(messages)
    assert case.tokenizer.decode(prompt) == text
    if "<|im_end|>" in begun and case.family.end == "<|im_end|>":
        assert prompt.count(case.end) == case.tokenizer.encode(text, add_special_tokens=False).count(case.end) - 1
    else:
        assert prompt == case.tokenizer.encode(text, add_special_tokens=False)
    found = case.demonstration().encode(messages, " and on.").ids
    assert found[-1] == case.end
    sequence = case.tokenizer.decode(prompt + found[:-1])
    written, asked = ("".join(each.split()) for each in (sequence, f"{text} and on."))
    assert written.removeprefix(asked) in ("", "<|END_RESPONSE|>")  # what Cohere's ends an answer with, before the turn
    assert found.count(case.end) == 1
    output = roll_out(case, messages, found)
    assert (output.prompt_ids, output.response_ids) == (prompt, found)


def test_begun_answers_without_a_text_to_continue() -> None:
    case = Case("qwen3", TEMPLATES["qwen3"][0], make(*TEMPLATES["qwen3"]))
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "", "tool_calls": [call("Rome")]}]
    with pytest.raises(ValueError, match="last message is a tool call of the assistant"):
        case.demonstration().encode(messages, "d")


@pytest.mark.parametrize("date", ["2026-01-31", "2026-02-01"])
def test_the_date_of_a_template(date: str) -> None:
    family, template = TEMPLATES["qwen2_5"]
    dated = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.\n{% endif %}" + template
    case = Case("dated", family, make(family, dated))
    demonstrations = DemonstrationTokenizer(case.tokenizer, {"strftime_now": date}, 1000)
    prompt = case.tokenizer.decode(PromptTokenizer(demonstrations.template).encode([USER]))
    assert prompt.startswith("Today is 31 Jan 2026." if date == "2026-01-31" else "Today is 01 Feb 2026.")
    assert demonstrations.encode([USER], "d").ids[-1] == case.end
    with pytest.raises(ValueError, match=r"^data\.apply_chat_template_kwargs\.strftime_now=today: not a date"):
        DemonstrationTokenizer(case.tokenizer, {"strftime_now": "today"}, 1000)

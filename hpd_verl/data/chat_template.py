"""The student's chat template: its text for a prompt and an answer, and the token that ends an answer."""

import copy
import functools
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from hpd_verl.errors import one_line

Message = Mapping[str, Any]
Messages = Sequence[Message]

DATE_KWARG = "strftime_now"
"""The function by which templates write today's date. As a key of ``data.apply_chat_template_kwargs`` it is a date, as
2026-01-31, that they write instead."""

KWARGS_SETTING = "data.apply_chat_template_kwargs"

_TOKENIZER_KEYS = ("tokenize", "return_dict", "return_tensors")
"""Keys of data.apply_chat_template_kwargs that are no variables of a template; verl leaves them out too."""

RENDER_SECONDS = 10.0
"""A template that takes longer for one chat is refused."""

_NAMED_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = re.compile(r"think|thought|reason|<\|channel>|<channel\|>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_BREAK = "\uf8fd"  # stands within a control token's text, so that neither template nor tokenizer knows it
_STAND_IN = "\uf8fe"  # begins the names that template-written control tokens have in the literal tokenizer


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], re.Pattern[str]]:
    """All added tokens but runs of white space, special or not and with or without a named role, and their pattern."""
    ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return ids, _any_of(list(ids))


@functools.lru_cache(maxsize=8)
def _literal_tokenizer(
    tokenizer: PreTrainedTokenizerBase, controls: frozenset[str]
) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
    """The tokenizer with control tokens renamed, so their own text is ordinary text.

    Returns:
        ``(tokenizer, control token to its name there, id there to id)``.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in controls]
    literal = Tokenizer.from_str(json.dumps(settings))
    names = {control: f"{_STAND_IN}{index}{_STAND_IN}" for index, control in enumerate(sorted(controls))}
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for control, name in names.items():
        token = added[control]
        spaces = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        literal.add_tokens([AddedToken(name, normalized=False, **spaces)])
    own = _added_tokens(tokenizer)[0]
    ids = {literal.token_to_id(name): own[control] for control, name in names.items()}
    for token in settings["added_tokens"]:  # the ids of tokens outside the model's vocabulary may have moved
        ids[literal.token_to_id(token["content"])] = token["id"]
    return literal, names, ids


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _closing_tags(tag: str) -> list[str]:
    words = [("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end")]
    return [f"{tag[0]}/{tag[1:]}", *(tag.replace(start, end) for start, end in words if start in tag)]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End what takes longer, where signals are heard: in a process's main thread.

    Raises:
        TimeoutError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, end)
    start, (before, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:  # another's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - start), 1e-3), interval)


@dataclass(frozen=True)
class TurnEnd:
    """How an assistant's turn ends."""

    tail: str
    """The template's text after the answer's text."""
    written: int
    """Characters of ``tail`` up to and including the end token; 0 where the template writes none."""
    token: int
    """The end token: the last token of a response, and where rollouts stop."""


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer as it follows its prompt."""

    prompt: str
    """The prompt with its generation prompt."""
    text: str
    """From the end of the prompt to the end of the turn, as far as the template writes it."""
    end: TurnEnd
    reopened: bool
    """The demonstration began with the reasoning tag that the prompt ends with; ``text`` holds it no more."""


class ChatTemplate:
    """A tokenizer's chat template.

    Control tokens form the chat: the tokens of a named role (BOS, EOS, padding, ...) and those that the template writes
    for a user's turn, for the generation prompt and around an answer, except reasoning tags. ``escape`` and ``encode``
    make them ordinary text within a message. All other added tokens (``<think>``, tool and image tags, special or not)
    may occur in a rollout's answer, and stay tokens.

    A prompt whose last message is the assistant's is the beginning of the answer: the answer continues it.

    Args:
        tokenizer: the student's.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.

    All methods raise ValueError, of one line that does not name the row, where the template refuses or ignores a
    message, or writes it in a way that no rollout could follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = {key: value for key, value in template_kwargs.items() if key not in _TOKENIZER_KEYS}
        date = self.template_kwargs.get(DATE_KWARG)
        if isinstance(date, str):
            self.template_kwargs[DATE_KWARG] = parse_date(date).strftime
        self._added_ids, self._added = _added_tokens(tokenizer)
        self._turn_controls: frozenset[str] | None = None
        self._without_tools: ChatTemplate | None = None
        self._holds_escaped_tools = False
        self._last_with_tools: ChatTemplate | None = None
        self._last_tools: list[Any] | None = None

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> "ChatTemplate":
        """The template for rows with these tools (JSON schemas); itself if there are none."""
        if not tools:
            return self
        if self._last_with_tools is None or self._last_tools != list(tools):
            bound = copy.copy(self)
            bound._without_tools, bound._last_with_tools = self, None
            escaped = _change_texts(list(tools), _escape_by(_any_of(sorted(self._plain_controls()))))
            bound._holds_escaped_tools = escaped != list(tools)
            bound.template_kwargs = self.template_kwargs | {"tools": escaped}
            self._last_with_tools, self._last_tools = bound, list(tools)
        return self._last_with_tools

    def _apply(self, messages: Messages, **kwargs: Any) -> str:
        try:
            with _time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, **kwargs, **self.template_kwargs
                )
        except Exception as error:  # templates are programs
            raise ValueError(f"the student's chat template rejects the chat: {one_line(error)}") from error

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The template's text; a refusal stands, where verl would try again behind a made-up user message."""
        return self._apply(messages, add_generation_prompt=generation_prompt)

    def prompt(self, messages: Messages) -> str:
        """The prompt's text: with its generation prompt, or up to the end of the answer that it begins."""
        if not begins_answer(messages):
            return self.render(messages, generation_prompt=True)
        begun = messages[-1]
        if begun.get("tool_calls"):
            raise ValueError(
                "the prompt's last message is a tool call of the assistant, which no answer can continue; add the "
                "tool's message, or make it the demonstration"
            )
        try:
            return self._apply(messages, continue_final_message=True)
        except ValueError as error:
            if "continue_final_message" not in str(error):
                raise
            raise ValueError(
                "the student's chat template rewrites the prompt's last message, the assistant's, so no answer can "
                "continue it; move it into the demonstration"
            ) from error

    def turn_end(self, messages: Messages) -> TurnEnd:
        """How an answer to this prompt ends."""
        self.check_prompt(messages)
        return self._probe(messages)[1]

    def check_prompt(self, messages: Messages) -> str:
        """The prompt's text.

        Raises:
            ValueError: the template refuses it, or leaves out its last message or the tools.
        """
        prompt = self.prompt(messages)
        self._refuse_unread(messages, prompt)
        if self._without_tools is not None and self._without_tools.prompt(messages) == prompt:
            raise ValueError(
                "the student's chat template ignores the row's tools; remove them, or set the student's "
                "custom_chat_template"
            )
        return prompt

    def _probe(self, messages: Messages) -> tuple[str, TurnEnd, bool]:
        """Text before an answer to this prompt, the answer's end, and whether the answer is a list of parts."""
        probe = "qzxanswer"
        while probe in str(messages):
            probe += "q"
        refusal = ValueError("the student's chat template does not write the answer's text exactly once")
        for in_parts in (False, True):
            answer = _assistant(probe, in_parts)
            try:
                chat = _answered(messages, answer)
                written = self.render(chat)
            except ValueError as error:
                refusal = error if not in_parts else refusal
                continue
            if written.count(probe) == 1:
                before, _, tail = written.partition(probe)
                return before, self._end(chat, probe, tail), in_parts
        raise refusal

    def _end(self, chat: Messages, probe: str, tail: str) -> TurnEnd:
        """The end of ``chat``, whose last message is the answer ``probe``."""
        found = self._added.search(tail)
        if found is None:
            return self._unmarked_end(tail)
        run = [found]
        while following := self._added.match(tail, run[-1].end()):
            run.append(following)
        if len(run) > 1:  # all of them end the turn, unless some end the chat
            try:
                continued = self.render([*chat, {**chat[-1], "role": "user"}]).split(probe)[1]
            except ValueError:  # it takes one turn only
                continued = tail
            run = [token for token in run if continued.startswith(tail[: token.end()])] or run
        return TurnEnd(tail, written=run[-1].end(), token=self._added_ids[run[-1][0]])

    def _unmarked_end(self, tail: str) -> TurnEnd:
        """The end where the template writes no added token: its one ordinary token there, or the EOS."""
        ids = self.tokenizer.encode(tail.strip(), add_special_tokens=False) if tail.strip() else []
        if len(ids) == 1:
            return TurnEnd(tail, written=0, token=ids[0])
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the student's chat template has no end-of-turn token and its tokenizer no eos_token; set one of "
                "them in the model's folder"
            )
        return TurnEnd(tail, written=0, token=self.tokenizer.eos_token_id)

    def answer(self, messages: Messages, answer: str | Message) -> WrittenAnswer:
        """What follows the prompt when a text or a message answers it.

        As the template writes it. A text is kept as it is if the template rewrites it (some drop the reasoning), writes
        a second reasoning tag before the text's own, or ends the prompt with one.
        """
        prompt = self.check_prompt(messages)
        return (
            self._text_answer(messages, answer, prompt)
            if isinstance(answer, str)
            else self._message_answer(messages, answer, prompt)
        )

    def _message_answer(self, messages: Messages, answer: Message, prompt: str) -> WrittenAnswer:
        """An answer of more than text: reasoning in a field of its own, tool calls."""
        _, end, in_parts = self._probe(messages)
        if in_parts:
            answer = {**answer, "content": [{"type": "text", "text": answer["content"]}]}
        full = self.render(_answered(messages, answer))
        self._refuse_unwritten(messages, answer, full)
        fields = " and ".join(key for key in answer if key not in ("role", "content") and answer[key])
        if not full.startswith(prompt):
            raise ValueError(
                f"the student's chat template does not continue the prompt, which ends with {prompt[-30:]!r}, with "
                f"the demonstration's {fields}; set {KWARGS_SETTING} (enable_thinking), or write the demonstration "
                "as one text"
            )
        written = full[len(prompt) :]
        if full.endswith(end.tail) and len(end.tail) <= len(written):
            return WrittenAnswer(prompt, written[: len(written) - len(end.tail) + end.written], end, reopened=False)
        # Another end than an answer of text has, as <|call|> of gpt-oss.
        tokens = list(self._added.finditer(written))
        last = tokens[-1] if tokens and not written[tokens[-1].end() :].strip() else None
        if last is None or not self.tokenizer.added_tokens_decoder[self._added_ids[last[0]]].special:
            raise ValueError(
                f"the student's chat template ends a text answer with {end.tail!r}, but a demonstration with "
                f"{fields} without a token; write the demonstration as one text"
            )
        tail = written[last.start() :]
        end = TurnEnd(tail, written=len(last[0]), token=self._added_ids[last[0]])
        return WrittenAnswer(prompt, written[: last.end()], end, reopened=False)

    def _refuse_unwritten(self, messages: Messages, answer: Message, full: str) -> None:
        """Refuse an answer of which the template, whose text of it is ``full``, leaves something out."""

        def is_written(without: Message) -> bool:
            try:
                return self.render(_answered(messages, without)) != full
            except ValueError:
                return True  # it is asked for

        for key, value in answer.items():
            if key in ("role", "content") or not value:
                continue
            if not is_written({name: other for name, other in answer.items() if name != key}):
                raise ValueError(
                    f"the student's chat template ignores the demonstration's {key}; rename it to a field that the "
                    "template knows, or remove it"
                )
            if isinstance(value, str) and _squeezed(value) not in _squeezed(full):
                raise _rewrites(key)
            for index in range(len(value)) if key == "tool_calls" and len(value) > 1 else ():
                if not is_written({**answer, key: [*value[:index], *value[index + 1 :]]}):
                    raise ValueError(
                        f"the student's chat template does not write tool call {index} of the demonstration's "
                        f"{len(value)}; use one tool call"
                    )
        content = answer["content"]
        if not isinstance(content, str):  # in parts
            content = content[0]["text"]
        more = _assistant(f"{content} x", in_parts=content is not answer["content"])["content"]
        changed = {**answer, "content": more}
        if content.strip() and (not is_written(changed) or _squeezed(content) not in _squeezed(full)):
            raise _rewrites("content")

    def _text_answer(self, messages: Messages, text: str, prompt: str) -> WrittenAnswer:
        before, end, in_parts = self._probe(messages)
        opener = _reasoning_tag_at_end(prompt)
        own_tag = _TAG.match(text.lstrip())
        if own_tag and opener is None and own_tag[0] in self._reasoning_tags(messages, prompt):
            raise _ended_reasoning(own_tag[0])
        repeats = opener is not None and text.lstrip().startswith(opener)
        full = self.render(_answered(messages, _assistant(text, in_parts)))
        if full.startswith(prompt) and full.endswith(end.tail) and len(prompt) + len(end.tail) <= len(full):
            written = full[len(prompt) : len(full) - len(end.tail)]
            shown, asked = _squeezed((opener or "") + written), _squeezed(text)
            if shown.endswith(asked) and not _tags_twice(shown[: len(shown) - len(asked)], asked):
                return WrittenAnswer(prompt, written + end.tail[: end.written], end, repeats)
        body = self._rewritten(messages, text, prompt, before, opener)
        return WrittenAnswer(prompt, body + end.tail[: end.written], end, repeats)

    def _rewritten(self, messages: Messages, text: str, prompt: str, before: str, opener: str | None) -> str:
        """The text itself, where the template does not write it as it is."""
        if opener is not None:
            stripped = text.lstrip()
            if stripped.startswith(opener):
                return stripped[len(opener) :].removeprefix(prompt[prompt.rindex(opener) + len(opener) :])
            if not any(tag in text for tag in _closing_tags(opener)):
                raise ValueError(
                    f"the student's generation prompt ends with {opener}, and the demonstration does not end this "
                    f"reasoning ({_closing_tags(opener)[0]}); add it to the demonstration, or set "
                    "data.apply_chat_template_kwargs (enable_thinking) or the student's custom_chat_template"
                )
            return text
        for tag in self._reasoning_tags(messages, prompt):
            if tag in text:
                raise _ended_reasoning(tag)
        if not before.startswith(prompt):
            raise ValueError(
                "the student's chat template writes another prompt if an answer follows; alone it ends with "
                f"{prompt[-20:]!r}; set the student's custom_chat_template"
            )
        head = before[len(prompt) :]
        own_tag = _TAG.match(text.lstrip())
        return text if own_tag and own_tag[0] in head else head + text

    def _reasoning_tags(self, messages: Messages, prompt: str) -> list[str]:
        """The reasoning tags of the generation prompt."""
        if begins_answer(messages) or not any(map(_REASONING.search, _TAG.findall(prompt[-200:]))):
            return []
        bare = self.render(messages)
        shared = next((i for i, pair in enumerate(zip(bare, prompt, strict=False)) if pair[0] != pair[1]), len(bare))
        return [tag for tag in _TAG.findall(prompt[shared:]) if _REASONING.search(tag)]

    def _refuse_unread(self, messages: Messages, prompt: str) -> None:
        """Refuse a prompt whose last message the template leaves out (some know lists of parts only)."""
        last = messages[-1]
        content = last.get("content")
        if not isinstance(content, str) or not content.strip() or content.strip() in prompt:
            return
        if self.prompt([*messages[:-1], {**last, "content": f"{content} x"}]) == prompt:
            raise ValueError(
                f"the student's chat template does not write the text of the prompt's {last.get('role')} message; "
                "it may know content as a list of parts only ([{type: text, text: ..}])"
            )

    def _controls(self, messages: Messages) -> frozenset[str]:
        if self._without_tools is not None:  # their description shows tags of answers, which are no controls
            return self._without_tools._controls(messages)
        if self._turn_controls is None:
            self._turn_controls = self._find_turn_controls(messages)
        before, end, _ = self._probe(messages)
        head = before.removeprefix(self.prompt(messages))
        head_tags = [] if head == before else [tag for tag in self._added.findall(head) if not _REASONING.search(tag)]
        return self._turn_controls.union(head_tags, self._added.findall(end.tail[: end.written]))

    def _plain_controls(self) -> frozenset[str]:
        """The control tokens of a question and its answer."""
        question = [{"role": "user", "content": "x"}]
        try:
            return self._controls(question)
        except ValueError:  # it takes other chats only
            return self._find_turn_controls(question)

    def _find_turn_controls(self, messages: Messages) -> frozenset[str]:
        user = {"role": "user", "content": "x"}
        named = [getattr(self.tokenizer, role, None) for role in _NAMED_ROLES]
        # The last resort, for a template that accepts no other prompt: the prompt's own content.
        for chat in ([user], [{"role": "system", "content": "x"}, user], messages):
            try:
                rendered = self.prompt(chat)
            except ValueError:
                continue
            in_turns = [token for token in self._added.findall(rendered) if not _REASONING.search(token)]
            return frozenset(token for token in [*named, *in_turns] if token in self._added_ids)
        return frozenset(token for token in named if token in self._added_ids)

    def escape(self, messages: Messages, answer: str | Message = "") -> tuple[Messages, str | Message, bool]:
        """Prompt and answer with control tokens in their texts marked as text, for the other methods.

        Returns:
            ``(messages, answer, escaped)``: the same objects where they hold none; ``escaped`` is for ``encode``.
        """
        contents = [*_texts(answer), *(text for message in messages for text in _texts(message))]
        if not any(self._added.search(content) for content in contents):
            return messages, answer, self._holds_escaped_tools
        pattern = _any_of(sorted(self._controls(messages)))
        if not any(pattern.search(content) for content in contents):
            return messages, answer, self._holds_escaped_tools
        change = _escape_by(pattern)
        if any(mark in content for mark in (_BREAK, _STAND_IN) for content in contents):
            raise ValueError("its text holds both a control token and U+F8FD or U+F8FE; remove one of them")
        return [_change_texts(message, change) for message in messages], _change_texts(answer, change), True

    def encode(self, messages: Messages, rendered: str, escaped: bool) -> list[int]:
        """The tokens of a rendered text of the chat ``messages``; what ``escape`` marked is ordinary text."""
        if not escaped:
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        if not self.tokenizer.is_fast:
            raise ValueError("its text holds a control token, which a slow tokenizer cannot read as text; remove it")
        controls = self._controls(messages)
        literal, names, ids = _literal_tokenizer(self.tokenizer, controls)
        renamed = _any_of(sorted(controls)).sub(lambda match: names[match[0]], rendered)
        encoded = literal.encode(renamed.replace(_BREAK, ""), add_special_tokens=False)
        return [ids.get(index, index) for index in encoded.ids]


def _tags_twice(before: str, text: str) -> bool:
    """Whether the template opens or ends a reasoning before a text that does so itself."""
    own_tag = _TAG.match(text)
    ending = [tag for tag in _TAG.findall(before) if _REASONING.search(tag) and _ends(tag)]
    return bool(own_tag and own_tag[0] in before) or any(tag in text for tag in ending)


def _rewrites(key: str) -> ValueError:
    return ValueError(
        f"the student's chat template changes the demonstration's {key} if it has other fields; remove it, or write "
        "the demonstration as one text"
    )


def _ended_reasoning(tag: str) -> ValueError:
    return ValueError(
        f"the demonstration holds {tag}, but the student's generation prompt has already ended the reasoning; remove "
        "the reasoning, or set data.apply_chat_template_kwargs (enable_thinking) or the student's "
        "custom_chat_template"
    )


def _ends(tag: str) -> bool:
    return tag[1] == "/" or "end" in tag.lower()


def _assistant(text: str, in_parts: bool) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}] if in_parts else text}


def _reasoning_tag_at_end(prompt: str) -> str | None:
    """The reasoning tag that a generation prompt ends with, opened and not closed."""
    tags = list(_TAG.finditer(prompt[-100:].rstrip()))
    if not tags or tags[-1].end() != len(prompt[-100:].rstrip()):
        return None
    tag = tags[-1][0]
    return tag if _REASONING.search(tag) and not _ends(tag) else None


def begins_answer(messages: Messages) -> bool:
    """Whether the prompt's last message is the beginning of the answer."""
    return bool(messages) and messages[-1].get("role") == "assistant"


def _answered(messages: Messages, answer: Message) -> list[Message]:
    """The chat with its answer: behind the prompt, or joined to the message by which the prompt begins it."""
    if not begins_answer(messages):
        return [*messages, answer]
    begun, more = messages[-1].get("content"), answer["content"]
    if not isinstance(begun, str) or not isinstance(more, str):
        raise ValueError("the prompt's last message is the assistant's and not text, so no answer can continue it")
    return [*messages[:-1], {**messages[-1], **answer, "content": begun + more}]


def parse_date(value: str) -> datetime:
    """The date that a template is to write.

    Raises:
        ValueError: not a date; the message names the setting.
    """
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{KWARGS_SETTING}.{DATE_KWARG}={value}: not a date; write it as 2026-01-31") from None


def _texts(value: Any) -> list[str]:
    """All texts in a message, or in a part of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() if key != "role" for text in (str(key), *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, Sequence) else []


def _escape_by(pattern: re.Pattern[str]) -> Callable[[str], str]:
    return lambda text: pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)


def _change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message, or a part of one, with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _change_texts(key, change): item if key == "role" else _change_texts(item, change)
            for key, item in value.items()
        }
    return [_change_texts(item, change) for item in value] if isinstance(value, Sequence) else value

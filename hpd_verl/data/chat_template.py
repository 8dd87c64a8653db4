"""The student's chat template: what it writes for a prompt and an answer, and the token that ends an answer."""

import functools
import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

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
    """The tokenizer, knowing control tokens by other names only, so that their own text is ordinary text.

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
    """What the template writes after the answer's text."""
    written: int
    """Characters of ``tail`` up to and including the end token; 0 where the template writes none."""
    token: int
    """The end token: the last token of a response, and where rollouts stop."""


@dataclass(frozen=True)
class Answer:
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

    Control tokens are those that make up the chat: the tokens of a named role (BOS, EOS, padding, ...), those the
    template writes for a user's turn, for the generation prompt and around an answer, except reasoning tags. Where the
    text of a message holds one, ``escape`` and ``encode`` make it ordinary text. All other added tokens (``<think>``,
    tool and image tags, special or not) are what a rollout's answer may consist of, and stay tokens.

    Args:
        tokenizer: the student's.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.

    All methods raise ValueError, of one line that does not name the row, where the template refuses or ignores a
    message, or writes it in a way that no rollout could follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs)
        self._added_ids, self._added = _added_tokens(tokenizer)
        self._turn_controls: frozenset[str] | None = None

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The template's text; a refusal stands, where verl would try again behind a made-up user message."""
        try:
            with _time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self.template_kwargs
                )
        except Exception as error:  # templates are programs
            raise ValueError(f"the student's chat template refuses the chat: {error}") from error

    def prompt(self, messages: Messages) -> str:
        """The prompt's text, its generation prompt included."""
        return self.render(messages, generation_prompt=True)

    def turn_end(self, messages: Messages) -> TurnEnd:
        """How an answer to this prompt ends."""
        self._refuse_unread(messages, self.prompt(messages))
        return self._probe(messages)[1]

    def _probe(self, messages: Messages) -> tuple[str, TurnEnd, bool]:
        """Text before an answer to this prompt, the answer's end, and whether the answer is a list of parts."""
        probe = "qzxanswer"
        while probe in str(messages):
            probe += "q"
        refusal = ValueError("the student's chat template does not write the answer's text, once and as it is")
        for in_parts in (False, True):
            answer = _assistant(probe, in_parts)
            try:
                written = self.render([*messages, answer])
            except ValueError as error:
                refusal = error if not in_parts else refusal
                continue
            if written.count(probe) == 1:
                before, _, tail = written.partition(probe)
                return before, self._end([*messages, answer], probe, tail), in_parts
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
                "actor_rollout_ref.model.path: the student's chat template ends a turn without a token of its own and "
                "its tokenizer has no eos_token; set one of them"
            )
        return TurnEnd(tail, written=0, token=self.tokenizer.eos_token_id)

    def answer(self, messages: Messages, text: str) -> Answer:
        """What follows the prompt when ``text`` answers it.

        That is what the template writes there, unless the template rewrites the text (some drop the reasoning), writes
        a second reasoning tag before the text's own, or lets the prompt end in one: then it is the text itself.
        """
        prompt = self.prompt(messages)
        self._refuse_unread(messages, prompt)
        before, end, in_parts = self._probe(messages)
        opener = _reasoning_tag_at_end(prompt)
        own_tag = _TAG.match(text.lstrip())
        if own_tag and opener is None and own_tag[0] in self._reasoning_tags(messages, prompt):
            raise _ended_reasoning(own_tag[0])
        repeats = opener is not None and text.lstrip().startswith(opener)
        full = self.render([*messages, _assistant(text, in_parts)])
        if full.startswith(prompt) and full.endswith(end.tail) and len(prompt) + len(end.tail) <= len(full):
            written = full[len(prompt) : len(full) - len(end.tail)]
            shown, asked = _squeezed((opener or "") + written), _squeezed(text)
            if shown.endswith(asked) and not _tags_twice(shown[: len(shown) - len(asked)], asked):
                return Answer(prompt, written + end.tail[: end.written], end, repeats)
        body = self._rewritten(messages, text, prompt, before, opener)
        return Answer(prompt, body + end.tail[: end.written], end, repeats)

    def _rewritten(self, messages: Messages, text: str, prompt: str, before: str, opener: str | None) -> str:
        """The text itself, where the template does not write it as it is."""
        if opener is not None:
            stripped = text.lstrip()
            if stripped.startswith(opener):
                return stripped[len(opener) :].removeprefix(prompt[prompt.rindex(opener) + len(opener) :])
            if not any(tag in text for tag in _closing_tags(opener)):
                raise ValueError(
                    f"the student's generation prompt ends with {opener}, and the demonstration does not end this "
                    f"reasoning ({_closing_tags(opener)[0]}); add it to the demonstration, or choose another prompt by "
                    "data.apply_chat_template_kwargs (enable_thinking) or actor_rollout_ref.model.custom_chat_template"
                )
            return text
        for tag in self._reasoning_tags(messages, prompt):
            if tag in text:
                raise _ended_reasoning(tag)
        if not before.startswith(prompt):
            raise ValueError(
                "the student's chat template writes the prompt of an answered question otherwise than the prompt "
                f"itself, which ends with {prompt[-20:]!r}; set actor_rollout_ref.model.custom_chat_template"
            )
        head = before[len(prompt) :]
        own_tag = _TAG.match(text.lstrip())
        return text if own_tag and own_tag[0] in head else head + text

    def _reasoning_tags(self, messages: Messages, prompt: str) -> list[str]:
        """The reasoning tags of the generation prompt."""
        if not any(map(_REASONING.search, _TAG.findall(prompt[-200:]))):
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
        if self._turn_controls is None:
            self._turn_controls = self._find_turn_controls(messages)
        before, end, _ = self._probe(messages)
        head = before.removeprefix(self.prompt(messages))
        head_tags = [] if head == before else [tag for tag in self._added.findall(head) if not _REASONING.search(tag)]
        return self._turn_controls.union(head_tags, self._added.findall(end.tail[: end.written]))

    def _find_turn_controls(self, messages: Messages) -> frozenset[str]:
        user = {"role": "user", "content": "x"}
        named = [getattr(self.tokenizer, role, None) for role in _NAMED_ROLES]
        # A prompt of its own content is the last resort, for a template that takes no other.
        for chat in ([user], [{"role": "system", "content": "x"}, user], messages):
            try:
                rendered = self.prompt(chat)
            except ValueError:
                continue
            in_turns = [token for token in self._added.findall(rendered) if not _REASONING.search(token)]
            return frozenset(token for token in [*named, *in_turns] if token in self._added_ids)
        return frozenset(token for token in named if token in self._added_ids)

    def escape(self, messages: Messages, text: str = "") -> tuple[Messages, str]:
        """Prompt and answer with every control token in their text marked as text, for the other methods.

        Unchanged, and the same objects, where there is none.
        """
        contents = [text, *(part for message in messages for part in _texts(message.get("content")))]
        if not any(self._added.search(content) for content in contents):
            return messages, text
        pattern = _any_of(sorted(self._controls(messages)))
        if not any(pattern.search(content) for content in contents):
            return messages, text
        if any(mark in content for mark in (_BREAK, _STAND_IN) for content in contents):
            raise ValueError("its text holds both a control token and U+F8FD or U+F8FE; remove one of them")

        def escaped(content: str) -> str:
            return pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], content)

        return [_with_texts(message, escaped) for message in messages], escaped(text)

    def encode(self, messages: Messages, rendered: str, escaped: bool) -> list[int]:
        """The tokens of a rendered text of the chat ``messages``; what ``escape`` marked is ordinary text."""
        if not escaped:
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        if not self.tokenizer.is_fast:
            raise ValueError("its text holds a control token, which a slow tokenizer cannot take as text; remove it")
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


def _ended_reasoning(tag: str) -> ValueError:
    return ValueError(
        f"the demonstration holds {tag}, and the student's generation prompt has already ended its reasoning; take the "
        "reasoning out of the demonstration, or choose another prompt by data.apply_chat_template_kwargs "
        "(enable_thinking) or actor_rollout_ref.model.custom_chat_template"
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


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, Sequence) else []
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _with_texts(message: Mapping[str, Any], change: Any) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)}
    if isinstance(content, Sequence):
        parts = [
            {**part, "text": change(part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
        return {**message, "content": parts}
    return dict(message)

"""How a base is asked: by its chat template, by a prompt format, or by the bare text (`chat_template: false`).

A template's parts are found by rendering it with a mark in a turn's place, never by the names of its tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .source import Row

DEFAULT_FORMAT = "Question: {prompt}\nAnswer: {completion}"
Span = tuple[int, int]
_ROLES = ("system", "user", "assistant", "tool")
_MARK = "\ue000\ue001"  # of the private use area: in no text, and no template strips it


@dataclass(frozen=True)
class PromptFormat:
    """The text in front of a question, between it and its answer, and behind that."""

    before: str
    between: str
    after: str

    @property
    def ends(self) -> list[str]:
        """Where an answer ends: at what is behind it, or where the next question would begin."""
        opening = self.before.strip().split("\n")[0]
        return [text for text in (self.after.strip(), "\n" + opening) if text]


@dataclass(frozen=True)
class Rendered:
    """A row as one text; spans are of characters."""

    text: str
    answers: list[Span]  # of the assistant's turns, or the completion; with their ends if those count
    contents: list[Span]  # of what the row itself says in any turn: no role names, marks or words of a template
    templated: bool = False  # by a chat template, which writes its own special tokens


def parse_format(text: str) -> PromptFormat:
    """Take a prompt format apart.

    Raises:
        ValueError: unless it has `{prompt}` and then `{completion}`, once each.
    """
    before, first, rest = text.partition("{prompt}")
    between, second, after = rest.partition("{completion}")
    if not first or not second or "{prompt}" in between + after or "{completion}" in after:
        raise ValueError("a prompt format holds {prompt} and then {completion}, once each")
    return PromptFormat(before, between, after)


def has_template(tokenizer: Any, chat_template: bool = True) -> bool:
    """Return whether questions go through the tokenizer's chat template: a prompt format goes before it."""
    return bool(
        chat_template and getattr(tokenizer, "chat_template", None) and not getattr(tokenizer, "prompt_format", None)
    )


def format_of(tokenizer: Any, chat_template: bool = True) -> PromptFormat | None:
    """Return the prompt format that questions are asked by; None: they go through the template, or as they are."""
    if not chat_template or has_template(tokenizer):
        return None
    found = parse_format(getattr(tokenizer, "prompt_format", None) or DEFAULT_FORMAT)
    return found if (found.before + found.between + found.after).strip() else None


def ask(
    messages: Sequence[Row], tokenizer: Any, chat_template: bool = True, variables: Mapping[str, Any] | None = None
) -> str:
    """Return the text that the base continues with its answer.

    Where a template begins a whole answer with more, as reasoning templates do with an empty thought, or with less, as
    those do that open a thought, so is it here: what is asked has the form of what is trained. With `variables` of the
    template, it alone says how an answer begins.

    Raises:
        DataError: if the template refuses these turns.
    """
    if form := format_of(tokenizer, chat_template):
        return _by_format(messages, form, name="the prompt").text.rstrip(" ")
    if not has_template(tokenizer, chat_template):
        return "\n".join(str(message["content"]) for message in messages)
    messages, asked = _accepted(messages, tokenizer, "the prompt", add_generation_prompt=True, **(variables or {}))
    if variables:
        return asked
    try:
        opening = _apply([*messages, {"role": "assistant", "content": _MARK}], tokenizer).partition(_MARK)[0]
    except Exception:  # a template refuses with whatever error it likes
        return asked
    if asked.startswith(opening.rstrip()):
        return asked[: len(opening)]
    return asked + opening[len(asked) :].rstrip(" ") if opening.startswith(asked) else asked


def render(row: Row, tokenizer: Any, chat_template: bool, closing: bool, name: str) -> Rendered:
    """Return the row's whole text and where its contents are; `closing`: an answer's span takes in its end.

    Raises:
        DataError: if the template refuses the row's turns, or rewrites an answer.
    """
    if "text" in row and "prompt" not in row and "messages" not in row:
        whole = [(0, len(row["text"]))]
        return Rendered(row["text"], whole, whole)
    messages = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    chat_template = chat_template or "messages" in row
    if form := format_of(tokenizer, chat_template):
        return _by_format(messages, form, name, closing)
    if has_template(tokenizer, chat_template):
        return _by_template(*_accepted(messages, tokenizer, name), tokenizer, closing, name)
    if "messages" in row:
        return _by_format(messages, PromptFormat("", "\n", ""), name, closing)
    prompt, target = row["prompt"], row["completion"]
    answer = (len(prompt), len(prompt) + len(target))  # as they are: the row's own white space stands between them
    return Rendered(prompt + target, [answer], [(0, len(prompt)), answer])


def end_tokens(tokenizer: Any, chat_template: bool = True) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own, and what the template puts behind an answer."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if has_template(tokenizer, chat_template):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            behind = _apply(turns, tokenizer).rpartition(_MARK)[2]
        except Exception:  # a template refuses with whatever error it likes
            behind = ""
        if marker := _marker(behind, tokenizer):
            found.append(int(tokenizer.convert_tokens_to_ids(marker)))
    return list(dict.fromkeys(found))


def cut_at_end(text: str, ends: Sequence[str]) -> str:
    """Return an answer up to where the next question begins; white space in front of the answer ends nothing."""
    start = len(text) - len(text.lstrip())
    places = [at for end in ends if (at := text.find(end, start)) >= 0]
    return text[: min(places)] if places else text


def _by_format(messages: Sequence[Row], form: PromptFormat, name: str, closing: bool = False) -> Rendered:
    text, answers, contents = "", [], []
    for i, message in enumerate(messages):
        if message["role"] not in _ROLES[:3] or not {"tool_calls", "function_call"}.isdisjoint(message):
            raise DataError(
                f"{name}: turn {i + 1} calls a tool, or is of another role than system, user and assistant: that needs "
                "a base with a chat template which knows how to write it"
            )
        content = str(message["content"]).strip()
        text += form.before if message["role"] == "user" else _space(text, content)
        start, end = len(text), len(text) + len(content)
        text += content
        contents.append((start, end))
        if message["role"] == "assistant":
            text += form.after + "\n"
            answers.append((start, len(text) if closing else end))
        else:
            text += form.between if message["role"] == "user" else "\n"
    if messages and messages[-1]["role"] == "assistant" and not closing:
        text = text[: answers[-1][1]]  # ".\n" may be one token, and the end is not to be forgotten
    return Rendered(text, answers, contents)


def _by_template(messages: Sequence[Row], whole: str, tokenizer: Any, closing: bool, name: str) -> Rendered:
    answers, contents = [], []
    for i, message in enumerate(messages):
        content = str(message["content"]).strip()
        if not content:  # it calls a tool
            continue
        start = _place(whole, messages, i, content, tokenizer)
        if message["role"] == "assistant":
            if start < 0:
                raise DataError(
                    f"{name}: the chat template rewrites turn {i + 1}, so its tokens cannot be told apart. "
                    "Give the row as 'prompt' and 'completion' with chat_template: false."
                )
            end = start + len(content)
            behind = whole[end:]
            marker = _marker(behind, tokenizer) if closing else ""
            answers.append((start, end + behind.index(marker) + len(marker)))
        if start >= 0:
            contents.append((start, start + len(content)))
    return Rendered(whole, answers, contents, templated=True)


def _place(whole: str, messages: Sequence[Row], i: int, content: str, tokenizer: Any) -> int:
    """Return where the content of turn i begins; -1 where that cannot be told.

    It is right behind what the template writes in front of a mark in its place, or, where the content begins with what
    the template would write itself (a thought), in front of an answer. It is never searched for: a short one is a part
    of many words.
    """
    for turns, generates in ((_marked(messages, i), False), (messages[:i], True)):
        try:
            before = _apply(turns, tokenizer, add_generation_prompt=generates).partition(_MARK)[0]
        except Exception:  # a template refuses with whatever error it likes
            continue
        start = len(whole) - len(whole[len(before) :].lstrip())
        if whole.startswith(before) and whole.startswith(content, start):
            return start
    return -1


def _accepted(messages: Sequence[Row], tokenizer: Any, name: str, /, **settings: Any) -> tuple[Sequence[Row], str]:
    """Return the turns as the template takes them, and the whole text.

    Where it has no system role, that is put in front of the first question.
    """
    tries = [messages]
    if [message["role"] for message in messages[:2]] == ["system", "user"]:
        joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        tries.append([{**messages[1], "content": joined}, *messages[2:]])
    problem = None
    for turns in tries:
        try:
            text = _apply(turns, tokenizer, **settings)
            marks = {i: f"{_MARK}{i}{_MARK}" for i, turn in enumerate(turns) if turn["role"] != "assistant"}
            marked = [{**turn, "content": marks[i]} if i in marks else turn for i, turn in enumerate(turns)]
            seen = _apply(marked, tokenizer, **settings)  # all at once: one by one takes the square of their number
            omitted = [i for i, mark in marks.items() if mark not in seen]
        except Exception as error:  # a template refuses with whatever error it likes; its text may quote the row
            problem = type(error).__name__
            continue
        if not omitted:
            return turns, text
        problem = f"it leaves out turn {omitted[0] + 1}"
    try:
        _apply([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], tokenizer)
    except Exception:
        advice = "it cannot be used at all: give a prompt_format in its place, or mend it in the tokenizer's files"
    else:
        advice = "give them in an order that it takes, mostly user and assistant in turn, with texts alone"
    known = [m["role"] if m["role"] in _ROLES else "another" for m in messages[:6]]
    roles = ", ".join([*known, *(["..."] if len(messages) > 6 else [])])
    raise DataError(f"{name}: the base's chat template refuses its turns ({roles}; {problem}): {advice}")


def _marked(messages: Sequence[Row], i: int) -> list[Row]:
    return [*messages[:i], {**messages[i], "content": _MARK}, *messages[i + 1 :]]


def _apply(messages: Sequence[Row], tokenizer: Any, /, **settings: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))


def _marker(behind: str, tokenizer: Any) -> str:
    """Return the token right behind an answer, white space aside; "" where there is none."""
    marks = [*tokenizer.get_added_vocab(), tokenizer.eos_token or ""]
    text = behind.lstrip()
    return max((mark for mark in marks if mark.strip() and text.startswith(mark)), key=len, default="")


def _space(left: str, right: str) -> str:
    """Return the space that two texts need between them: none at white space, or in scripts that write without."""
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return ""
    return "" if {unicodedata.east_asian_width(c) for c in (left[-1], right[0])} & {"W", "F"} else " "

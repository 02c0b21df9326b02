"""DeepSeek-V4's conversations as prompts: what its checkpoints bring instead of a Jinja template.

The grammar is that of the encoder in its releases; long texts are the checkpoint's own
(:mod:`reprise.loading.chat_encoder`).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.engine.messages import read_tools
from reprise.engine.prompt import short
from reprise.engine.template import Message, ToolCallForm
from reprise.errors import RequestError
from reprise.loading.chat_encoder import FILE, EncoderTexts, Template

logger = logging.getLogger(__name__)

_BEGIN, _END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT, _REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
_OPEN, _CLOSE, _DSML = "<think>", "</think>", "｜DSML｜"
_TASKS = ("action", "query", "authority", "domain", "title", "read_url")
"""Each has a token, which asks for a short answer of one kind."""
_PLACES = {"dsml_token": _DSML, "thinking_start_token": _OPEN, "thinking_end_token": _CLOSE}
_EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
"""What clients ask for, the least first."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_FURTHER = ("reasoning_content", "response_format", "task", "tools", "tool_call_id")
"""Keys of messages."""
_SWITCHES = ("enable_thinking", "thinking")


class DeepSeekV4Chat:
    """Answers what a :class:`reprise.engine.template.ChatTemplate` answers.

    Its variables: ``enable_thinking`` (or ``thinking``; default True), ``reasoning_effort`` (one of
    OpenAI's names: the checkpoint's next higher one is taken; ``none``: no thinking) and
    ``drop_thinking`` (default True): leave out what was thought before the last user's turn, and
    developers' messages; with tools, nothing is left out.

    Args:
        texts: The checkpoint's.
    """

    variables = frozenset(
        {"tools", "add_generation_prompt", "continue_final_message", "reasoning_effort",
         "drop_thinking", *_SWITCHES}
    )  # fmt: skip
    names = frozenset({*_ROLES, *_FURTHER})
    text = f"{_OPEN}{_CLOSE}<{_DSML}tool_calls>"
    """Tags that its models write."""
    tool_call_form = ToolCallForm(True, {"content": ""}, True, unparsed="arguments")

    def __init__(self, texts: EncoderTexts) -> None:
        self._texts = texts

    def content_forms(self, role: str) -> frozenset[str]:
        """See :meth:`reprise.engine.template.ChatTemplate.content_forms`."""
        if role not in _ROLES:
            return frozenset()
        return frozenset({"string", "parts"} if role == "tool" else {"string"})

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt.

        Raises:
            RequestError: A variable has no such value, the messages are none that the model was
                trained on, or they need a text that the checkpoint does not have.
        """
        turns = _turns(messages, variables.get("tools"))
        thinking = self._thinking(variables)
        drop = _flag("drop_thinking", variables.get("drop_thinking"), True)
        drop = drop and not any(each.get("tools") for each in turns)
        if thinking and drop:
            turns = _without_thoughts(turns)
        goes_on = bool(variables.get("continue_final_message"))
        asks = bool(variables.get("add_generation_prompt", True)) and not goes_on
        last = _last_user(turns)
        text = _BEGIN + self._effort(variables.get("reasoning_effort"), thinking)
        for index, turn in enumerate(turns):
            ends = index + 1 == len(turns)
            thought = thinking and (not drop or index > last)
            if index and "task" in turns[index - 1]:
                thought = False
            text += self._turn(turn, thought, ends=not (goes_on and ends))
            behind = None if ends else turns[index + 1]["role"]
            if behind in ("assistant", "latest_reminder") or (ends and asks):
                text += _transition(turn, thinking, thinking and (not drop or index >= last))
        return text

    def _turn(self, turn: Message, thought: bool, *, ends: bool) -> str:
        role, content = turn["role"], turn.get("content") or ""
        if role in ("system", "developer"):
            head = _USER if role == "developer" else ""
            if role == "developer" and not content:
                raise RequestError("a message of role 'developer' has no content: give a string")
            return head + content + self._beside(turn)
        if role == "user":
            return _USER + "\n\n".join(turn["parts"])
        if role == "latest_reminder":
            return _REMINDER + content
        thoughts = (turn.get("reasoning_content") or "") + _CLOSE if thought else ""
        return thoughts + content + _calls(turn.get("tool_calls")) + (_END if ends else "")

    def _beside(self, turn: Message) -> str:
        """Tools, and the form of the answer."""
        text = ""
        if turn.get("tools"):
            schemas = "\n".join(_json(each["function"]) for each in turn["tools"])
            template = self._needed(self._texts.tools, "tools")
            text += "\n\n" + template.fill(tool_schemas=schemas, **_PLACES)
        if turn.get("response_format"):
            template = self._needed(self._texts.response_format, "response_format")
            text += "\n\n" + template.fill(schema=_json(turn["response_format"]))
        return text

    def _needed(self, text: Template | None, what: str) -> Template:
        if text is None:
            raise RequestError(f"{what} need a text that {self._place}; leave {what} out")
        return text

    @property
    def _place(self) -> str:
        return f"this checkpoint does not have in {FILE}, which its release brings"

    def _thinking(self, variables: Mapping[str, Any]) -> bool:
        said = {
            name: _flag(name, variables[name], True)
            for name in _SWITCHES
            if variables.get(name) is not None
        }
        if variables.get("reasoning_effort") == "none":
            said["reasoning_effort='none'"] = False
        if len(set(said.values())) > 1:
            raise RequestError(f"{' and '.join(said)} contradict each other: give one of them")
        return next(iter(said.values()), True)

    def _effort(self, asked: Any, thinking: bool) -> str:
        if asked is not None and asked != "none" and asked not in _EFFORTS:
            raise RequestError(
                f"reasoning_effort={shown(asked)}: give one of none, {', '.join(_EFFORTS)}"
            )
        if not thinking or asked in (None, "none"):
            return self._default if thinking else ""
        if self._texts.efforts is None:
            raise RequestError(f"reasoning_effort={shown(asked)} needs a text that {self._place}")
        known = dict(self._texts.efforts)
        wanted = _EFFORTS[_EFFORTS.index(asked) :]
        return known[next(each for each in wanted if each in known)]

    @property
    def _default(self) -> str:
        return dict(self._texts.efforts or ()).get(self._texts.default_effort or "", "")


@functools.lru_cache(maxsize=8)
def deepseek_v4_chat(texts: EncoderTexts) -> DeepSeekV4Chat:
    """The one of these texts."""
    return DeepSeekV4Chat(texts)


def _turns(messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Message]:
    """Messages with tools where they are told, and all that comes from outside between two answers
    as one turn."""
    given = [_checked(f"messages[{at}]", each) for at, each in enumerate(messages)]
    if tools:
        if given[0]["role"] not in ("system", "developer"):
            given.insert(0, {"role": "system", "content": ""})
        given[0]["tools"] = [*(given[0].get("tools") or ()), *tools]
    turns: list[Message] = []
    order: dict[str, int] = {}
    for message in given:
        role = message["role"]
        if role not in ("user", "tool"):
            if calls := message.get("tool_calls"):
                order = {each["id"]: at for at, each in enumerate(calls) if each.get("id")}
            turns.append(message)
            continue
        if not turns or turns[-1]["role"] != "user" or (role == "user" and "task" in turns[-1]):
            turns.append({"role": "user", "parts": [], "results": []})
        turn = turns[-1]
        if "task" in message:
            turn["task"] = message["task"]
        content = message.get("content") or ""
        if role == "tool":
            turn["results"].append(
                (order.get(message.get("tool_call_id", ""), 0), len(turn["parts"]))
            )
            content = f"<tool_result>{content}</tool_result>"
        turn["parts"].append(content)
    for turn in turns:
        _sort_results(turn)
    return turns


def _sort_results(turn: Message) -> None:
    """Results of tools in the order in which they were called; other text stays where it is."""
    results = turn.get("results", ())
    # Results of calls that were not made keep their order before all others.
    called = [place for _, place in sorted(results, key=lambda each: each[0])]
    texts = [turn["parts"][place] for place in called]
    for (_, place), text in zip(results, texts, strict=True):
        turn["parts"][place] = text


def _checked(place: str, message: Message) -> Message:
    """A message whose content is a string and whose further keys are what they should be."""
    found, role, content = dict(message), message["role"], message.get("content")
    if content is not None and not isinstance(content, str):
        between = "\n\n" if role == "tool" else "\n"
        found["content"] = between.join(each["text"] for each in content)
    for key in ("reasoning_content", "task", "tool_call_id"):
        if key in found and not isinstance(found[key], str):
            raise RequestError(f"{place}.{key}={short(found[key])}: give a string")
    if found.get("task", _TASKS[0]) not in _TASKS:
        raise RequestError(f"{place}.task={short(found['task'])}: give one of {', '.join(_TASKS)}")
    for key in ("tools", "response_format"):
        if key in found and role not in ("system", "developer"):
            raise RequestError(f"{place} has {key}: messages of system or developer can have it")
    if "tools" in found:
        found["tools"] = read_tools(found["tools"])
    for call in found.get("tool_calls", ()):
        if not isinstance(call.get("id", ""), str):
            raise RequestError(f"{place}.tool_calls: id={short(call['id'])}: give a string")
    return found


def _last_user(turns: Sequence[Message]) -> int:
    found = [at for at, each in enumerate(turns) if each["role"] in ("user", "developer")]
    return found[-1] if found else -1


def _without_thoughts(turns: Sequence[Message]) -> list[Message]:
    """Without what was thought, and what developers said, before the last user's turn."""
    last = _last_user(turns)
    kept = [each for at, each in enumerate(turns) if at >= last or each["role"] != "developer"]
    if len(kept) < len(turns):
        _log_dropped()
    return kept


@functools.cache  # once, not for each request
def _log_dropped() -> None:
    logger.warning(
        "messages of role 'developer' before the last turn are left out, as this model was "
        "trained: give role 'system', or drop_thinking=False in chat_template_kwargs"
    )


def _transition(turn: Message, thinking: bool, thought: bool) -> str:
    """What leads to an answer."""
    task = turn.get("task")
    if task is not None:
        head = _ASSISTANT + (_OPEN if thinking else _CLOSE) if task == "action" else ""
        return f"{head}<｜{task}｜>"
    if turn["role"] not in ("user", "developer"):
        return ""
    return _ASSISTANT + (_OPEN if thought else _CLOSE)


def _calls(calls: Sequence[Message] | None) -> str:
    if not calls:
        return ""
    blocks = "\n".join(_call(each["function"]) for each in calls)
    return f"\n\n<{_DSML}tool_calls>\n{blocks}\n</{_DSML}tool_calls>"


def _call(function: Message) -> str:
    lines = [
        f'<{_DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}</{_DSML}parameter>"
        for key, value in function["arguments"].items()
    ]
    parameters = "\n".join(lines)
    return f'<{_DSML}invoke name="{function["name"]}">\n{parameters}\n</{_DSML}invoke>'


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"this is not JSON: {error}") from error


def _flag(name: str, value: Any, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)}: give True or False")
    return value

"""Requests, the scheduler and the step loop."""

from reprise.engine.chat import ContentFormat, chat_prompt
from reprise.engine.completion import CompletionGroup
from reprise.engine.draft_counts import DraftStats
from reprise.engine.engine import Engine, EngineStats
from reprise.engine.prompt import split_prompts
from reprise.engine.scheduler import Scheduler, SchedulerStats
from reprise.engine.thread import EngineThread

__all__ = [
    "CompletionGroup",
    "ContentFormat",
    "DraftStats",
    "Engine",
    "EngineStats",
    "EngineThread",
    "Scheduler",
    "SchedulerStats",
    "chat_prompt",
    "split_prompts",
]

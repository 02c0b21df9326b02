"""Requests, the scheduler and the step loop."""

from reprise.engine.completion import CompletionGroup
from reprise.engine.engine import Engine, EngineStats
from reprise.engine.prompt import chat_prompt, split_prompts
from reprise.engine.scheduler import Scheduler, SchedulerStats

__all__ = [
    "CompletionGroup",
    "Engine",
    "EngineStats",
    "Scheduler",
    "SchedulerStats",
    "chat_prompt",
    "split_prompts",
]

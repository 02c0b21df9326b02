"""Requests, the scheduler and the step loop."""

from reprise.engine.chat import ContentFormat, chat_prompt
from reprise.engine.completion import CompletionGroup
from reprise.engine.draft_counts import DraftStats
from reprise.engine.driver import Acceptance, Admit, Driver, Reader
from reprise.engine.engine import Engine
from reprise.engine.frontend import Frontend
from reprise.engine.prompt import split_prompts
from reprise.engine.questions import QUESTIONS, together
from reprise.engine.scheduler import Scheduler
from reprise.engine.scheduler_counts import SchedulerStats
from reprise.engine.stats import EngineStats
from reprise.engine.thread import EngineThread

__all__ = [
    "QUESTIONS",
    "Acceptance",
    "Admit",
    "CompletionGroup",
    "ContentFormat",
    "DraftStats",
    "Driver",
    "Engine",
    "EngineStats",
    "EngineThread",
    "Frontend",
    "Reader",
    "Scheduler",
    "SchedulerStats",
    "chat_prompt",
    "split_prompts",
    "together",
]

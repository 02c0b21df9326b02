from reprise.engine.request import *  # noqa
from reprise.engine.request import FinishReason, Request

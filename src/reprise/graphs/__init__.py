"""Capture, replay, verify: device graphs of any computation over static buffers.

Knows tensors, ops and platforms; knows nothing of models or requests.
"""

from reprise.graphs.buckets import Buckets, default_buckets, parse_buckets
from reprise.graphs.captures import Captures
from reprise.graphs.compiled import keep_compiled_code
from reprise.graphs.contract import Computation, Probe, State
from reprise.graphs.guard import Guard
from reprise.graphs.idle import nobody
from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.memory import predict
from reprise.graphs.outcome import Damage, Ran
from reprise.graphs.owners import GraphOwners
from reprise.graphs.plan import (
    Downgrade,
    Executor,
    GraphPlan,
    parse_plan,
    resolve,
)
from reprise.graphs.pool import GraphPool
from reprise.graphs.regions import Region
from reprise.graphs.report import GraphInfo, GraphMemory, GraphReport
from reprise.graphs.runner import GraphRunner
from reprise.graphs.segments import Break, Call, Segment, SegmentedGraph
from reprise.graphs.verify_mode import VerifyMode, parse_verify

__all__ = [
    "Break",
    "Buckets",
    "Call",
    "Captures",
    "Computation",
    "Damage",
    "Downgrade",
    "Executor",
    "Facts",
    "GraphInfo",
    "GraphMemory",
    "GraphOwners",
    "GraphPlan",
    "GraphPool",
    "GraphReport",
    "GraphRunner",
    "Guard",
    "Kind",
    "Probe",
    "Ran",
    "Region",
    "Segment",
    "SegmentedGraph",
    "State",
    "VerifyMode",
    "default_buckets",
    "keep_compiled_code",
    "nobody",
    "parse_buckets",
    "parse_plan",
    "parse_verify",
    "predict",
    "resolve",
]

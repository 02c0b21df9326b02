"""The graph matrix: every executor, bucket and context length, captured, verified and timed."""

from reprise.doctor.graphs.measure import default_buckets, default_contexts, measure
from reprise.doctor.graphs.page import write_page
from reprise.doctor.graphs.report import GraphMatrix

__all__ = ["GraphMatrix", "default_buckets", "default_contexts", "measure", "write_page"]

import time, torch, cProfile, pstats, sys
from reprise.graphs import prove
orig=prove.Prover._meet_others
def timed(self, cells, deadline):
    pr=cProfile.Profile() if len(sys.argv)>2 else None
    b=time.perf_counter()
    if pr: pr.enable()
    orig(self, cells, deadline)
    if pr: pr.disable()
    print("others", round(time.perf_counter()-b,3), "left", round(deadline-time.perf_counter(),3), sum(c.info.probes for c in cells), "of", sum(c.info.planned_probes for c in cells))
    if pr: pstats.Stats(pr).sort_stats("tottime").print_stats(40)
prove.Prover._meet_others=timed
from reprise import LLM
from reprise.bench.presets import engine_arguments
e = LLM(**engine_arguments(sys.argv[1], {"dtype":"bfloat16","max_model_len":4096,"graph_verify":"auto"})).engine
print("startup", e.startup_seconds, "verify", e.runner.graphs._verify_seconds)

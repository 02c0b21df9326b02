import time, torch, cProfile, pstats
from reprise.graphs import prove
from reprise.runner import probes as P
orig=prove.Prover.prove
import reprise.graphs.prove as pv
def prove_(self, cells, cs, pr):
    t=[]
    m=self._meet
    def meet(cell, n):
        b=time.perf_counter(); m(cell,n); t.append((cell.info.name,n,round(1e3*(time.perf_counter()-b),1)))
    self._meet=meet
    for name in ("begin","_plan","_drop_useless","_find_spoilers","_measure_bounds"):
        f=getattr(self,name)
        def g(*a,f=f,name=name):
            b=time.perf_counter(); r=f(*a); print(name, round(1e3*(time.perf_counter()-b),1)); return r
        setattr(self,name,g)
    b=time.perf_counter()
    orig(self,cells,cs,pr)
    print("prove", round(time.perf_counter()-b,3), "sum of meets", sum(x[2] for x in t)/1e3, len(t))
    print(t)
prove.Prover.prove=prove_
from reprise import LLM
from reprise.bench.presets import engine_arguments
import sys
e = LLM(**engine_arguments(sys.argv[1], {"dtype":"bfloat16","max_model_len":4096,"graph_verify":"auto"})).engine
print("startup", e.startup_seconds)

import cProfile, pstats, time, sys, torch
from reprise import LLM
from reprise.bench.presets import engine_arguments
from reprise.graphs.shape import StepShape
e = LLM(**engine_arguments("qwen3-0.6b", {"dtype":"bfloat16","max_model_len":4096,"graph_verify":"auto"})).engine
g = e.runner.graphs
p = g.platform
def t(f, n=5):
    f(); p.synchronize()
    b=time.perf_counter()
    for _ in range(n): f()
    p.synchronize()
    return 1e3*(time.perf_counter()-b)/n
with torch.inference_mode(), g.computation.ops.activate():
    for key in [("decode",1,1),("decode",1,64),("decode",1,256),("mixed",0,64),("mixed",0,1024),("mixed",0,4096)]:
        c = g.cells[key]
        pr = c.probes[min(1,len(c.probes)-1)]
        pr.fill()
        fw = lambda: g.computation.forward(c.shape, g.computation.model)
        print(key, "eager", round(t(fw),2), "replay", round(t(c.graph.replay),2), "fill", round(t(pr.fill),2),
              "state", round(t(lambda: g.computation.state(c.shape).read()),2), "near", round(t(lambda: g.computation.state(c.shape).near()),2),
              "memory", round(t(lambda: g.computation.memory()),2),
              "compare", round(t(lambda: g.prover.compare(c, pr)),2), flush=True)
    for key in [("decode",1,1),("decode",1,64)]:
        c = g.cells[key]; pr = c.probes[1]
        prof = cProfile.Profile(); prof.enable()
        for _ in range(5): g.prover.compare(c, pr)
        prof.disable()
        pstats.Stats(prof).sort_stats("cumtime").print_stats(45)

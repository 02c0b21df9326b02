import json,time,torch,sys,os,logging,random
logging.basicConfig(level=logging.INFO)
t=time.time()
from reprise import LLM, SamplingParams
llm=LLM(device="auto"); print("load",time.time()-t)
j=json.load(open("src/reprise/demo_model/held_out_additions.json")); pairs=j["pairs"]
for i in range(2):
    t=time.time(); outs=llm.generate([f"{a} + {b} =" for a,b in pairs[:500]],SamplingParams(temperature=0,max_tokens=6,stop="\n")); print(time.time()-t)
ok=sum(o.outputs[0].text.strip()==str(a+b) for o,(a,b) in zip(outs,pairs)); print("OK",ok)
t=time.time();o=llm.generate("Once upon a time",SamplingParams(temperature=0.7,max_tokens=200,seed=1)); print(time.time()-t,o[0].outputs[0].text)
ref=LLM(device="auto",ops={k:"reference" for k in ("rms_norm","fused_add_rms_norm","silu_and_mul","rotary_cache","paged_attention","sample")},dtype="float32")
tri=LLM(device="auto",dtype="float32")
P=["Once upon a time","12 + 34 =","There was a fox","Copy: a b c d\n"]
sp=SamplingParams(temperature=0,max_tokens=64)
a=[x.outputs[0].token_ids for x in ref.generate(P,sp)]; b=[x.outputs[0].token_ids for x in tri.generate(P,sp)]
print("fp32 ref==triton",a==b)
del ref,tri,llm
import gc; gc.collect(); torch.accelerator.empty_cache()
for name in ("qwen3-0.6b","qwen3-8b"):
    d="src/reprise/bench/configs/"+name
    t=time.time(); llm=LLM(d,load_format="dummy",dtype="bfloat16",skip_tokenizer_init=True,max_model_len=4096,enable_prefix_caching=False); print(name,"ready",time.time()-t)
    rng=random.Random(0)
    def run(bs,n_in,n_out):
        ps=[{"prompt_token_ids":[rng.randrange(150000) for _ in range(n_in)]} for _ in range(bs)]
        t=time.time(); llm.generate(ps,SamplingParams(temperature=0,max_tokens=n_out,ignore_eos=True)); return time.time()-t
    run(1,128,8); run(64,128,8)
    for bs,l,h in ((1,32,96),(64,16,48)):
        a=run(bs,128,l); b=run(bs,128,h); print(name,"bs",bs,"ms/step",(b-a)/(h-l)*1e3)
    from torch.profiler import profile
    with profile() as prof: run(1,128,20)
    print(prof.key_averages().table(sort_by="self_cuda_time_total",row_limit=14,max_name_column_width=50)[:4200])
    del llm; gc.collect(); torch.accelerator.empty_cache()

import torch, sys, logging
logging.basicConfig(level=logging.INFO)
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
c=Qwen3Config(vocab_size=256,hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2,head_dim=16,max_position_embeddings=256)
m=Qwen3ForCausalLM(c).eval(); m.save_pretrained("/tmp/tiny")
from reprise import LLM, SamplingParams
llm=LLM("/tmp/tiny",skip_tokenizer_init=True,device="cpu",max_num_seqs=8)
p=[{"prompt_token_ids":list(range(1,20))},{"prompt_token_ids":[5,6,7]},{"prompt_token_ids":[9]}]
o=llm.generate(p,SamplingParams(temperature=0,max_tokens=20,logprobs=1,prompt_logprobs=2))
for q,x in zip(p,o):
    ids=torch.tensor([q["prompt_token_ids"]])
    ref=m.generate(ids,max_new_tokens=20,do_sample=False)[0,ids.shape[1]:].tolist()
    print(x.outputs[0].token_ids==ref, x.outputs[0].token_ids, x.outputs[0].finish_reason)
from reprise.graphs.shape import StepShape
fp=llm.engine.runner.forward_pass
with torch.inference_mode(), fp.ops.activate():
    for b in (StepShape.decode(8),StepShape.decode(1),StepShape.mixed(64,8),StepShape.mixed(8,8),StepShape.mixed(256,8)):
        for pr in fp.probes(b):
            pr.fill(); st=fp.state(pr.live); before=st.read(); fp.forward(b); a=fp.outputs(b); a={k:v.clone() for k,v in a.items()}; w1=st.read(); st.write(before); pr.fill(); fp.forward(pr.live); c=fp.outputs(pr.live)
            w2=st.read()
            print(b,pr.name,pr.live, [(a[k][:v.shape[0]]-v).abs().max().item() for k,v in c.items()], max((w1[k]-w2[k]).abs().max().item() for k in w1), fp._buffers.seq_lens.device[:8].tolist())
o2=llm.generate(p,SamplingParams(temperature=0,max_tokens=20))
print([a.outputs[0].token_ids==b.outputs[0].token_ids for a,b in zip(o,o2)])

#!/usr/bin/env python3
"""What transformers computes from a model folder, as a reference file for build/conformance.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors transformers==5.17.0
    venv/bin/python tools/make_reference.py build/recall build/recall/reference.safetensors [TOKENS]
    build/conformance --model build/recall build/recall/reference.safetensors

TOKENS: a file of bytes, each a token (its first 512 are used); without it, random ones. The forward pass runs in float32 on the CPU
with DeepseekV32ForCausalLM's own top-k. `topk.{layer}` holds its lists, so that conformance can replay them.
"""
import sys

import torch
from safetensors.torch import save_file
from transformers import DeepseekV32ForCausalLM

torch.set_num_threads(2)


def main():
    folder, target = sys.argv[1:3]
    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if len(sys.argv) > 3:
        with open(sys.argv[3], "rb") as f:
            ids = torch.tensor([list(f.read(512))])
    else:
        ids = torch.randint(0, model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(1))
    out, lists = {}, {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.indexer.register_forward_hook(lambda _m, _i, o, n=number: lists.__setitem__(n, o))
    with torch.no_grad():
        out["logits"] = model(ids, use_cache=False).logits.float().contiguous()
    out["input_ids"] = ids.to(torch.int32)
    for number, chosen in lists.items():
        out[f"topk.{number}"] = chosen.to(torch.int32).contiguous()
    save_file(out, target, metadata={"source": "tools/make_reference.py, transformers DeepseekV32ForCausalLM, eager, f32"})
    print(f"{target}: {ids.shape[1]} tokens, {len(lists)} layers")


if __name__ == "__main__":
    main()

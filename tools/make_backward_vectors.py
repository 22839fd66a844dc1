#!/usr/bin/env python3
"""Gradients of whole attention layers and of attention with sinks by PyTorch's automatic differentiation, in float64 on the CPU.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors
    venv/bin/python tools/make_backward_vectors.py tests/vectors/backward/torch.safetensors

The layer is written out from spec chapters 2, 3 and 8 as plain multi-head attention, not absorbed: nothing is shared with dsa.h.
Inputs are rounded to float32 before use, so that both sides start from the same numbers.
"""
import json
import math
import sys

import torch
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


def uniform(generator, *shape, size=1.0, mean=0.0):
    x = (torch.rand(*shape, generator=generator) * 2 - 1) * size + mean
    return x.float().double().requires_grad_()


def frequencies(width, c):
    base = c["rope_theta"] ** (-2.0 * torch.arange(width // 2) / width)
    if c["rope_factor"] <= 1:
        return base

    def correction(rotations):
        return width * math.log(c["rope_original_context"] / (2 * math.pi * rotations)) / (2 * math.log(c["rope_theta"]))

    low, high = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return base * (1 - ramp) + base / c["rope_factor"] * ramp


def rotate(x, positions, half, c):
    """x [T, heads, width]"""
    width = x.shape[-1]
    angle = (positions[:, None] * frequencies(width, c))[:, None, :]
    # the library rounds cos and sin to float32 by contract; so must this, at large angles they are not free
    cos, sin = angle.cos().float().double(), angle.sin().float().double()
    if half:
        a, b = x[..., : width // 2], x[..., width // 2:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def rms_norm(x, gain, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def layer(c, w, x, positions, mode):
    """y, the sum of weighted KL, the KLs, the lists. The detach calls are the recipe."""
    T, H, R, r, nope, v = len(x), c["n_heads"], c["dim_latent"], c["dim_rope"], c["dim_nope"], c["dim_v"]
    qr = rms_norm(x @ w["q_a"].T, w["q_a_norm"], 1e-6)
    q = (qr @ w["q_b"].T).view(T, H, nope + r)
    q_nope, q_pe = q.split((nope, r), -1)
    q_pe = rotate(q_pe, positions, False, c)
    latent, k_pe = (x @ w["kv_a"].T).split((R, r), -1)
    latent = rms_norm(latent, w["kv_a_norm"], 1e-6)
    k_pe = rotate(k_pe[:, None], positions, False, c)
    k_nope, value = (latent @ w["kv_b"].T).view(T, H, nope + v).split((nope, v), -1)
    m = 0.1 * math.log(c["rope_factor"]) + 1 if c["rope_factor"] > 1 else 1.0
    scale = torch.tensor(m * m / math.sqrt(nope + r)).float().double()
    logits = scale * (torch.einsum("thd,shd->hts", q_nope, k_nope) + torch.einsum("thd,sd->hts", q_pe, k_pe[:, 0]))

    xd, qrd, HI, D, width = x.detach(), qr.detach(), c["n_index_heads"], c["dim_index"], c["index_rope_width"]
    iq = (qrd @ w["index_q_b"].T).view(T, HI, D)
    ik = torch.nn.functional.layer_norm(xd @ w["index_k"].T, (D,), w["index_k_norm"], w["index_k_bias"], 1e-6)[:, None]
    half = not c["index_rope_interleaved"]
    iq = torch.cat((rotate(iq[..., :width], positions, half, c), iq[..., width:]), -1)
    ik = torch.cat((rotate(ik[..., :width], positions, half, c), ik[..., width:]), -1)
    iw = xd @ w["index_w"].T / math.sqrt(HI * D)
    scores = (torch.relu(torch.einsum("thd,sd->ths", iq, ik[:, 0])) * iw[..., None]).sum(1)

    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    lists = torch.full((T, c["top_k"]), -1, dtype=torch.int32)
    if mode == "sparse":
        best, best_at = scores.detach().masked_fill(~allowed, -math.inf).topk(c["top_k"] + 1, -1)
        margin = (best[c["top_k"]:, -2] - best[c["top_k"]:, -1]).min().item()
        if margin < 2e-5:
            sys.exit(f"another seed: two scores at the cut differ by {margin} only, float32 may choose otherwise")
        best = best_at[:, :-1]
        allowed = torch.zeros_like(allowed).scatter(1, best, True) & allowed
    for t in range(T):
        seen = allowed[t].nonzero()[:, 0].to(torch.int32)
        if mode == "sparse":
            lists[t, : len(seen)] = seen
    a = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    y = torch.einsum("hts,shd->thd", a, value).flatten(1) @ w["o"].T
    p = a.sum(0).detach()
    p = p / p.sum(-1, keepdim=True)
    log_sigma = scores.masked_fill(~allowed, -math.inf).log_softmax(-1)
    kl = torch.where(allowed, torch.xlogy(p, p) - p * log_sigma.masked_fill(~allowed, 0), 0).sum(-1)
    return y, kl, lists


def layer_case(out, name, seed, mode, **changes):
    c = dict(n_heads=5, dim_latent=36, dim_rope=12, n_index_heads=6, dim_index=32, top_k=11, dim_hidden=56, dim_q_lora=40, dim_nope=20, dim_v=28,
             rope_theta=10000.0, rope_factor=1.0, rope_original_context=64.0, index_rope_interleaved=0, index_rope_width=12)
    c.update(changes)
    g = torch.Generator().manual_seed(seed)
    T, r = 70, c["dim_rope"]
    shapes = dict(q_a=(c["dim_q_lora"], c["dim_hidden"]), q_a_norm=(c["dim_q_lora"],), q_b=(c["n_heads"] * (c["dim_nope"] + r), c["dim_q_lora"]),
                  kv_a=(c["dim_latent"] + r, c["dim_hidden"]), kv_a_norm=(c["dim_latent"],),
                  kv_b=(c["n_heads"] * (c["dim_nope"] + c["dim_v"]), c["dim_latent"]), o=(c["dim_hidden"], c["n_heads"] * c["dim_v"]),
                  index_q_b=(c["n_index_heads"] * c["dim_index"], c["dim_q_lora"]), index_k=(c["dim_index"], c["dim_hidden"]),
                  index_k_norm=(c["dim_index"],), index_k_bias=(c["dim_index"],), index_w=(c["n_index_heads"], c["dim_hidden"]))
    w = {}
    for key, shape in shapes.items():
        if len(shape) == 2:
            w[key] = uniform(g, *shape, size=math.sqrt(3 / shape[1]))
        else:
            w[key] = uniform(g, *shape, size=0.3, mean=0.0 if key == "index_k_bias" else 1.0)
    x, d_y = uniform(g, T, c["dim_hidden"], size=1.7), uniform(g, T, c["dim_hidden"])
    positions = torch.arange(T) * (3 if c["rope_factor"] > 1 else 1)
    weight = 0.25
    y, kl, lists = layer(c, w, x, positions, mode)
    ((y * d_y.detach()).sum() + weight * kl.sum()).backward()
    c["mode"], c["index_weight"] = mode, weight
    out[f"{name}.positions"] = positions.to(torch.int64)
    out[f"{name}.lists"] = lists
    tensors = dict(x=x, d_y=d_y, y=y, kl=kl, d_x=x.grad)
    for key, value in w.items():
        tensors[f"w.{key}"], tensors[f"d.{key}"] = value, value.grad
    for key, value in tensors.items():
        out[f"{name}.{key}"] = value.detach().float().contiguous()
    return c


def attention_case(out, name, seed):
    """Lists with duplicates and invalid entries, an empty row, sinks."""
    g = torch.Generator().manual_seed(seed)
    T, N, H, R, r, k, scale = 9, 50, 7, 40, 8, 24, 0.125
    q, kv, sinks, d_out = uniform(g, T, H, R + r, size=2), uniform(g, N, R + r), uniform(g, H, size=2), uniform(g, T, H, R)
    lists = torch.randint(-4, N + 4, (T, k), generator=g, dtype=torch.int32)
    lists[3] = -1
    lists[5, 1:6] = lists[5, 0] = 17
    total = 0
    for t in range(T):
        rows = lists[t][(lists[t] >= 0) & (lists[t] < N)].long()
        x = scale * q[t] @ kv[rows].T
        p = torch.cat((x, sinks[:, None]), 1).softmax(-1)[:, :-1]
        total = total + ((p @ kv[rows][:, :R]) * d_out[t].detach()).sum()
    total.backward()
    out[f"{name}.lists"] = lists
    for key, value in dict(q=q, kv=kv, sinks=sinks, d_out=d_out, d_q=q.grad, d_kv=kv.grad, d_sinks=sinks.grad).items():
        out[f"{name}.{key}"] = value.detach().float().contiguous()
    return dict(n_heads=H, dim_latent=R, dim_rope=r, top_k=k, softmax_scale=scale)


def main():
    out = {}
    cases = {"sparse": layer_case(out, "sparse", 5, "sparse"), "dense": layer_case(out, "dense", 2, "dense"),
             "glm_yarn": layer_case(out, "glm_yarn", 3, "sparse", index_rope_interleaved=1, rope_factor=40.0),
             "sinks": attention_case(out, "sinks", 4)}
    meta = {"config": json.dumps(cases), "source": f"tools/make_backward_vectors.py, torch {torch.__version__} CPU, float64 autograd"}
    save_file(out, sys.argv[1], metadata=meta)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Experiment: kernels of one order along K for dense products, their bits beside the library's, and µs a call."""

import json, os, statistics, sys, time
from pathlib import Path

import torch
from torch import nn
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from epmoe.kernels import linear as today, norm as norm_triton, vocabulary as vocab_triton
from epmoe.kernels.gpu import early
from epmoe.kernels.product import product_kernel
from epmoe.kernels.product_few import few_kernel
from router_try import router_kernel

B16, dev = torch.bfloat16, "cuda"
RESULT = {}
BAD = set()


def layer(n, k, bias=True):
    l = nn.Linear(k, n, bias, device=dev, dtype=B16).requires_grad_(False)
    l.weight.normal_(0, 0.02)
    if bias: l.bias.normal_(0, 1)
    return l


def product(x, l, R, M, K, W, S, RUN=0, f32=False, pdl=True):
    t, n = len(x), len(l.weight)
    out = torch.empty(t, n, device=dev, dtype=torch.float32 if f32 else B16)
    opts = early(x.device) if pdl else {"PDL": False}
    product_kernel[(triton.cdiv(n, R), triton.cdiv(t, M))](x, l.weight, l.bias, out, t, 0, n, n, H=x.shape[1], R=R, M=M, K=K, RUN=RUN, num_warps=W, num_stages=S, **opts)
    return out


def few(x, l, R, M, K, W, S):
    t, n = len(x), len(l.weight)
    out = torch.empty(t, n, device=dev, dtype=B16)
    few_kernel[(triton.cdiv(n, R),)](x, l.weight, l.bias, out, t, n, H=x.shape[1], R=R, M=M, K=K, S=S, num_warps=W, **early(x.device))
    return out


def graph_us(calls, reps=20):
    for c in calls: c()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for c in calls: c()
    for _ in range(3): g.replay()
    ts = []
    for _ in range(reps):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / len(calls))
    return round(statistics.median(ts), 2)


def attempt(name, fn):
    if name in BAD: return None
    try: return fn()
    except Exception as e:
        BAD.add(name); print("FAILED", name, repr(e)[:300].replace("\n", " "), flush=True)


def bits():
    print("== bits: T at which the library differs (of those tried)")
    many = [*range(1, 301), 320, 384, 448, 512, 600, 777, 1000, 1024, 1500, 2048, 3000, 4096, 5000, 6144, 8192]
    for n, k in ((5120, 2880), (2560, 2880), (1280, 2880), (640, 2880), (2880, 4096), (32, 2880), (128, 2880)):
        l = layer(n, k); x = torch.randn(8192, k, device=dev, dtype=B16)
        want = product(x, l, 64, 64, 64, 4, 5)
        for tile in ((16, 8, 128, 1, 6), (16, 16, 128, 4, 6), (64, 16, 128, 4, 4), (64, 32, 128, 4, 5), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)):
            got = attempt(f"bits {tile}", lambda: product(x[:512], l, *tile))
            if got is not None and not torch.equal(got, want[:512]): print("DIFFER", n, k, tile, (got != want[:512]).sum().item())
        for T in (1, 2, 3, 5, 8):
            got = attempt("bits few", lambda: few(x[:T], l, 16, 8, 256, 1, 4))
            if got is not None and not torch.equal(got, want[:T]): print("DIFFER few", n, k, T, (got != want[:T]).sum().item())
        if got is not None: print("few ok" , n, k)
        bad = [T for T in many if not torch.equal(F.linear(x[:T], l.weight, l.bias), want[:T])]
        l0 = nn.Linear(k, n, False, device=dev, dtype=B16).requires_grad_(False); l0.weight.copy_(l.weight)
        want0 = product(x, l0, 64, 64, 64, 4, 5)
        bad0 = [T for T in many if not torch.equal(F.linear(x[:T], l.weight), want0[:T])]
        RESULT[f"library differs {n}x{k}"] = {"bias": bad, "none": bad0}
        print(n, k, "bias", len(bad), bad[:3], bad[-3:], "none", len(bad0), bad0[:3], bad0[-3:], flush=True)
    V, k = 201088, 2880
    w = torch.empty(16384, k, device=dev, dtype=B16).normal_(0, 0.02)
    l = nn.Linear(k, 16384, False, device="meta"); l.weight = nn.Parameter(w, False)
    x = torch.randn(1024, k, device=dev, dtype=B16)
    want = product(x, l, 64, 64, 64, 4, 5, f32=True)
    old = vocab_triton.part_logits(x[:64], w, (0, 16384), 16384)
    print("vocabulary kernel of today equal:", torch.equal(old, want[:64]))
    for n in (16384, 4480):
        bad = []
        for T in [*range(1, 301), 320, 384, 512, 640, 1000, 1024]:
            buf = torch.empty(T, V, device=dev)
            torch.mm(x[:T], w[:n].T, out_dtype=torch.float32, out=buf[:, :n])
            if not torch.equal(buf[:, :n], want[:T, :n]): bad.append(T)
        RESULT[f"vocab differs {n}"] = bad
        print("vocabulary f32 strided", n, len(bad), bad[:5], bad[-5:], flush=True)
    for T in (512, 4096, 8192):  # what a check of 50 sizes would cost
        pass


def timing():
    ones = torch.ones(4096, device=dev, dtype=B16)
    fews = [(16, 8, 256, 1, 3), (16, 8, 256, 1, 4), (16, 8, 256, 1, 5), (16, 8, 512, 1, 3), (16, 8, 128, 1, 6), (16, 8, 128, 1, 8), (32, 8, 256, 2, 3), (32, 8, 128, 2, 4), (32, 8, 128, 2, 6), (16, 8, 256, 2, 4), (64, 8, 128, 4, 4)]
    fews16 = [(16, 16, 256, 1, 4), (16, 16, 128, 1, 6), (32, 16, 128, 2, 4), (32, 16, 128, 2, 6), (64, 16, 128, 4, 4)]
    tiles = {8: [(16, 8, 128, 1, 6), (16, 8, 128, 4, 6), (16, 8, 256, 1, 4), (16, 8, 256, 4, 4), (32, 8, 128, 4, 6)],
             16: [(16, 16, 128, 4, 6), (16, 16, 128, 1, 6), (64, 16, 128, 4, 6), (64, 16, 128, 4, 4), (32, 16, 128, 4, 6)],
             32: [(16, 32, 128, 4, 6), (64, 32, 128, 4, 5), (32, 32, 128, 4, 5), (64, 32, 128, 4, 4)],
             64: [(64, 64, 128, 4, 4), (64, 64, 64, 4, 6), (64, 32, 128, 4, 4), (32, 64, 128, 4, 4)],
             128: [(64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3)],
             256: [(64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]}
    for n, k in ((5120, 2880), (2880, 4096), (640, 2880), (1280, 2880), (2560, 2880)):
        big = n > 2600
        copies = [layer(n, k) for _ in range(max(3, int(260e6 / (n * k * 2)) + 1))]
        calls = 2 * len(copies)
        for T in (1, 2, 4, 8, 16, 32, 48, 64, 128, 256) if big else (1, 4, 16, 64):
            x = torch.randn(T, k, device=dev, dtype=B16); rows = torch.randn(T, 1, k, device=dev, dtype=B16)
            def chain(fn):
                def one(i):
                    def go():
                        y = norm_triton.add_norm(x, rows, ones[:k], 1e-5)[1]
                        return fn(y, copies[i % len(copies)]) if fn else y
                    return go
                return graph_us([one(i) for i in range(calls)])
            row = {"norm": chain(None), "library": chain(lambda y, l: F.linear(y, l.weight, l.bias))}
            if T <= 4: row["today"] = attempt("today", lambda: chain(lambda y, l: today.linear(y, l))) if T <= 2 else None
            bucket = next(b for b in (8, 16, 32, 64, 128, 256) if T <= b)
            cands = [("p", t) for t in tiles[bucket]] + ([("p", t) for t in tiles[16]] if bucket == 8 else [])
            cands += [("f", t) for t in (fews if bucket == 8 else fews16 if bucket == 16 else [])]
            for kind, t in cands:
                f = product if kind == "p" else few
                v = attempt(f"{kind} {t}", lambda: chain(lambda y, l: f(y, l, *t)))
                if v: row[f"{kind}{'x'.join(map(str, t))}"] = v
            RESULT[f"{n}x{k} T={T}"] = row
            best = sorted((v, c) for c, v in row.items() if c[0] in "pf" and v)
            print(f"{n}x{k} T={T} norm {row['norm']} library {row['library']} today {row.get('today')} |", " ".join(f"{c} {v}" for v, c in best[:9]), flush=True)


def router():
    H = 2880
    ones = torch.ones(H, device=dev, dtype=B16)
    def fused(x, rows, l, B, M, W):
        T, E = len(x), len(l.weight)
        s, nm, out = torch.empty_like(x), torch.empty_like(x), x.new_empty(T, E)
        router_kernel[(T, triton.cdiv(E, B))](x, rows, ones, l.weight, l.bias, s, nm, out, 1e-5, H=H, K=1, E=E, B=B, HP=4096, M=M, num_warps=W, **early(x.device))
        return s, nm, out
    for E in (32, 128):
        ls = [layer(E, H) for _ in range(24)]
        pad = torch.empty(256 << 20, dtype=torch.uint8, device=dev)
        x = torch.randn(4096, H, device=dev, dtype=B16); rows = torch.randn(4096, 1, H, device=dev, dtype=B16)
        s0, n0 = norm_triton.add_norm(x, rows, ones, 1e-5)
        want = product(n0, ls[0], 32, 64, 64, 4, 4, RUN=512)
        for c in ((16, 8, 8), (16, 8, 16), (8, 16, 8), (16, 8, 4)):
            r = attempt(f"fused {c}", lambda: fused(x[:64], rows[:64], ls[0], *c))
            if r: print("router bits", E, c, "sum", torch.equal(r[0], s0[:64]), "norm", torch.equal(r[1], n0[:64]), "logits", torch.equal(r[2], want[:64]), flush=True)
        for t in ((16, 16, 128, 4, 4), (16, 32, 128, 4, 4), (32, 128, 64, 4, 4), (16, 16, 64, 1, 8), (64, 64, 64, 4, 4), (16, 16, 256, 4, 4)):
            r = attempt(f"run {t}", lambda: product(n0, ls[0], *t, RUN=512))
            if r is not None: print("router run bits", E, t, torch.equal(r, want))
        ref = (n0.double() @ ls[0].weight.double().T + ls[0].bias.double())
        print("error", ((want.double() - ref).norm() / ref.norm()).item())
        for T in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
            xs, rs = x[:T], rows[:T]
            row = {"norm": graph_us([lambda: norm_triton.add_norm(xs, rs, ones, 1e-5)] * 24)}
            row["library"] = graph_us([lambda l=l: F.linear(norm_triton.add_norm(xs, rs, ones, 1e-5)[1], l.weight, l.bias) for l in ls])
            row["today"] = graph_us([lambda l=l: norm_triton.add_norm_linear(xs, rs, ones, 1e-5, l) for l in ls])
            if T <= 128:
                for c in ((16, 8, 8), (16, 8, 16), (8, 16, 8)):
                    row[f"fused{c}"] = attempt(f"fused {c}", lambda: graph_us([lambda l=l: fused(xs, rs, l, *c) for l in ls]))
            for t in ((16, 16, 128, 4, 4), (16, 16, 128, 1, 6), (16, 16, 256, 4, 4), (16, 32, 128, 4, 4), (32, 32, 128, 4, 4), (32, 64, 64, 4, 4), (32, 128, 64, 4, 4), (64, 64, 64, 4, 4)):
                if t[1] <= max(16, T):
                    row[f"run{t}"] = attempt(f"run {t}", lambda: graph_us([lambda l=l: product(norm_triton.add_norm(xs, rs, ones, 1e-5)[1], l, *t, RUN=512) for l in ls]))
            RESULT[f"router {E} T={T}"] = row
            print(f"router {E} T={T}", " ".join(f"{a} {b}" for a, b in row.items()), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for part in sys.argv[1:]:
        t = time.time(); globals()[part](); print(f"-- {part} {time.time() - t:.0f} s", flush=True)
        if "OUT" in os.environ: Path(os.environ["OUT"], "dense.json").write_text(json.dumps(RESULT))

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
from router_try import router_kernel, runs_kernel
from few_try import few3_kernel, norm_first_kernel

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


def few3(x, l, W, ROWS, M, K, S, EV=""):
    t, n = len(x), len(l.weight)
    out = torch.empty(t, n, device=dev, dtype=B16)
    few3_kernel[(triton.cdiv(n, W * ROWS),)](x, l.weight, l.bias, out, t, n, H=x.shape[1], R=16 * W, M=M, K=K, S=S, ROWS=ROWS, EVICT=EV, num_warps=W, **early(x.device))
    return out


def norm1(x, rows, w, first=False, warps=16, pdl=True):
    s, nm = torch.empty_like(x), torch.empty_like(x)
    opts = early(x.device) if pdl else {"PDL": True}
    norm_first_kernel[(len(x),)](x, rows, w, s, nm, 1e-5, H=x.shape[1], HP=4096, FIRST=first, num_warps=warps, **opts)
    return s, nm


H = 2880
ONES = torch.ones(4096, device=dev, dtype=B16)


def fused(x, rows, l, B, S, PRE, FIRST, W):
    T, E = len(x), len(l.weight)
    s, nm, out = torch.empty_like(x), torch.empty_like(x), x.new_empty(T, E)
    router_kernel[(T, triton.cdiv(E, B))](x, rows, ONES, l.weight, l.bias, s, nm, out, 1e-5, H=H, K=1, E=E, B=B, HP=4096, S=S, PRE=PRE, FIRST=FIRST, SIDE=1, num_warps=W, **early(x.device))
    return s, nm, out


def runs(x, l, Sr, R, M, CK, W, S):
    T, E = len(x), len(l.weight)
    out = x.new_empty(T, E)
    runs_kernel[(triton.cdiv(E, R), triton.cdiv(T, M))](x, l.weight, l.bias, out, T, E, H=H, HP=4096, S=Sr, R=R, M=M, CK=CK, num_warps=W, num_stages=S, **early(x.device))
    return out


def timing():
    P8 = [(1, 16, 8, 256, 4), (1, 16, 8, 256, 5), (1, 16, 8, 512, 3), (1, 10, 8, 256, 4), (1, 10, 8, 256, 3), (1, 10, 8, 128, 8), (1, 10, 8, 128, 6), (1, 10, 8, 512, 2), (2, 10, 8, 256, 4), (2, 10, 8, 256, 5), (4, 10, 8, 256, 4), (4, 10, 8, 256, 5), (2, 10, 8, 512, 3), (4, 10, 8, 512, 3), (4, 10, 8, 128, 8), (1, 8, 8, 256, 3), (1, 10, 8, 256, 4, "evict_first")]
    O8 = [(1, 16, 8, 256, 5), (1, 11, 8, 256, 5), (1, 11, 8, 256, 8), (1, 11, 8, 512, 4), (1, 8, 8, 256, 5), (1, 8, 8, 256, 4), (2, 11, 8, 256, 5), (2, 11, 8, 256, 8), (2, 11, 8, 512, 4), (4, 11, 8, 256, 5), (1, 11, 8, 128, 12), (1, 11, 8, 256, 8, "evict_first"), (2, 6, 8, 256, 8)]
    with16 = lambda c: [(a[0], a[1], 16, *a[3:]) for a in c if a[0] * a[3] * a[4] <= 4 * 256 * 5]
    for n, k, cands in ((5120, 2880, P8), (2880, 4096, O8), (640, 2880, P8[:6] + O8), (2560, 2880, P8 + O8)):
        copies = [layer(n, k) for _ in range(max(3, int(260e6 / (n * k * 2)) + 1))]
        calls = 2 * len(copies)
        xs = torch.randn(16, k, device=dev, dtype=B16)
        want = product(xs, copies[0], 64, 64, 64, 4, 5)
        for t in cands + with16(cands):
            for T in (1, 3, 8, 16):
                if T <= t[2]:
                    got = attempt(f"g{t}", lambda: few3(xs[:T], copies[0], *t))
                    if got is not None and not torch.equal(got, want[:T]): print("DIFFER", n, k, t, T); BAD.add(f"g{t}")
        for T in (1, 2, 8, 16) if n > 2600 else (1, 16):
            x = torch.randn(T, k, device=dev, dtype=B16); rows = torch.randn(T, 1, k, device=dev, dtype=B16)
            def chain(fn, first):
                def one(i):
                    def go():
                        y = norm1(x, rows, ONES[:k], first)[1]
                        return fn(y, copies[i % len(copies)]) if fn else y
                    return go
                return graph_us([one(i) for i in range(calls)])
            row = {"norm": chain(None, False), "norm first": chain(None, True), "library": chain(lambda y, l: F.linear(y, l.weight, l.bias), False)}
            if T <= 2: row |= {"today": chain(lambda y, l: today.linear(y, l), False), "today first": chain(lambda y, l: today.linear(y, l), True)}
            for t in cands if T <= 8 else with16(cands):
                for first in (False, True):
                    v = attempt(f"g{t}", lambda: chain(lambda y, l: few3(y, l, *t), first))
                    if v: row[f"{'first ' if first else ''}g{'x'.join(map(str, t))}"] = v
            if T == 16: row["gp64x16x128x4x6"] = chain(lambda y, l: product(y, l, 64, 16, 128, 4, 6), False)
            RESULT[f"{n}x{k} T={T}"] = row
            best = sorted((v, c) for c, v in row.items() if "g" in c and v)
            print(f"{n}x{k} T={T}", " ".join(f"{c} {v};" for c, v in row.items() if "g" not in c), "|", " ".join(f"{c} {v};" for v, c in best[:16]), flush=True)


def whole():
    """norm, q/k/v, a small kernel in attention's place, output, norm with router: µs a layer, all weights cold."""
    Q, O, R = [layer(5120, 2880) for _ in range(12)], [layer(2880, 4096) for _ in range(12)], [layer(32, 2880) for _ in range(12)]
    R128 = [layer(128, 2880) for _ in range(12)]
    for T in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x = torch.randn(T, H, device=dev, dtype=B16); y0 = torch.randn(T, 4096, device=dev, dtype=B16); r0 = torch.randn(T, 4, H, device=dev, dtype=B16)
        z0 = torch.randn(T, 1, 4096, device=dev, dtype=B16)
        def seq(qkv, out, router, first, E=32):
            def one(i):
                def go():
                    nm = (norm1(x, r0[:, :1].contiguous() if T > 1 else r0[:, :1], ONES[:H], first)[1])
                    q = qkv(nm, Q[i % 12])
                    y = norm1(y0, z0, ONES, True, 16, False)[1]
                    o = out(y, O[i % 12])
                    return router(x, o[:, None], (R if E == 32 else R128)[i % 12])
                return go
            return graph_us([one(i) for i in range(24)])
        lib = lambda v, l: F.linear(v, l.weight, l.bias)
        old = (lambda v, l: today.linear(v, l)) if T <= 2 else lib
        oldr = lambda x, r, l: norm_triton.add_norm_linear(x, r, ONES[:H], 1e-5, l)
        row = {"today": seq(old, lib if T > 2 else old, oldr, False), "today again": seq(old, lib if T > 2 else old, oldr, False), "today 128": seq(old, lib if T > 2 else old, oldr, False, 128)}
        if T <= 16:
            M = 8 if T <= 8 else 16
            for qc in ((1, 16, M, 512, 3), (1, 16, M, 256, 4), (1, 10, M, 256, 4), (2, 10, M, 256, 4), (4, 10, M, 256, 4)):
                for oc in ((1, 16, M, 256, 5), (1, 11, M, 256, 5), (2, 11, M, 256, 5)):
                    for rc in (None, (8, 16, 0, 0, 16), (8, 16, 1, 0, 16), (8, 16, 1, 1, 16), (8, 8, 1, 1, 16)):
                        for first in (False, True):
                            if rc is not None and (qc[1], oc[1]) not in ((10, 11), (16, 16)): continue
                            if rc is None and not first: continue
                            rt = oldr if rc is None else (lambda x, r, l: fused(x, r, l, *rc))
                            row[f"q{qc} o{oc} r{rc} {first}"] = attempt(f"w{qc}{oc}{rc}", lambda: seq(lambda v, l: few3(v, l, *qc), lambda v, l: few3(v, l, *oc), rt, first))
            rt = lambda x, r, l: fused(x, r, l, 8, 16, 1, 0, 16)
            row["today but router"] = seq(old, old, rt, False)
            for rc in ((8, 16, 0, 0, 16), (8, 16, 1, 1, 16)):
                row[f"128 r{rc}"] = attempt("w128", lambda: seq(lambda v, l: few3(v, l, 1, 10, M, 256, 4), lambda v, l: few3(v, l, 1, 11, M, 256, 5), lambda x, r, l: fused(x, r, l, *rc), True, 128))
        else:
            for rc in ((8, 16, 0, 0, 16), (8, 8, 0, 0, 16)):
                if T <= 128: row[f"lib fused{rc}"] = seq(lib, lib, lambda x, r, l: fused(x, r, l, *rc), True)
        for first in (False, True):
            row[f"lib, runs 8 {first}"] = seq(lib, lib, lambda x, r, l: runs(norm1(x, r, ONES[:H], first)[1], l, 8, 16, 8, 64, 8, 4), first)
        RESULT[f"whole T={T}"] = row
        few = sorted((v, c) for c, v in row.items() if v and c[0] == "q")
        print(f"whole T={T}", " ".join(f"{c} {v};" for c, v in row.items() if c[0] != "q"), "|", " ".join(f"{c} {v};" for v, c in few[:24]), flush=True)


def router():
    FUSED = [(8, 8, 0, 0, 16), (8, 8, 1, 0, 16), (8, 16, 0, 0, 16), (8, 16, 1, 0, 16), (8, 16, 1, 1, 16)]
    RUNS = [(8, 16, 8, 64, 8, 4), (8, 16, 8, 64, 8, 3), (8, 16, 8, 128, 8, 2), (8, 16, 8, 64, 4, 4), (16, 16, 8, 32, 8, 4), (16, 16, 8, 64, 8, 3), (16, 16, 8, 64, 16, 3), (8, 16, 16, 64, 8, 3), (16, 16, 16, 32, 8, 3), (8, 32, 16, 64, 8, 3), (8, 32, 16, 32, 8, 4), (16, 32, 16, 32, 8, 3), (8, 32, 32, 32, 8, 3), (8, 64, 16, 32, 8, 3), (8, 64, 32, 32, 8, 2)]
    SEQ = [(128, 64, 64, 8, 4), (128, 32, 64, 4, 4), (32, 64, 128, 4, 3), (32, 32, 128, 4, 4), (128, 64, 128, 8, 3), (64, 64, 128, 4, 3), (32, 128, 128, 8, 3)]
    for E in (32, 128):
        ls = [layer(E, H) for _ in range(24)]
        x = torch.randn(4096, H, device=dev, dtype=B16); rows = torch.randn(4096, 1, H, device=dev, dtype=B16)
        n0 = norm1(x, rows, ONES[:H])[1]
        l = ls[0]
        want = {8: product(n0, l, 32, 64, 64, 4, 4, RUN=512), 16: product(n0, l, 32, 64, 64, 4, 4, RUN=256)}
        for c in FUSED:
            r = attempt(f"fused {c}", lambda: fused(x[:300], rows[:300], l, *c))
            if r: print("router bits", E, c, "norm", torch.equal(r[1], n0[:300]), "logits", torch.equal(r[2], want[c[1]][:300]), flush=True)
        for c in RUNS:
            r = attempt(f"runs {c}", lambda: runs(n0, l, *c))
            if r is not None: print("runs bits", E, c, torch.equal(r, want[c[0]]))
        for c in SEQ:
            r = attempt(f"seq {c}", lambda: product(n0, l, *c, RUN=256))
            if r is not None and not torch.equal(r, want[16]): print("seq DIFFER", c)
        for T in (1, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096):
            xs, rs = x[:T], rows[:T]
            row = {"norm": graph_us([lambda: norm1(xs, rs, ONES[:H])] * 24)}
            row["today"] = graph_us([lambda l=l: norm_triton.add_norm_linear(xs, rs, ONES[:H], 1e-5, l) for l in ls])
            if T <= 128:
                for c in FUSED: row[f"fused{c}"] = attempt(f"fused {c}", lambda: graph_us([lambda l=l: fused(xs, rs, l, *c) for l in ls]))
            for c in RUNS: row[f"runs{c}"] = attempt(f"runs {c}", lambda: graph_us([lambda l=l: runs(norm1(xs, rs, ONES[:H])[1], l, *c) for l in ls]))
            if T >= 1024:
                for c in SEQ: row[f"seq{c}"] = attempt(f"seq {c}", lambda: graph_us([lambda l=l: product(norm1(xs, rs, ONES[:H])[1], l, *c, RUN=256) for l in ls]))
            RESULT[f"router {E} T={T}"] = row
            best = sorted((v, c) for c, v in row.items() if v and c[:4] in ("fuse", "runs", "seq("))
            print(f"router {E} T={T} norm {row['norm']} today {row['today']} |", " ".join(f"{a} {b};" for b, a in best[:12]), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for part in sys.argv[1:]:
        t = time.time(); globals()[part](); print(f"-- {part} {time.time() - t:.0f} s", flush=True)
        if "OUT" in os.environ: Path(os.environ["OUT"], "dense.json").write_text(json.dumps(RESULT))

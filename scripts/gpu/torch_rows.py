"""Times the rows of `tiebeam bench` in PyTorch on CUDA, by the same family and shape: python3 scripts/gpu/torch_rows.py [group...].
Prints one JSON line per row, with the median ms: device time for kernels, wall time for steps and dispatches."""
import json, math, os, sys, time
import torch, torch.nn.functional as F
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
dev = "cuda"

def timed(f, sets=1, budget=0.6):
    for i in range(3): f(i % sets)
    torch.cuda.synchronize()
    t0 = time.perf_counter(); f(0); torch.cuda.synchronize(); one = time.perf_counter() - t0
    inner = max(1, min(200, int(0.02 / max(one, 1e-6))))
    out, began = [], time.perf_counter()
    while len(out) < 7 or (time.perf_counter() - began < budget and len(out) < 50):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for i in range(inner): f(i % sets)
        b.record(); torch.cuda.synchronize(); out.append(a.elapsed_time(b) / inner)
    out.sort(); return out[len(out) // 2]

def wall(f, n=15):
    for _ in range(3): f()
    torch.cuda.synchronize(); s = []
    for _ in range(n):
        t0 = time.perf_counter(); f(); torch.cuda.synchronize(); s.append((time.perf_counter() - t0) * 1e3)
    s.sort(); return s[n // 2]

def say(op, shape, ms, bytes_=0, flops=0, **kw):
    row = dict(peer="torch " + torch.__version__, adapter=torch.cuda.get_device_name(), family=op, shape=shape, median_ms=round(ms, 5))
    if bytes_: row["gbps"] = round(bytes_ / ms * 1e-6, 1)
    if flops: row["gflops"] = round(flops / ms * 1e-6, 1)
    row.update(kw); print(json.dumps(row), flush=True)

def many(*shapes, dtype=torch.float32):
    size = sum(math.prod(s) for s in shapes) * 4
    return [[torch.randn(s, device=dev, dtype=dtype) for s in shapes] for _ in range(1 + min(7, (256 << 20) // size))]

@torch.no_grad()
def matmul():
    for b, m, n, k in [(1,256,256,256),(1,512,512,512),(1,1024,1024,1024),(1,2048,768,768),(32,128,128,64),(1,1,2048,2048),(1,8,2048,2048),(1,2048,8,2048),(1,64,64,16384),(1,2048,2048,2048),(1,4096,4096,4096)]:
        x = many((b, m, k), (b, k, n)) if b > 1 else many((m, k), (k, n))
        say("matmul", f"{b}x({m}x{k}x{n})" if b > 1 else f"{m}x{k}x{n}", timed(lambda i: x[i][0] @ x[i][1], len(x)), 4*b*(m*k+k*n+m*n), 2*b*m*n*k)
    for s in (1024, 4096):
        x = many((s, s), (s, s), dtype=torch.float16)
        say("matmul f16", f"{s}x{s}x{s}", timed(lambda i: x[i][0] @ x[i][1], len(x)), 6*s*s, 2*s**3)
    torch.backends.cuda.matmul.allow_tf32 = True
    x = many((4096, 4096), (4096, 4096)); say("matmul tf32", "4096", timed(lambda i: x[i][0] @ x[i][1], len(x)), 12*4096**2, 2*4096**3)
    torch.backends.cuda.matmul.allow_tf32 = False

@torch.no_grad()
def rows():
    for r in (256, 1024, 4096):
        x = many((r, 1024)); say("softmax", f"{r}x1024", timed(lambda i: torch.softmax(x[i][0], -1), len(x)), 8*r*1024)
        x = many((r, 768)); g, b = torch.ones(768, device=dev), torch.zeros(768, device=dev)
        say("layer_norm", f"{r}x768", timed(lambda i: F.layer_norm(x[i][0], (768,), g, b), len(x)), 8*r*768)
    chain = lambda x, y, z: F.gelu(x * y + z, approximate="tanh")
    for bits in (16, 20, 22):
        n = 1 << bits; x = many((n,), (n,), (n,)); say("gelu(x*y+z)", f"{n // 1024}x1024", timed(lambda i: chain(*x[i]), len(x)), 16*n)
    try:
        fused = torch.compile(chain); x = many((1 << 22,), (1 << 22,), (1 << 22,)); say("gelu(x*y+z) compiled", "4096x1024", timed(lambda i: fused(*x[i]), len(x)), 16 << 22)
    except Exception as e: print("compile:", str(e)[:200], file=sys.stderr)
    for r in (1 << 10, 1 << 14, 1 << 15):
        x = many((r, 1024)); say("sum", str(r * 1024), timed(lambda i: x[i][0].sum(), len(x)), 4*r*1024)
    x = many((4096, 1024)); say("sum", "4096x1024 down", timed(lambda i: x[i][0].sum(0), len(x)), 4*4096*1024)
    x = many((2048, 2048)); say("transpose", "2048x2048", timed(lambda i: x[i][0].t().contiguous(), len(x)), 8*2048**2)
    x = many((4096, 1024)); y = torch.randint(0, 1024, (4096,), device=dev); say("cross_entropy", "4096x1024", timed(lambda i: F.cross_entropy(x[i][0], y), len(x)), 4*4096*1024)
    x = many((8192, 512)); ids = torch.arange(4096, device=dev) * 7919 % 8192
    say("embedding", "4096 of 8192x512", timed(lambda i: x[i][0][ids], len(x)), 8*4096*512)
    table = torch.randn(8192, 512, device=dev, requires_grad=True); dy = torch.randn(4096, 512, device=dev)
    with torch.enable_grad(): y = F.embedding(ids, table)
    say("embedding backward", "4096 of 8192x512", timed(lambda i: torch.autograd.grad(y, table, dy, retain_graph=True)), 4*512*(4096+8192))
    w = torch.randn(1 << 22, device=dev, requires_grad=True); w.grad = torch.randn_like(w)
    opt = torch.optim.AdamW([w], lr=1e-3, fused=True); say("adamw", str(1 << 22), timed(lambda i: opt.step()), 28 << 22)
    x = many((131072, 64)); say("sum", "131072x64 down", timed(lambda i: x[i][0].sum(0), len(x)), 4*131072*64)
    x = many((8, 1024, 16, 64)); say("contiguous", "8x1024x16x64 heads", timed(lambda i: x[i][0].transpose(1, 2).contiguous(), len(x)), 8*8*1024*16*64)
    x = [torch.randn(1 << 28, device=dev) for _ in range(2)]; say("copy", "1 GiB", timed(lambda i: x[0].copy_(x[1])), 8 << 28)

@torch.no_grad()
def attention():
    for b, h, t, d in [(4, 8, 512, 64), (8, 16, 1024, 64)]:
        x = many(*[(b, h, t, d)] * 3); f = lambda i: F.scaled_dot_product_attention(*x[i], is_causal=True)
        say("attention", f"{b}x{h}x{t}x{d} causal", timed(f, len(x)), 16*b*h*t*d, 4*b*h*t*t//2*d)
        with torch.enable_grad():
            leaves = [torch.randn(b, h, t, d, device=dev, requires_grad=True) for _ in range(3)]; dy = torch.randn(b, h, t, d, device=dev)
            y = F.scaled_dot_product_attention(*leaves, is_causal=True)
            say("attention backward", f"{b}x{h}x{t}x{d} causal", timed(lambda i: torch.autograd.grad(y, leaves, dy, retain_graph=True)), 32*b*h*t*d, 10*b*h*t*t//2*d)
    x = many((4, 32, 1, 64), (4, 32, 2048, 64), (4, 32, 2048, 64)); say("attention, one query", "4x32/8x2048x64", timed(lambda i: F.scaled_dot_product_attention(*x[i]), len(x)), 4*2*4*8*2048*64)

def dispatch():
    y = torch.randn(1024, device=dev) * 1e-3
    def chain():
        x = y
        for _ in range(1000): x = x + y
        return x
    with torch.no_grad():
        say("adds, a kernel each", "1000 of 1024", wall(chain))
        g = torch.cuda.CUDAGraph(); s = torch.cuda.Stream()
        with torch.cuda.stream(s): chain()
        torch.cuda.synchronize()
        with torch.cuda.graph(g): chain()
        say("adds, replayed", "1000 of 1024", wall(g.replay))

V, D, H, T, B, DEPTH = 128, 128, 4, 128, 8, 4
def train():
    shapes = [("tok",(V,D)),("pos",(T,D)),("ln1_g",(D,)),("ln1_b",(D,)),("qkv_w",(D,3*D)),("qkv_b",(3*D,)),("out_w",(D,D)),("out_b",(D,)),("ln2_g",(D,)),("ln2_b",(D,)),("up_w",(D,4*D)),("up_b",(4*D,)),("down_w",(4*D,D)),("down_b",(D,)),("lnf_g",(D,)),("lnf_b",(D,)),("head_w",(D,V))]
    P = {n: (torch.randn(s, device=dev) * 0.08).requires_grad_() for n, s in shapes}
    x = torch.randint(0, V, (B, T), device=dev); y = torch.randint(0, V, (B, T), device=dev)
    ln = lambda h, g, b: F.layer_norm(h, (D,), P[g], P[b], 1e-5)
    lin = lambda h, w, b: h @ P[w] + P[b]
    def block(h):
        q, k, v = (u.reshape(B, T, H, D // H).transpose(1, 2) for u in lin(ln(h, "ln1_g", "ln1_b"), "qkv_w", "qkv_b").split(D, 2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + lin(a.transpose(1, 2).reshape(B, T, D), "out_w", "out_b")
        return h + lin(F.gelu(lin(ln(h, "ln2_g", "ln2_b"), "up_w", "up_b"), approximate="tanh"), "down_w", "down_b")
    for fused in (False, True):
        opt = torch.optim.AdamW(list(P.values()), lr=1e-3, weight_decay=0.01, fused=fused)
        def step():
            h = P["tok"][x] + P["pos"]
            for _ in range(DEPTH): h = block(h)
            loss = F.cross_entropy((ln(h, "lnf_g", "lnf_b") @ P["head_w"]).reshape(B * T, V), y.reshape(-1))
            opt.zero_grad(); loss.backward(); opt.step()
        say("train_step", "V128 d128 h4 T128 B8 tied x4", wall(step, 40), fused_adamw=fused)

def step():
    """A tied block of width 768 applied 12 times, 8 x 1024 tokens, in f32, TF32 and bf16."""
    d, depth, b, t, v = 768, 12, 8, 1024, 256
    class Block(torch.nn.Module):
        def __init__(s):
            super().__init__(); L = torch.nn.Linear
            s.n1, s.n2, s.qkv, s.o, s.up, s.down = torch.nn.RMSNorm(d), torch.nn.RMSNorm(d), L(d, 3*d, bias=False), L(d, d, bias=False), L(d, 4*d, bias=False), L(4*d, d, bias=False)
        def forward(s, h):
            q, k, w = (u.reshape(b, t, d // 64, 64).transpose(1, 2) for u in s.qkv(s.n1(h)).split(d, 2))
            h = h + s.o(F.scaled_dot_product_attention(q, k, w, is_causal=True).transpose(1, 2).reshape(b, t, d))
            return h + s.down(F.gelu(s.up(s.n2(h)), approximate="tanh"))
    for name in ("f32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        with torch.device(dev): block, table, head = Block(), torch.nn.Embedding(v, d), torch.nn.Linear(d, v, bias=False)
        opt = torch.optim.AdamW([*block.parameters(), *table.parameters(), *head.parameters()], lr=1e-3, fused=True)
        x = torch.randint(0, v, (b, t), device=dev)
        def one():
            with torch.autocast("cuda", torch.bfloat16, enabled=name == "bf16"):
                h = table(x)
                for _ in range(depth): h = block(h)
                loss = F.cross_entropy(head(h).float().reshape(-1, v), x.reshape(-1))
            opt.zero_grad(); loss.backward(); opt.step()
        say("train_step", "d768 T1024 B8 tied x12", wall(one, 10), precision=name)
    torch.backends.cuda.matmul.allow_tf32 = False

class Basis(torch.nn.Module):
    """Two layers over all monomials of the attributes up to degree 3."""

    def __init__(self, attributes, width):
        super().__init__()
        self.first = torch.nn.Linear(attributes + attributes**2 + attributes**3, width)
        self.second = torch.nn.Linear(width, width)

    def forward(self, x):
        powers = [x]
        for _ in range(2): powers.append((powers[-1].unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2))
        return F.gelu(self.second(F.gelu(self.first(torch.cat(powers, -1)))))

class SeparableConv(torch.nn.Module):
    """PONITA's layer: a convolution over positions, one over orientations, a norm, and an MLP beside a residual path."""

    def __init__(self, channels, width):
        super().__init__()
        self.spatial, self.fiber = (torch.nn.Linear(width, channels, bias=False) for _ in range(2))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        self.norm = torch.nn.LayerNorm(channels)
        self.up, self.down = torch.nn.Linear(channels, 4 * channels), torch.nn.Linear(4 * channels, channels)

    def forward(self, x, edge_basis, fiber_basis, source, target):
        y = torch.zeros_like(x).index_add(0, target, x[source] * self.spatial(edge_basis))
        y = torch.einsum("noc,poc->npc", y, self.fiber(fiber_basis)) / fiber_basis.shape[0] + self.bias
        return x + self.down(F.gelu(self.up(self.norm(y))))

def sphere(count):
    i = torch.arange(count) + 0.5
    polar, turn = torch.acos(1 - 2 * i / count), math.pi * (1 + 5**0.5) * i
    return torch.stack([turn.cos() * polar.sin(), turn.sin() * polar.sin(), polar.cos()], 1)

def ponita():
    orientations, channels, width = 20, 64, 64
    with torch.device(dev):
        for graphs, points in ((100, 18), (100, 5)):
            index = torch.arange(points)
            i, j = torch.meshgrid(index, index, indexing="ij")
            first = (torch.arange(graphs) * points)[:, None]
            source, target = ((first + k[i != j]).flatten() for k in (i, j))
            positions = torch.randn(graphs * points, 3)
            x = torch.randn(graphs * points, orientations, channels, requires_grad=True)
            grid = sphere(orientations)
            basis, fiber, layer = Basis(2, width), Basis(1, width), SeparableConv(channels, width)
            leaves = [p for m in (basis, fiber, layer) for p in m.parameters()] + [x]
            def step():
                offset = positions[source] - positions[target]
                along = offset @ grid.T
                across = (offset[:, None] - along[..., None] * grid).norm(dim=-1)
                kernels = basis(torch.stack([along, across], -1)), fiber((grid @ grid.T)[..., None])
                return torch.autograd.grad(layer(x, *kernels, source, target).square().mean(), leaves)
            say("ponita", f"{graphs} graphs x {points}, E={len(source)}, O20 C64 K64", wall(step))

def lap():
    import numpy as np, scipy
    from scipy.optimize import linear_sum_assignment as lsa
    for n in (512, 1024, 2048, 4096):
        r = np.random.default_rng(n); c = r.standard_normal((n, n), dtype=np.float32) @ r.standard_normal((n, n), dtype=np.float32).T
        t0 = time.perf_counter(); lsa(c, maximize=True); say("lap corr scipy", str(n), (time.perf_counter() - t0) * 1e3)

groups = dict(matmul=matmul, rows=rows, attention=attention, dispatch=dispatch, train=train, step=step, ponita=ponita, lap=lap)
for g in sys.argv[1:] or groups:
    try: groups[g]()
    except Exception as e: print(g, "failed:", type(e).__name__, str(e)[:300], file=sys.stderr, flush=True)

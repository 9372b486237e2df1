"""Sinkhorn penalty of a batch of representations, forward and backward, against its procedure taken literally.

    python tests/bench/bench_sinkhorn.py [--pairs 7] [--batch 8] [--components 800] [--frames 173] [--json FILE]

The plain side forms the differences of all pairs of frames, alternates two scalings of the kernel 1000 times and differentiates
through all of them. Both sides start from the same tensor and are timed in turn on one thread; a ratio is the median over pairs.
Values and gradients have to agree within 1e-5 with a converged float64 computation that is differentiated through its iterations.
For the value alone, our plan may take up to twice as long as POT's from the same costs; that row is left out without POT
(`pip install POT`). Exits 1 below a floor, where numbers differ, or where the loop did not stop. The plain side needs about
3.5 GB at the full size.
"""
import argparse, json, os, statistics, sys, time, warnings
from pathlib import Path
for pool in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(pool, '1')
import torch
from disentangle_nb.losses.sinkhorn import frame_costs, frame_distributions, sinkhorn_penalty, sinkhorn_plan

FLOOR, FLOOR_POT, REG, TOL = 10., .5, 1.3, 1e-5


def activations(b, c, t, seed=0):
    "Half of them zero, the rest on a grid: steps that float32 keeps apart after normalising, so that both precisions rank them alike."
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, c, t, generator=g).relu()*64).round()/64


def costs(a):
    "Distances of all pairs of frames, every difference written out."
    q = a + 1/a.shape[1]
    q = q/q.sum(-1, keepdim=True)
    return torch.stack([(v[:, :, None] - v[:, None]).abs().sum(0) for v in q]).mean(0)


def plain(a, steps=1000):
    M, n = costs(a), a.shape[-1]
    K, share = torch.exp(-M/REG), 1/n
    u = torch.full((n,), share, dtype=M.dtype)
    for _ in range(steps):
        v = share/(K.T @ u)
        u = share/(K @ v)
    return (u[:, None]*K*v*M).sum()


def run(f, a):
    a = a.clone().requires_grad_()
    t = time.perf_counter()
    v = f(a); v.backward()
    return 1e3*(time.perf_counter() - t), v.item(), a.grad


def timed(f):
    t = time.perf_counter()
    out = f()
    return 1e3*(time.perf_counter() - t), out


def agreement(a):
    "Relative errors of value and gradient against float64, unrolled until nothing changes; two items are enough."
    a = a[:2]
    _, value, grad = run(lambda v: plain(v, 200), a.double())
    _, v, g = run(sinkhorn_penalty, a)
    return abs(v/value - 1), ((g - grad).abs().max()/grad.abs().max()).item()


def against_pot(a, pairs):
    "Milliseconds of (POT's plan and value, ours), interleaved, and the difference of the values; None without POT."
    try: import ot
    except ImportError: return None
    M = frame_costs(frame_distributions(a)).double()
    share = torch.full((len(M),), 1/len(M), dtype=M.dtype).numpy()
    theirs = lambda: float((ot.sinkhorn(share, share, M.numpy(), REG)*M.numpy()).sum())
    ours = lambda: (sinkhorn_plan(M, REG, within=True)*M).sum().item()
    for f in (theirs, ours): f()
    runs = [(timed(theirs), timed(ours)) for _ in range(5*pairs)]
    return [(p[0], o[0]) for p, o in runs], abs(runs[0][0][1]/runs[0][1][1] - 1)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('pairs', 7), ('batch', 8), ('components', 800), ('frames', 173)): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--json', type=Path, help='write the numbers here as well')
    o, bad = p.parse_args(), []
    torch.set_num_threads(1)
    a, out = activations(o.batch, o.components, o.frames), {}
    for f in (plain, sinkhorn_penalty): run(f, a)
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                # the loop warns where it does not stop by itself
        sinkhorn_plan(frame_costs(frame_distributions(a)), REG, max_iter=25, within=True)
    runs = [[run(f, a)[0] for f in (plain, sinkhorn_penalty)] for _ in range(o.pairs)]
    rows = [('penalty with gradient', runs, FLOOR)]
    pot = against_pot(a, o.pairs)
    if pot: rows.append(('value from costs, POT', pot[0], FLOOR_POT))
    else: print('POT is not installed: its row is left out')
    print(f'{"":24} {"plain ms":>10} {"ours ms":>10} {"ratio":>7} {"floor":>7}')
    for name, pairs, floor in rows:
        ratio, x, y = (statistics.median(v) for v in ([x/y for x, y in pairs], *zip(*pairs)))
        print(f'{name:24} {x:>10.2f} {y:>10.2f} {ratio:>7.2f} {floor:>7.2f}')
        out[name] = dict(plain_ms=x, ours_ms=y, ratio=ratio, floor=floor)
        if ratio < floor: bad.append(name)
    value, grad = agreement(a)
    print(f'against converged float64: value {value:.1e}, gradient {grad:.1e}' + (f'; against POT: value {pot[1]:.1e}' if pot else ''))
    if max(value, grad, pot[1] if pot else 0.) > TOL: bad.append('agreement')
    if o.json: o.json.write_text(json.dumps(out | dict(value_error=value, gradient_error=grad), indent=1))
    if bad: sys.exit(f'missed: {", ".join(bad)}')


if __name__ == '__main__': main()

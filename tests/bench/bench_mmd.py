"""MMD of a batch of spectrogram slices, forward and backward, against `torch.cdist` in its exact mode.

    python tests/bench/bench_mmd.py [--pairs 9] [--bins 8000]

Both sides start from the same tensors and are timed in turn on one thread; a ratio is the median over pairs. The values have
to agree within 1e-5. Exits 1 below a floor, where values differ, or where 32 against 32 slices take more than 10 ms.
"""
import argparse, os, statistics, sys, time
for pool in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(pool, '1')
import torch
from disentangle_nb.losses.mmd import mmd2, rbf

FLOOR = {32: 3., 128: 6.}
BUDGET = 10. # ms for 32 against 32


def slices(m, bins, seed=0):
    "Slices that share a floor, as spectrograms do."
    g = torch.Generator().manual_seed(seed)
    floor = .3*torch.randn(bins, generator=g).abs() - .6
    return [floor + .2*torch.randn(m, bins, generator=g)*torch.rand(bins, generator=g) for _ in range(2)]


def plain(x, y):
    v, m = torch.cat([x, y]), len(x)
    d2 = torch.cdist(v, v, compute_mode='donot_use_mm_for_euclid_dist').square()
    k = rbf(d2)
    within = sum((b.sum() - b.trace())/(m*(m - 1)) for b in (k[:m, :m], k[m:, m:]))
    return within - 2*k[:m, m:].mean()


def timed(f, x, y):
    x = x.clone().requires_grad_()
    t = time.perf_counter()
    v = f(x, y); v.backward()
    return 1e3*(time.perf_counter() - t), v.item()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=9); p.add_argument('--bins', type=int, default=8000)
    o, bad = p.parse_args(), []
    torch.set_num_threads(1)
    print(f'{"slices":>8} {"plain ms":>10} {"ours ms":>10} {"ratio":>7} {"floor":>7} {"difference":>11}')
    for m, floor in FLOOR.items():
        x, y = slices(m, o.bins)
        for f in (plain, mmd2): timed(f, x, y)
        runs = [(timed(plain, x, y), timed(mmd2, x, y)) for _ in range(o.pairs)]
        ratio = statistics.median(a[0]/b[0] for a, b in runs)
        a, b = (statistics.median(r[i][0] for r in runs) for i in (0, 1))
        off = abs(runs[0][0][1] - runs[0][1][1])
        print(f'{m:>8} {a:>10.2f} {b:>10.2f} {ratio:>7.2f} {floor:>7.2f} {off:>11.1e}')
        if ratio < floor or off > 1e-5 or (m == 32 and b > BUDGET): bad.append(m)
    if bad: sys.exit(f'missed at {bad} slices')


if __name__ == '__main__': main()

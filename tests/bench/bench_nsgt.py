"""The NSGT on a Mel scale, there and back, next to the `nsgt` package.

    python tests/bench/bench_nsgt.py [--notes 16] [--pairs 9] [--json FILE]

Five-second notes, 500 rows and the two beside them. The package (0.19) works on one signal at a time in double precision;
its widths are clipped in a way that current NumPy refuses, which is mended here while it is imported. Ours takes all notes at once in single precision.
Medians of interleaved pairs; exits 1 below the floor, or where our error in single precision is above 3e-7. Without the package only ours is timed.

    pip install numpy Cython setuptools && pip install --no-build-isolation nsgt
"""
import argparse, json, statistics, sys, time, warnings
import numpy as np, torch
from disentangle_nb.features.nsgt import NSGT

FLOOR, ERROR = 6.5, 3e-7


def package():
    "The package's frame, or None."
    clip = np.clip
    def mended(a, lo, hi, out=None, **kw):
        if out is None: return clip(a, lo, hi, **kw)
        out[...] = clip(a, lo, min(hi, np.iinfo(out.dtype).max) if out.dtype.kind == 'i' else hi)
        return out
    try: import nsgt
    except ImportError: return None
    np.clip = mended
    try: return nsgt.NSGT(nsgt.MelScale(20, 11000, 500), 22050, 110250, real=True, matrixform=True, reducedform=0)
    finally: np.clip = clip


def seconds(f, x):
    t = time.perf_counter()
    f(x)
    return time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--notes', type=int, default=16)
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--json')
    args = p.parse_args()
    warnings.filterwarnings('ignore', module='nsgt')
    ours, theirs, x = NSGT(), package(), torch.randn(args.notes, 110250, generator=torch.Generator().manual_seed(0))
    def batch(x): return torch.cat([ours.synthesise(ours.analyse(v)) for v in x.split(2)])
    def loop(x): return [theirs.backward(list(theirs.forward(v))) for v in x.double().numpy()]
    error = ((batch(x) - x).norm()/x.norm()).item()
    rows = [(seconds(loop, x) if theirs else float('nan'), seconds(batch, x)) for _ in range(args.pairs)]
    a, b = (1000*statistics.median(r[i] for r in rows)/args.notes for i in (0, 1))
    ratio = statistics.median(r[0]/r[1] for r in rows)
    print(f'one note of 5 s, there and back: package {a:.1f} ms, ours {b:.1f} ms, {ratio:.1f} x (floor {FLOOR:g}); error {error:.2e} (at most {ERROR:g})')
    if args.json: open(args.json, 'w').write(json.dumps(dict(package=a, ours=b, ratio=ratio, error=error)))
    return int(ratio < FLOOR or error > ERROR)


if __name__ == '__main__': sys.exit(main())

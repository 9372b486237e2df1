"""The constant-Q transform next to `librosa.cqt`, both at the reference's parameters.

    python tests/bench/bench_cqt.py [--seconds 10 60 300] [--pairs 9] [--json FILE]

120 bins from 65.4 Hz, 24 an octave, hop 448, 22,050 Hz; magnitudes of white noise. Medians of interleaved pairs, wall clock. Errors are relative to the
definition in double precision, for ours and for librosa's. Then sound streams by in pieces, as from a file: seconds for an hour, and with a network of the
published size behind it. Exits 1 where the smallest ratio lies below the floor, our error above 1e-3 or above librosa's, or an hour above its minute.
"""
import argparse, json, os, statistics, sys, time
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1') # its workers spin after each call of librosa and take a core from torch
import librosa, numpy as np, torch
from disentangle_nb.features.cqt import CQT, cqt_direct, unit_frames

FLOOR, ERROR, HOUR = 3.5, 1e-3, 60.


def theirs(x): return np.abs(librosa.cqt(x.numpy(), sr=22050, hop_length=448, fmin=65.4, n_bins=120, bins_per_octave=24))


def seconds(f, x):
    t = time.perf_counter()
    f(x)
    return time.perf_counter() - t


def errors(ours, x):
    "Distance from the definition: ours and librosa's."
    at = [(n, k) for n in range(40, 1 + len(x)//448 - 40, 37) for k in range(0, 120, 5)]
    truth = cqt_direct(x, at).abs()
    return [float((torch.stack([torch.as_tensor(m[k, n]) for n, k in at]) - truth).norm()/truth.norm()) for m in (ours.magnitude(x), theirs(x))]


def hour(ours, net):
    "Seconds for an hour of sound that comes in pieces of 12 s, through `net` if there is one."
    piece, frames = torch.randn(2**18, generator=torch.Generator().manual_seed(1)), 0
    start = time.perf_counter()
    for m in ours.stream([piece]*30):
        frames += m.shape[1]
        if net: net(unit_frames(m))
    return (time.perf_counter() - start)/(frames*448/22050)*3600


def network():
    "Filters, gate and two layers of the published sizes."
    g = torch.Generator().manual_seed(0)
    U, V, W, W1 = (torch.randn(*s, generator=g)*.05 for s in ((256, 120, 9), (256, 120), (128, 256), (64, 128)))
    def net(x):
        f = torch.nn.functional.conv1d(x[None, :, :-1], U)[0]*(V @ x[:, 9:])
        return (W1 @ (W @ f).tanh()).tanh()
    return torch.no_grad()(net)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seconds', type=int, nargs='+', default=[10, 60, 300])
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--json')
    args = p.parse_args()
    ours, g, out = CQT(), torch.Generator().manual_seed(0), {}
    for s in args.seconds:
        x = torch.randn(s*22050, generator=g)
        theirs(x), ours.magnitude(x)
        rows = [(seconds(theirs, x), seconds(ours.magnitude, x)) for _ in range(args.pairs)]
        a, b, ratio = *(1000*statistics.median(r[i] for r in rows) for i in (0, 1)), statistics.median(r[0]/r[1] for r in rows)
        out[f'{s} s'] = dict(librosa_ms=a, ours_ms=b, ratio=ratio)
        print(f'{s:4d} s: librosa {a:.1f} ms, ours {b:.1f} ms, {ratio:.2f} x (floor {FLOOR:g})', flush=True)
    off = errors(ours, torch.randn(10*22050, generator=g))
    rate = [hour(ours, net) for net in (None, network())]
    print(f'off the definition: ours {off[0]:.1e} (at most {ERROR:g}), librosa {off[1]:.1e}')
    print(f'an hour in pieces: {rate[0]:.1f} s, with a network {rate[1]:.1f} s (at most {HOUR:g})')
    low = min(r['ratio'] for r in out.values())
    out |= dict(error=off[0], librosa_error=off[1], hour_s=rate[0], hour_with_network_s=rate[1])
    if args.json:
        with open(args.json, 'w') as f: json.dump(out, f, indent=1)
    return int(low < FLOOR or off[0] > min(ERROR, off[1]) or rate[1] > HOUR)


if __name__ == '__main__': sys.exit(main())

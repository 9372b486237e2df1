"""Time to a waveform of given spectral convergence, next to librosa's Griffin-Lim, both with momentum .99.

    python tests/bench/bench_griffinlim.py [--pairs 7] [--notes 8] [--iterations 32]

librosa runs its 32 iterations from random phases; ours runs from spectral peaks until its convergence is as good, and, for comparison,
the same iterations from random phases too. Timed in turn in one process, with one thread and with all. Exits 1 below the floor.
"""
import os
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import argparse, statistics, sys, time

import librosa, numpy as np, torch

from disentangle_nb.features.invert import griffin_lim, spectral_convergence, stft

FLOOR, SR, SECONDS, TRIES = 3., 22050, 1, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def notes(n):
    "Notes with vibrato, decay and some breath."
    rng, s = np.random.default_rng(0), np.arange(SR * SECONDS) / SR
    out = []
    for f in 440 * 2 ** (rng.integers(-24, 13, n) / 12):
        phase = 2 * np.pi * np.cumsum(f * 2 ** (.3 / 12 * np.sin(2 * np.pi * 5.5 * s) * np.minimum(s * 4, 1))) / SR
        out.append(sum(np.sin(k * phase) * np.exp(-.3 * k * s) / k for k in range(1, 20) if k * f * 1.02 < SR / 2) + .02 * rng.normal(size=len(s)))
    return torch.from_numpy(.1 * np.stack(out).astype(np.float32))


def theirs(mags, n_iter, t):
    return torch.from_numpy(np.stack([librosa.griffinlim(m, n_iter=n_iter, hop_length=256, n_fft=2048, momentum=.99, random_state=0, length=t,
                                                         pad_mode='reflect') for m in mags]))


def seconds(f, *args, **kw):
    t = time.perf_counter()
    f(*args, **kw)
    return time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=7, help='interleaved rounds')
    p.add_argument('--notes', type=int, default=8, help='notes in a batch')
    p.add_argument('--iterations', type=int, default=32, help="librosa's iterations")
    args = p.parse_args()
    waves = notes(args.notes)
    mag, t, k = stft(waves).abs(), waves.shape[1], args.iterations
    mags, err = mag.numpy(), lambda w: float(spectral_convergence(w, mag).mean())
    goal = err(theirs(mags, k, t))
    need = next((i for i in TRIES if err(griffin_lim(mag, n_iter=i, n_samples=t)) <= goal), TRIES[-1])
    ways = {f'ours, random start, {k} iterations': dict(n_iter=k, init='random'), f'ours, start from peaks, {need} iterations': dict(n_iter=need)}
    got, rows, audio = [err(griffin_lim(mag, n_samples=t, **kw)) for kw in ways.values()], {}, args.notes * SECONDS
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rounds = [[seconds(theirs, mags, k, t)] + [seconds(griffin_lim, mag, n_samples=t, **kw) for kw in ways.values()] for _ in range(args.pairs)]
        rows[threads] = [(statistics.median(c), statistics.median(r[0] / x for r, x in zip(rounds, c))) for c in zip(*rounds)]
    print(f'{"":42}{"threads":>8}{"s":>9}{"x real time":>13}{"convergence":>13}{"ratio":>8}')
    for threads, row in rows.items():
        for name, (s, r), c in zip([f'librosa, random start, {k} iterations', *ways], row, [goal, *got]):
            print(f'{name:42}{threads:8}{s:9.3f}{audio / s:13.1f}{c:13.4f}{r:8.1f}')
    best = max(row[2][1] for row in rows.values())
    print(f'at equal convergence: best ratio {best:.1f}, floor {FLOOR:g}')
    return int(best < FLOOR or got[1] > goal)


if __name__ == '__main__': sys.exit(main())

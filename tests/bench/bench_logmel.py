"""Log-mel spectrograms of three-second notes, next to a loop over librosa.

    python tests/bench/bench_logmel.py [--pairs 9] [--notes 16]

Both sides are timed in turn in one process, with one thread and with all; each side may use whichever suits it better.
numpy's BLAS is held to one thread, or its idle workers would take a core from PyTorch. Exits 1 below the floor.
"""
import os
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import argparse, statistics, sys, time

import librosa, numpy as np, torch

from disentangle_nb.features.mel import LogMel

FLOOR, CLOSE, SR, SECONDS = 6., 1e-4, 22050, 3


def notes(n):
    "Harmonic notes with a decay and a little noise."
    rng, s = np.random.default_rng(0), np.arange(SR * SECONDS) / SR
    f0 = 440 * 2 ** (rng.integers(-24, 24, n) / 12)
    waves = [sum(np.sin(2 * np.pi * f * k * s) / k for k in range(1, 12) if k * f < SR / 2) * np.exp(-s) + .01 * rng.normal(size=len(s)) for f in f0]
    return (.1 * np.stack(waves)).astype(np.float32)


def plain(waves):
    return [np.log(np.finfo(float).eps + librosa.feature.melspectrogram(
        y=w, sr=SR, n_fft=2048, hop_length=256, n_mels=256, fmin=27., fmax=11000., pad_mode='reflect')) for w in waves]


def seconds(f, *args):
    t = time.perf_counter()
    f(*args)
    return time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=9, help='interleaved pairs')
    p.add_argument('--notes', type=int, default=16, help='notes in a batch')
    args = p.parse_args()
    waves, feature = notes(args.notes), LogMel()
    batch, rows = torch.from_numpy(waves), {}
    x = feature.encode(batch)
    gap = np.abs(((x + 1) / 2 * (feature.hi - feature.lo) + feature.lo).numpy() - np.stack(plain(waves)))
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for _ in range(3): feature.encode(batch)
        pairs = [(seconds(plain, waves), seconds(feature.encode, batch)) for _ in range(args.pairs)]
        rows[threads] = [1000 / args.notes * statistics.median(c) for c in zip(*pairs)] + [statistics.median(a / b for a, b in pairs)]
    print(f'{"3-s note at 22.05 kHz":24}{"librosa ms":>12}{"ours ms":>10}{"ratio":>8}')
    for k, (a, b, r) in rows.items(): print(f'{f"PyTorch threads: {k}":24}{a:12.2f}{b:10.2f}{r:8.1f}')
    best = max(r for *_, r in rows.values())
    print(f'best ratio {best:.1f}, floor {FLOOR:g}; difference of the logarithms: median {np.median(gap):.1e}, floor {CLOSE:g}')
    return int(best < FLOOR or np.median(gap) > CLOSE)


if __name__ == '__main__': sys.exit(main())

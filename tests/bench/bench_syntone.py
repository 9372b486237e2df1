"""The tone grid, next to a loop that makes one clip after the other.

    python tests/bench/bench_syntone.py [--pairs 7] [--freqs 6] [--memory 16000] [--json FILE]

Published tones: the loop evaluates NumPy's sine and SciPy's sawtooth and square for each clip and keeps them all, as the
reference does; ours streams such clips. Sums of partials: a loop over clips that adds one sine a partial, against
ours. The published mel input: librosa a clip, against a batch. Slices of the grid, timed in turn in one process; ratios are medians over pairs. Peak memory: each side in a
process of its own, as many clips as `--memory` says (0 skips it). Exits 1 below a floor.
"""
import argparse, json, os, statistics, subprocess, sys, time
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import librosa, numpy as np, torch
from scipy import signal
from disentangle_nb.data.syntone import EDGE, Tones
from disentangle_nb.features.tonemel import MaxMel

FLOOR, FLOOR_SUM, FLOOR_MEL, SHARE, SR = 80., 20., 15., .25, 16000
SHAPES = (np.sin, lambda p: signal.sawtooth(p, .5), signal.sawtooth, signal.square)


def slice_of(world, freqs):
    "All clips at so many frequencies, spread over the grid."
    rows = world.grid()
    keep = torch.linspace(0, world.sizes[world.column('frequency')] - 1, freqs).long()
    return rows[torch.isin(rows[:, world.column('frequency')], keep)]


def published_tone(w, f, a): return a * SHAPES[int(w)](2 * np.pi * f * np.linspace(0, 1, SR))


def published_loop(values):
    out = np.zeros((len(values), SR))
    for i, (w, f, a) in enumerate(values): out[i] = published_tone(w, f, a)
    return out


def sum_loop(values):
    t, out, rng = np.arange(SR) / SR, np.zeros((len(values), SR)), np.random.default_rng(0)
    for i, (w, f, a) in enumerate(values):
        h = np.arange(1, 1 + max(1, int(np.ceil(EDGE * SR / f) - 1)), 2 if w in (1, 3) else 1)[:1 if w == 0 else None]
        amp = {0: 1., 1: 8 / np.pi**2 / h**2, 2: 2 / np.pi / h, 3: 4 / np.pi / h}[int(w)] * np.ones(len(h))
        start = rng.random()
        for k, b in zip(h, amp): out[i] += a * b * np.sin(2 * np.pi * k * (f * t + start))
    return out


def streamed(world, rows):
    for _, x in world.stream(0, rows, reuse=True): last = x
    return last


def seconds(f, *args):
    t = time.perf_counter()
    f(*args)
    return time.perf_counter() - t


def mel_loop(clips): return [librosa.util.normalize(librosa.feature.melspectrogram(y=c, sr=SR)) for c in clips.numpy()]


def measure_mel(pairs, threads, clips=64):
    "The same for the mel input."
    world, feature = Tones(compat=True), MaxMel()
    wav = world.render(world.sample(clips, torch.Generator().manual_seed(0)))
    best = None
    for threads in sorted({1, threads}):
        torch.set_num_threads(threads)
        mel_loop(wav[:4]), feature.encode(wav)
        both = [(1000 * seconds(mel_loop, wav) / clips, 1000 * seconds(feature.encode, wav) / clips) for _ in range(pairs)]
        row = [statistics.median(c) for c in zip(*both)] + [statistics.median(a / b for a, b in both)]
        best = row if best is None or row[2] > best[2] else best
    return best


def measure(world, loop, freqs, pairs, threads):
    "Milliseconds a clip of both, and the median ratio, with the number of threads that suits us best."
    rows, values = slice_of(world, 16 * freqs), world.values(slice_of(world, freqs), ['timbre', 'frequency', 'amplitude'])
    return max((timed(world, loop, rows, values, pairs, n) for n in sorted({1, threads})), key=lambda m: m[2])


def timed(world, loop, rows, values, pairs, threads):
    torch.set_num_threads(threads)
    streamed(world, rows)
    both = [(1000 * seconds(loop, values) / len(values), 1000 * seconds(streamed, world, rows) / len(rows)) for _ in range(pairs)]
    return [statistics.median(c) for c in zip(*both)] + [statistics.median(a / b for a, b in both)]


def peak(side, clips):
    "Peak resident memory, MB, of a fresh process that makes so many published clips."
    code = ('import sys; sys.path.insert(0, sys.argv[1])\nimport bench_syntone as b\nworld = b.Tones(compat=True)\n'
            'rows = world.grid()[:int(sys.argv[2])]\n'
            + ('b.streamed(world, rows)\n' if side == 'ours' else "b.published_loop(world.values(rows, ['timbre', 'frequency', 'amplitude']))\n")
            + "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))")
    done = subprocess.run([sys.executable, '-c', code, os.path.dirname(os.path.abspath(__file__)), str(clips)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=7, help='interleaved pairs')
    p.add_argument('--freqs', type=int, default=6, help='frequencies in the slice of the loop, 80 clips each; ours gets sixteen times as many')
    p.add_argument('--memory', type=int, default=16000, help='clips for the memory comparison, 0 for none')
    p.add_argument('--json', help='file to write the numbers to')
    args = p.parse_args()
    threads = torch.get_num_threads()
    rows = {'published': measure(Tones(compat=True), published_loop, args.freqs, args.pairs, threads),
            'sum of partials': measure(Tones(), sum_loop, max(2, args.freqs // 3), args.pairs, threads),
            'mel input': measure_mel(args.pairs, threads)}
    floors = FLOOR, FLOOR_SUM, FLOOR_MEL
    print(f'{"one second at 16 kHz":22}{"loop ms":>10}{"ours ms":>10}{"ratio":>8}{"floor":>8}')
    for (name, (a, b, r)), floor in zip(rows.items(), floors): print(f'{name:22}{a:10.3f}{b:10.4f}{r:8.1f}{floor:8g}')
    bad = any(row[2] < floor for row, floor in zip(rows.values(), floors))
    if args.memory and os.path.exists('/proc/self/status'):
        rows['peak MB'] = [peak('loop', args.memory), peak('ours', args.memory)]
        share = rows['peak MB'][1] / rows['peak MB'][0]
        print(f"peak memory of {args.memory} clips: loop {rows['peak MB'][0]:.0f} MB, ours {rows['peak MB'][1]:.0f} MB: {share:.2f} of it, at most {SHARE:g}")
        bad |= share > SHARE
    if args.json: open(args.json, 'w').write(json.dumps(rows))
    return int(bad)


if __name__ == '__main__': sys.exit(main())

"""Milliseconds of one core for a note of three seconds, next to a plain player; and the whole orchestra.

python tests/bench/bench_soundfont.py
"""
import os
os.environ |= {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
import statistics, sys, time

import numpy as np
from scipy.signal import lfilter

from disentangle_nb.data.sampler import amplitude, contour, hertz, lowpass
from disentangle_nb.data.soundfont import SoundFont

ORCHESTRA = {'alto sax': (65, 49, 80), 'violin': (40, 55, 100), 'flute': (73, 60, 96), 'horn': (60, 34, 77), 'clarinet': (71, 50, 94),
             'cello': (42, 36, 83), 'trombone': (57, 34, 74), 'piano': (0, 21, 108), 'bassoon': (70, 34, 75), 'oboe': (68, 58, 91),
             'trumpet': (56, 54, 86), 'viola': (41, 48, 91), 'accordion': (21, 34, 101)}
ROUNDS, NOTE_MS, ALL_S, RATIO, SR, DUR = 7, 2., 10., 10., 22050, 3.


def plain(sf, program, key, velocity, block=64):
    "The same rules played block by block, as a real-time player does: index, interpolate, filter, shape. It aliases."
    n = round(DUR * SR)
    out = np.zeros(n, np.float32)
    for v in sf._sounding(0, program, key, velocity):
        x = sf.smpl[v.start:v.end].astype(np.float32) / 32768
        lo, turn, pos, state = v.loop - v.start, v.loop_end - v.loop, 0., np.zeros(2)
        step = float(sf.records['shdr']['rate'][v.sample]) / SR * 2 ** (v.cents / 1200)
        env, mod = amplitude(v.volume, n, SR, DUR), contour(v.mod, np.arange(0, n, block) / SR, DUR)
        for i in range(0, n, block):
            m = min(block, n - i)
            at = pos + step * np.arange(m)
            at = np.where(at >= lo + turn, lo + (at - lo) % turn, at) if v.mode & 1 else np.minimum(at, len(x) - 2)
            pos = at[-1] + step
            k = at.astype(int)
            y = x[k] + (x[np.minimum(k + 1, len(x) - 1)] - x[k]) * (at - k)
            hz = min(hertz(min(max(v.cutoff + v.mod_cutoff * mod[i // block], 1500), 13500)), .45 * SR)
            y, state = lfilter(*lowpass(hz, v.q, SR), y, zi=state)
            out[i:i + m] += y * env[i:i + m] * v.gain
    return out


def median_ms(f, asked):
    start = time.process_time()
    for a in asked: f(*a)
    return (time.process_time() - start) / len(asked) * 1000


def main():
    sf, rows = SoundFont(), {}
    groups = {name: [(p, k, v) for k in np.linspace(lo + 1, hi - 1, 3).round().astype(int).tolist() for v in (40, 80, 120)]
              for name, (p, lo, hi) in ORCHESTRA.items()}
    for name, asked in groups.items():
        plain(sf, *asked[0]), sf.note(*asked[0], DUR)
        pairs = [(median_ms(lambda *a: plain(sf, *a), asked[::4]), median_ms(lambda *a: sf.note(*a, DUR), asked)) for _ in range(ROUNDS)]
        rows[name] = tuple(statistics.median(c) for c in zip(*pairs))
    print(f'{"3-s note at 22.05 kHz, one thread":36}plain ms   ours ms   ratio')
    for name, (a, b) in rows.items(): print(f'{name:36}{a:8.1f}  {b:8.2f}  {a / b:6.1f}')
    a, b = (statistics.mean(c) for c in zip(*rows.values()))
    print(f'{"mean of the instruments":36}{a:8.1f}  {b:8.2f}  {a / b:6.1f}   floors: {NOTE_MS:g} ms, ratio {RATIO:g}')
    asked = [(p, k, v) for p, lo, hi in ORCHESTRA.values() for k in range(lo, hi + 1) for v in (40, 80, 120)]
    whole = []
    for _ in range(3):
        start, fresh = time.process_time(), SoundFont()
        for p in {a[0] for a in asked}: fresh.notes(p, [a[1] for a in asked if a[0] == p], [a[2] for a in asked if a[0] == p], dur=DUR)
        whole.append(time.process_time() - start)
    total = statistics.median(whole)
    print(f'{f"all {len(asked)} notes, nothing cached":36}{total:18.1f} s        floor: {ALL_S:g} s')
    good = b <= NOTE_MS and total <= ALL_S and a / b >= RATIO
    print('ok' if good else 'BELOW THE FLOOR')
    return 0 if good else 1


if __name__ == '__main__': sys.exit(main())

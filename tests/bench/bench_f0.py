"""The batched f0 tracker against librosa's pYIN over six octaves and more.

    python tests/bench/bench_f0.py [--pairs 9] [--sample 100] [--json FILE]

Speed: a batch of 0.6-s notes through `note_f0`, and one of its notes through pYIN over C2 to C8, interleaved; the ratio of
the times for a note is the median over pairs. Agreement: a sample of rendered notes and all real ones (where they are at
hand), both trackers searching A0 to C8; the share within 20 cents. Exits 1 below a floor.
"""
import argparse, json, os, statistics, sys, time
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # idle BLAS threads spin, and take a core from torch
import numpy as np, torch

FLOOR, AGREE, SR, DUR = 15., .98, 22050, .6


def rendered(sample, seed=0):
    "A random sample of the rendered orchestra: clips and note numbers."
    from disentangle_nb.data.notes import load_clips, orchestra_table
    table = orchestra_table(velocities=(80,)).sample(sample, random_state=seed)
    return load_clips(table, sr=SR, dur=DUR, cache=False), table.midi.to_numpy(float)


def real():
    "All real notes, one second each, and their note numbers; None where there are none."
    import pandas as pd
    from disentangle_nb.audio import load_audio
    from disentangle_nb.core import shared_audio
    folder = shared_audio()
    if folder is None: return None
    meta = pd.read_csv(folder/'metadata.csv').query("kind == 'note'")
    wavs = [load_audio(folder/f, SR, duration=1.)[0] for f in meta.file]
    return torch.stack([torch.nn.functional.pad(w, (0, SR - len(w))) for w in wavs]), meta.midi_pitch.to_numpy(float)


def agreement(name, wav, midi):
    "Share of notes on which both trackers are within 20 cents, and of each within 60 cents of the label."
    from disentangle_nb.features.descriptors import cents_between, midi_to_hz, note_f0, pyin_f0
    ours, theirs = note_f0(wav).numpy(), np.array([pyin_f0(w) for w in wav])
    near = lambda f, g, c: float((np.abs(cents_between(f, g)) < c).mean())
    row = dict(notes=len(wav), agree=near(ours, theirs, 20), ours=near(ours, midi_to_hz(midi), 60), pyin=near(theirs, midi_to_hz(midi), 60))
    print(f"{name:10} {row['notes']:5} {row['agree']:22.3f} {row['ours']:23.3f} {row['pyin']:23.3f}", flush=True)
    return row


def timed(f):
    t = time.perf_counter(); f()
    return time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--sample', type=int, default=100, help='rendered notes to compare')
    p.add_argument('--json', help='file to write the numbers to')
    args = p.parse_args()
    from disentangle_nb.features.descriptors import note_f0, pyin_f0
    sets = dict(rendered=rendered(args.sample), real=real()); wav = sets['rendered'][0][:64]
    pyin_f0(wav[0]), note_f0(wav)                                        # compile, warm up
    ours, theirs = [], []
    for i in range(args.pairs):
        theirs.append(timed(lambda: pyin_f0(wav[i], fmin=65.4, fmax=4186.)))
        ours.append(timed(lambda: note_f0(wav))/len(wav))
    ratio = statistics.median(b/a for a, b in zip(ours, theirs))
    print(f"a note of {DUR} s: ours {1e3*statistics.median(ours):.2f} ms, pYIN {1e3*statistics.median(theirs):.0f} ms; "
          f"ratio {ratio:.0f} (floor {FLOOR:g}), median of {args.pairs} interleaved pairs\n")
    print(f"{'':10} {'notes':>5} {'within 20 c of pYIN':>22} {'ours within 60 c/label':>23} {'pYIN within 60 c/label':>23}")
    rows = {k: agreement(k, *v) for k, v in sets.items() if v is not None}
    if sets['real'] is None: print('real       skipped: no real recordings here (set DISENTANGLE_AUDIO)')
    ok = ratio >= FLOOR and all(r['agree'] >= AGREE for r in rows.values())
    print(f"\n{'ok' if ok else 'BELOW THE FLOOR'}: ratio {ratio:.0f} >= {FLOOR:g}, agreement {min(r['agree'] for r in rows.values()):.3f} >= {AGREE}")
    if args.json:
        with open(args.json, 'w') as f: json.dump(dict(ratio=ratio, ours_ms=1e3*statistics.median(ours), pyin_ms=1e3*statistics.median(theirs), **rows), f, indent=1)
    return 0 if ok else 1


if __name__ == '__main__': sys.exit(main())

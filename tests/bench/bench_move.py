"""MoVE's cost: a training step beside UNIT's, a slice, a note, a solo.

    python tests/bench/bench_move.py [--pairs 9] [--system PATH] [--solo 30] [--json FILE]

Steps: `move_pair` and `unit_film` on the same batches of random slices, 64 of two instruments, everything included, in turn; the
ratio of medians must be below .8. A decoded slice at batch 1 on one thread: below 20 ms. A five-second note through `edit`, inversion included: at
least 5 times real time. A solo through `transfer`, its pitch tracked, on all threads: at least 2 times real time. Without `--system` an untrained network of the same size is
timed. Exits 1 if a bound is missed. Needs an idle machine.
"""
import argparse, json, statistics, sys, time
import torch
from disentangle_nb.core import seed_everything
from disentangle_nb.features.nsgt import NSGTMel
from disentangle_nb.models.move import move_model, pitch_code
from disentangle_nb.models.system import Disentangler
from disentangle_nb.synthesis.transfer import transfer
from disentangle_nb.training.move import SliceLoader, move_learner
from fastai.data.core import DataLoaders


def batches(k=2, steps=4, columns=32):
    "Loaders of a few steps of random notes."
    midi = torch.arange(60, 72)
    x = torch.randn(k*len(midi), 500, 256)
    loader = SliceLoader((x, torch.arange(k).repeat_interleave(len(midi)), midi.repeat(k)), columns, k)
    type(loader).__len__ = lambda self: steps
    return DataLoaders(loader, loader.new(), device=torch.device('cpu'))


def learner(preset):
    seed_everything(0)
    learn = move_learner(batches(), preset, weights={})
    learn.create_opt()
    return learn


def epoch(learn, steps=4):
    "Seconds a step with everything the preset asks for."
    for cb in learn.cbs:
        if type(cb).__name__ == 'Route': cb.after = 0.
    t = time.perf_counter()
    learn.fit(1)
    return (time.perf_counter() - t)/steps


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--system')
    p.add_argument('--solo', type=float, default=30.)
    p.add_argument('--json')
    args = p.parse_args()
    pair, unit = learner('move_pair'), learner('unit_film')
    epoch(pair), epoch(unit)
    rows = [(epoch(pair), epoch(unit)) for _ in range(args.pairs)]
    step = [1000*statistics.median(r[i] for r in rows) for i in (0, 1)]
    ratio = statistics.median(a/b for a, b in rows)
    threads = torch.get_num_threads()
    system = Disentangler.load(args.system, 'cpu') if args.system else Disentangler(NSGTMel(), move_model(pitches=tuple(range(55, 80))).eval(), dict(timbre=list('abcd'), pitch=list(range(55, 80))))
    torch.set_num_threads(1)
    z, who, what = torch.zeros(1, 3), torch.eye(4)[:1], pitch_code(torch.tensor([60.]))
    with torch.no_grad(): piece = 1000*statistics.median(timed(lambda: system.model.decode(z, who, what)) for _ in range(30))
    torch.set_num_threads(threads)
    t = torch.arange(110250)/22050
    note = sum(torch.sin(2*torch.pi*330*h*t)/h for h in range(1, 12))*.1
    name = system.vocabs['timbre'][1]
    one = 5/statistics.median(timed(lambda: system.edit(note, timbre=name)) for _ in range(5))
    solo = note.repeat(int(args.solo/5))
    long = len(solo)/22050/min(timed(lambda: transfer(system, solo, to=name)) for _ in range(3))
    print(f'step of 64 slices: move_pair {step[0]:.0f} ms, unit_film {step[1]:.0f} ms, ratio {ratio:.2f} (below .8)\n'
          f'one slice, one thread: {piece:.1f} ms (below 20)\na note of 5 s: {one:.1f} x real time (at least 5)\na solo of {len(solo)/22050:.0f} s: {long:.1f} x real time (at least 2)')
    if args.json: open(args.json, 'w').write(json.dumps(dict(step=step, ratio=ratio, slice_ms=piece, note=one, solo=long)))
    return int(ratio >= .8 or piece >= 20 or one < 5 or long < 2)


if __name__ == '__main__': sys.exit(main())

"""MoVE's cost: a training step beside UNIT's, a slice, a note, a solo, the memory of a long solo, a whole training.

    python tests/bench/bench_move.py [--pairs 9] [--system PATH] [--solo 30] [--minutes 10] [--profile cpu] [--skip PART ...] [--json FILE]

On two threads, but for the slice. `steps`: `move_pair` and `unit_film` on the same batches of random slices, 64 of two instruments, everything included, in turn; the
ratio of medians must be below .8. `slice`: decoded at batch 1 on one thread, below 20 ms. `note`: five seconds through `edit`, inversion included, at
least 5 times real time. `solo`: through `transfer`, its pitch tracked, at least 2 times real time. `memory`: the most that a process of its own holds
while it transfers a file of so many minutes (Linux), below 2 GB. `training`: one epoch of the profile's `move_multi`, of which a fifth is without translation as in the whole
training, times its epochs; at most 60 minutes. Without `--system` an untrained network of the same size is timed. Exits 1 if a bound is missed. Needs an idle machine.
"""
import argparse, functools, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import soundfile, torch
from disentangle_nb.core import seed_everything
from disentangle_nb.features.nsgt import NSGTMel
from disentangle_nb.models.move import move_model, pitch_code
from disentangle_nb.models.system import Disentangler
from disentangle_nb.studies.move import move_card, study_data, study_learner
from disentangle_nb.synthesis.transfer import transfer, transfer_file
from disentangle_nb.training.move import SliceLoader, move_learner
from fastai.data.core import DataLoaders

THREADS = 2


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
    return timed(lambda: learn.fit(1))/steps


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


@functools.cache
def system(path):
    "A saved system, or an untrained one."
    if path: return Disentangler.load(path, 'cpu')
    seed_everything(0)
    return Disentangler(NSGTMel(), move_model(pitches=tuple(range(55, 80))).eval(), dict(timbre=list('abcd'), pitch=list(range(55, 80))))


def tone(hz=330, seconds=5., sr=22050):
    t = torch.arange(round(seconds*sr))/sr
    return sum(torch.sin(2*torch.pi*hz*h*t)/h for h in range(1, 12))*.1


def measure_steps(args):
    pair, unit = learner('move_pair'), learner('unit_film')
    epoch(pair), epoch(unit)
    rows = [(epoch(pair), epoch(unit)) for _ in range(args.pairs)]
    step = [1000*statistics.median(r[i] for r in rows) for i in (0, 1)]
    ratio = statistics.median(a/b for a, b in rows)
    return dict(step=step, ratio=ratio), ratio < .8, f'step of 64 slices: move_pair {step[0]:.0f} ms, unit_film {step[1]:.0f} ms, ratio {ratio:.2f} (below .8)'


def measure_slice(args):
    torch.set_num_threads(1)
    model, told = system(args.system).model, (torch.zeros(1, 3), torch.eye(4)[:1], pitch_code(torch.tensor([60.])))
    with torch.no_grad(): piece = 1000*statistics.median(timed(lambda: model.decode(*told)) for _ in range(30))
    torch.set_num_threads(THREADS)
    return dict(slice_ms=piece), piece < 20, f'one slice, one thread: {piece:.1f} ms (below 20)'


def measure_note(args):
    s, note = system(args.system), tone()
    one = 5/statistics.median(timed(lambda: s.edit(note, timbre=s.vocabs['timbre'][1])) for _ in range(5))
    return dict(note=one), one >= 5, f'a note of 5 s: {one:.1f} x real time (at least 5)'


def measure_solo(args):
    s, solo = system(args.system), tone().repeat(int(args.solo/5))
    long = len(solo)/22050/min(timed(lambda: transfer(s, solo, to=s.vocabs['timbre'][1])) for _ in range(3))
    return dict(solo=long), long >= 2, f'a solo of {len(solo)/22050:.0f} s: {long:.1f} x real time (at least 2)'


def write_melody(path, minutes, sr=44100):
    "A short melody, again and again."
    melody = torch.cat([tone(440*2**((m - 69)/12), .5, sr) for m in (60, 64, 67, 72, 69, 65, 62, 60)]).numpy()
    with soundfile.SoundFile(path, 'w', sr, 1) as f:
        left = round(60*minutes*sr)
        while left > 0:
            f.write(melody[:left])
            left -= len(melody)


def held(): return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))/1024  # MiB at most so far


def transferred(path, folder):
    "What a process holds, MiB, once it is ready and at most, while it transfers a file."
    torch.set_num_threads(THREADS)
    s = system(path)
    ready = held()
    transfer_file(s, f'{folder}/in.wav', f'{folder}/out.wav', to=s.vocabs['timbre'][1])
    if (a := soundfile.info(f'{folder}/in.wav').frames) != (b := soundfile.info(f'{folder}/out.wav').frames): raise ValueError(f'{b} samples came of {a}')
    return ready, held()


def measure_memory(args):
    code = 'import sys; sys.path.insert(0, sys.argv[1])\nimport bench_move as b\nprint(*b.transferred(*sys.argv[2:]))'
    with tempfile.TemporaryDirectory() as folder:
        write_melody(f'{folder}/in.wav', args.minutes)
        done = subprocess.run([sys.executable, '-c', code, Path(__file__).resolve().parent, args.system or '', folder], stdout=subprocess.PIPE, text=True, check=True)
    ready, most = map(float, done.stdout.splitlines()[-1].split())
    return dict(memory=dict(minutes=args.minutes, ready_mib=ready, peak_mib=most)), most < 2e9/2**20, f'a file of {args.minutes:g} minutes: {most:.0f} MiB at most (below 1907, 2 GB), {ready:.0f} of them before it begins'


def measure_training(args):
    card = move_card('move_multi', args.profile)
    learn = study_learner(card, study_data(card))
    one = timed(lambda: learn.fit_one_cycle(1, card.lr))
    minutes = one*card.epochs/60
    return (dict(training=dict(profile=args.profile, epochs=card.epochs, epoch_s=one, minutes=minutes)), minutes <= 60,
            f'an epoch of move_multi, {args.profile}: {one:.1f} s; {card.epochs} of them: {minutes:.1f} minutes (at most 60)')


PARTS = dict(steps=measure_steps, slice=measure_slice, note=measure_note, solo=measure_solo, memory=measure_memory, training=measure_training)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--system')
    p.add_argument('--solo', type=float, default=30.)
    p.add_argument('--minutes', type=float, default=10., help='of the file whose transfer is watched for its memory')
    p.add_argument('--profile', default='cpu', choices=['quick', 'cpu'], help='of the training')
    p.add_argument('--skip', nargs='+', default=[], choices=PARTS, help='parts to leave out')
    p.add_argument('--json')
    args = p.parse_args()
    torch.set_num_threads(THREADS)
    parts = [k for k in PARTS if k not in args.skip and (k != 'memory' or os.path.exists('/proc/self/status'))]
    out, good = dict(threads=THREADS), True
    for k in parts:
        found, kept, said = PARTS[k](args)
        print(said, flush=True)
        out, good = out | found, good and kept
    if args.json: open(args.json, 'w').write(json.dumps(out))
    return int(not good)


if __name__ == '__main__': sys.exit(main())

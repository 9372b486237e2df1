"""A move in the explorer: how long the decoder takes for one slice, and how long it is from the controls to the samples.

    python tests/bench/bench_explore.py [--run move-small] [--moves 25] [--json FILE]

One core, batch 1; medians over moves that go through the range of all sliders. The browser adds what it needs to load a
sound (tests/test_explore.py prints it). Exits 1 above a ceiling: 20 ms for the decoder, 150 ms for a move.
"""
import argparse, json, os, sys
for k in ('OMP', 'OPENBLAS', 'MKL'): os.environ.setdefault(f'{k}_NUM_THREADS', '1')
import torch

CEILING = dict(decoder=20., move=150.)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--run', default='move-small', help='run folder, or the name of a system that ships')
    p.add_argument('--moves', type=int, default=25)
    p.add_argument('--json', help='file to write the numbers to')
    args = p.parse_args()
    torch.set_num_threads(1)
    from disentangle_nb.models.system import Disentangler
    from disentangle_nb.synthesis.explore import Explorer, move_times
    took = move_times(Explorer(Disentangler.load(args.run, 'cpu')), args.moves)
    for k, ms in took.items(): print(f'{k:8} {ms:7.1f} ms  (at most {CEILING[k]:g})')
    if args.json:
        with open(args.json, 'w') as f: json.dump(dict(run=args.run, ms=took, ceiling=CEILING), f, indent=1)
    return int(any(took[k] > CEILING[k] for k in took))


if __name__ == '__main__': sys.exit(main())

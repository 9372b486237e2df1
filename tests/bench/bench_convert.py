"""`disentangle_convert` from start to end: seconds and memory for ten minutes and an hour, in one file and in many.

    python tests/bench/bench_convert.py [--minutes 10 60] [--files 60] [--threads 2] [--factors 256] [--json FILE]

A take of melodies is rendered once and repeated under noise, no two repetitions alike, as 16-bit WAV at 44.1 kHz in stereo and at 22.05 kHz
in mono: as one file of each length, and the last length again as many files. The system has the published sizes (120 bins, 256 factors, codes
of 64) and is untrained, since that costs the same. Each line is one process of the command from its start to its end: wall clock, seconds
of processor of all its threads, and the most memory that it held. Exits 1 where an hour takes more than a minute, or where the longest file
needs over 1.1 times the memory of the shortest or any over 1 GB. Needs an idle machine, and 700 MB in the temporary folder (TMPDIR).
"""
import argparse, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

HOUR, FLAT, MOST_MB = 60., 1.1, 1000 # s of wall clock for an hour of sound; longest file over shortest; at most
KINDS = {'44.1 kHz stereo': (44100, 2), '22.05 kHz mono': (22050, 1)}


def write_system(folder, factors):
    "An untrained system of the published sizes."
    import torch
    from disentangle_nb.features.cqt import CQT
    from disentangle_nb.models.gated import GatedAutoencoder
    from disentangle_nb.models.system import Disentangler
    torch.manual_seed(0)
    Disentangler(CQT(), GatedAutoencoder(n_factors=int(factors), gain=(6, 4)), {}, dict(study='intervals')).save(folder)


def write_take(path, sr):
    "Half a minute of melodies, as an array."
    import numpy as np
    from disentangle_nb.data.recordings import take
    np.save(path, take(0, 'train', seconds=30., sr=int(sr)).wav.numpy()[:30*int(sr)])


def write_sound(folder, take, sr, channels, minutes, files):
    "A take under noise, again and again, as so many files and a list of them."
    import numpy as np, soundfile as sf
    x, rng, sr, n, files = np.load(take)[:, None], np.random.default_rng(0), int(sr), round(float(minutes)*60*int(sr)), int(files)
    for i in range(files):
        left = n//files
        with sf.SoundFile(f'{folder}/{i:03d}.wav', 'w', sr, int(channels), 'PCM_16') as f:
            while left > 0:
                y = rng.uniform(.5, 1.)*x[:left] + .01*rng.standard_normal((min(left, len(x)), int(channels)), np.float32)
                f.write(y.clip(-1, 1))
                left -= len(y)
    Path(f'{folder}/list.txt').write_text(''.join(f'{i:03d}.wav\n' for i in range(files)))


def apart(*args):
    "Run one of these functions in a process of its own: a child's peak of memory is at least that of its parent when it was born."
    subprocess.run([sys.executable, __file__, '--apart', *map(str, args)], check=True)


def convert(run, folder, threads):
    "Seconds, seconds of processor, MB at most, minutes and files of one `disentangle_convert`."
    code, start = 'from disentangle_nb.cli import convert; raise SystemExit(convert())', time.perf_counter()
    env = os.environ | {k: str(threads) for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}
    with open(f'{folder}/said', 'w+') as out, open(f'{folder}/err', 'w+') as err:
        p = subprocess.Popen([sys.executable, '-c', code, run, f'{folder}/list.txt', '--out', f'{folder}/codes', '--device', 'cpu'], stdout=out, stderr=err, env=env)
        _, status, used = os.wait4(p.pid, 0)
        took, p.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        said = re.search(r': (\d+) files, .* ([\d.]+) minutes', out.read())
        if p.returncode or not said: raise SystemExit(f'disentangle_convert failed:\n{err.read()[-2000:]}')
    return dict(seconds=took, cpu_s=used.ru_utime + used.ru_stime, mb=used.ru_maxrss/(1e6 if sys.platform == 'darwin' else 1e3/1.024),
                files=int(said[1]), minutes=float(said[2]))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, nargs='+', default=[10, 60], help='lengths of one file (default 10 60)')
    p.add_argument('--files', type=int, default=60, help='files of the last length, 0 for none (default 60)')
    p.add_argument('--threads', type=int, default=2, help='threads of the command (default 2)')
    p.add_argument('--factors', type=int, default=256, help='filters on either side (default 256)')
    p.add_argument('--json', type=Path, help='write the numbers here too')
    p.add_argument('--apart', nargs='+', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.apart: return globals()[args.apart[0]](*args.apart[1:])
    rows, missed = {}, []
    with tempfile.TemporaryDirectory() as root:
        apart('write_system', f'{root}/run', args.factors)
        for kind, (sr, channels) in KINDS.items():
            apart('write_take', f'{root}/{sr}.npy', sr)
            for minutes, files in [*((m, 1) for m in args.minutes), *[(args.minutes[-1], args.files)]*bool(args.files)]:
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    apart('write_sound', folder, f'{root}/{sr}.npy', sr, channels, minutes, files)
                    r = rows[f'{kind}, {minutes:g} min, {files} file{"s"*(files > 1)}'] = convert(f'{root}/run', folder, args.threads)
                if (r['files'], round(r['minutes'])) != (files, round(minutes)): missed.append(f'all of it: {r}')
                hour = r['seconds']/minutes*60
                print(f"{kind:16} {minutes:4g} min in {files:3d}: {r['seconds']:6.1f} s, {r['cpu_s']:6.1f} s of processor, {r['mb']:5.0f} MB"
                      + f' (at most {HOUR:g} s, {MOST_MB} MB)'*(minutes >= 60), flush=True)
                if minutes >= 60 and hour > HOUR: missed.append(f'{minutes:g} min of {kind} in {files}: a minute for an hour')
                if r['mb'] > MOST_MB: missed.append(f'{minutes:g} min of {kind} in {files}: memory')
            a, b = (rows[f'{kind}, {m:g} min, 1 file']['mb'] for m in (args.minutes[0], args.minutes[-1]))
            print(f'{kind:16} memory, longest file over shortest: {b/a:.2f} (at most {FLAT:g})')
            if b > FLAT*a: missed.append(f'{kind}: memory flat in the length')
    if args.json: args.json.write_text(json.dumps(rows, indent=1) + '\n')
    print('missed: ' + '; '.join(missed) if missed else 'all bounds held')
    return int(bool(missed))


if __name__ == '__main__': sys.exit(main())

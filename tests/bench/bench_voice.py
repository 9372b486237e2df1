"""A training step of the voice representation, against the plain way to write it; and with --separate, the speed and memory of separating a file.

    python tests/bench/bench_voice.py [--penalty tv] [--pairs 9] [--device cpu] [--batch 8] [--seconds 1] [--components 800] [--kernel 2048] [--hop 256] [--json FILE]
    python tests/bench/bench_voice.py --separate

The plain way convolves as the layers are told, encodes voice and mixture in two calls, makes the basis from 1.6 million cosines, sorts
kernels and coefficients by carrier in each synthesis, takes the optimiser as it comes and reads the loss after each step. Ours is
`CosineAutoencoder.forward` with `neg_snr` and `total_variation`; with `--penalty sinkhorn` the transport cost, on the plain side by differences of
all pairs of frames and a thousand scalings, differentiated step by step (some 3.5 GB). Both start from the same weights and see the same batches; their first losses
have to agree. Steps are interleaved; a ratio is the median over pairs, ours in bfloat16 against the plain one in float32 too where the
processor has it. With `--separate` instead: a stereo file at 44.1 kHz through a separator of the papers' size (free encoder, 800 cosines, temporal
convolutions), untrained, since that costs the same: seconds of song a second, and the peak memory of separating one minute and ten, each
in a process of its own. Exits 1 below a floor or where losses differ. Needs an idle machine; sizes below the defaults only try it out.
"""
import argparse, json, math, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F

FLOORS = dict(tv={'float32': 1., 'bf16': 1.3}, sinkhorn={'float32': 4.3, 'bf16': 6.})
WEIGHT, RATE = .5, 1e-4
REAL_TIME, MOST_MB = 10., 2000 # x real time; peak of ten minutes


def batches(batch, n, device, seed=0):
    "Noisy voice, clean voice and mixture, without end: smoothed noise will do."
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(4):
        voice, rest = F.avg_pool1d(torch.randn(2, batch, n, generator=g), 5, 1, 2).mul_(.2).unbind()
        made.append(tuple(v.to(device) for v in (voice + 1e-4*torch.randn(batch, n, generator=g), voice, voice + rest)))
    while True: yield from made


class Plain(nn.Module):
    "Layers in the order in which they are told, padded for one length."
    def __init__(self, c, l, h, n):
        super().__init__()
        t = math.ceil(n/h)
        self.h, self.n = h, n
        self.pad = ((t - 1)*h + l - n)//2
        self.odd = ((t - 1)*h + l - n) % 2
        self.a1, self.a2 = nn.Conv1d(1, c, l, h, self.pad, bias=False), nn.Conv1d(c, c, 5, 1, 20, 10, bias=False)
        self.theta, self.phi, self.b = [nn.Parameter(torch.zeros(s)) for s in ((c, 1, 1), (c, 1, 1), (c, 1, l))]
        self.register_buffer('time', torch.arange(l, dtype=torch.float32)[None, None])

    def encode(self, x):
        H = self.a1(F.pad(x, (0, self.odd))[:, None])
        return F.relu(self.a2(H) + H)

    def decode(self, a):
        theta, order = torch.sort(self.theta[:, 0, 0])
        carrier = torch.cos(2*math.pi*theta[:, None, None]**2*self.time + self.phi[order])
        y = F.conv_transpose1d(a[:, order], self.b[order]*carrier, stride=self.h, padding=self.pad)
        return y[:, 0, :self.n]


def plain_variation(a):
    rows, cols = a[:, :, :-1] - a[:, :, 1:], a[:, :-1] - a[:, 1:]
    return rows.norm()/a.shape[2] + cols.norm()/a.shape[1]


def plain_transport(a, reg=1.3, steps=1000):
    q = a + 1/a.shape[1]
    q = q/q.sum(-1, keepdim=True)
    M = torch.stack([(v[:, :, None] - v[:, None]).abs().sum(0) for v in q]).mean(0)
    K, n = torch.exp(-M/reg), len(M)
    u = torch.full_like(M[0], 1/n)
    for _ in range(steps):
        v = 1/n/(K.T @ u)
        u = 1/n/(K @ v)
    return (u[:, None]*K*v*M).sum()


def plain_steps(model, data, device, penalty):
    "Generator: make a step, yield its loss and its seconds."
    asked = dict(tv=plain_variation, sinkhorn=plain_transport)[penalty]
    opt = torch.optim.Adam(model.parameters(), RATE)
    for noisy, voice, mix in data:
        start = time.perf_counter()
        x_hat = model.decode(model.encode(noisy))
        a = model.encode(mix)
        rec = -10*torch.log10(voice.norm()**2/((voice - x_hat).norm()**2 + 1e-24) + 1e-24)
        loss = rec + WEIGHT*asked(a)
        opt.zero_grad()
        loss.backward()
        opt.step()
        value = loss.item()
        yield value, time.perf_counter() - start


def our_steps(model, data, device, penalty, half=False):
    "The same with this package's parts."
    from disentangle_nb.losses.sinkhorn import sinkhorn_penalty
    from disentangle_nb.losses.waveform import neg_snr, total_variation
    opt, asked = torch.optim.Adam(model.parameters(), RATE, fused=True), dict(tv=total_variation, sinkhorn=sinkhorn_penalty)[penalty]
    kind = torch.device(device).type
    for noisy, voice, mix in data:
        start = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, half): out = model(noisy, mix)
        loss = neg_snr(out['x_hat'], voice) + WEIGHT*asked(out['a_mix'])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if kind == 'cuda': torch.cuda.synchronize()
        took = time.perf_counter() - start
        yield loss.item(), took


def same_weights(plain, ours):
    "Give the plain model the weights of ours."
    with torch.no_grad():
        for to, own in ((plain.a1.weight, ours.encoder.k1), (plain.a2.weight, ours.encoder.k2), (plain.theta, ours.decoder.theta), (plain.phi, ours.decoder.phi), (plain.b, ours.decoder.b)):
            to.copy_(own.view_as(to))


def make(args):
    "Our model, alike at each call."
    from disentangle_nb.models.cosine import CosineAutoencoder
    torch.manual_seed(0)
    return CosineAutoencoder(args.components, args.kernel, args.hop).to(args.device)


def peak_mb():
    "The most memory this process has held (not its parent's, as ru_maxrss would have it)."
    return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')).split()[1])/1000


def separate_once(seconds):
    "Separate a file of noise; prints seconds taken and peak memory, MB, as JSON."
    import numpy as np, soundfile as sf
    from disentangle_nb.features.waveform import Waveform
    from disentangle_nb.models.mask import Separator
    from disentangle_nb.models.system import Disentangler
    from disentangle_nb.synthesis.separate import separate_file
    torch.manual_seed(0)
    system = Disentangler(Waveform(44100, 256), Separator('cosine', dict(components=800, kernel=2048, hop=256, sr=44100), 'tcn', n_frames=517), {})
    with tempfile.TemporaryDirectory() as d:
        with sf.SoundFile(f'{d}/song.wav', 'w', 44100, 2, 'PCM_16') as f:
            for i in range(seconds): f.write(.1*np.random.default_rng(i).standard_normal((44100, 2)))
        start = time.perf_counter()
        separate_file(system, f'{d}/song.wav', f'{d}/stems')
        print(json.dumps(dict(seconds=time.perf_counter() - start, mb=peak_mb())))


def separating(lengths=(60, 600)):
    "Speed and memory at two lengths; 1 when a bound is missed."
    got = {n: json.loads(subprocess.run([sys.executable, __file__, '--once', str(n)], check=True, capture_output=True, text=True).stdout) for n in lengths}
    for n, r in got.items(): print(f"{n:5d} s of stereo at 44.1 kHz: {n/r['seconds']:6.1f} x real time (floor {REAL_TIME:g} x), peak {r['mb']:6.0f} MB (bound {MOST_MB} MB)")
    last = got[lengths[-1]]
    missed = ['speed']*(lengths[-1]/last['seconds'] < REAL_TIME) + ['memory']*(last['mb'] > MOST_MB) + ['memory flat in the length']*(last['mb'] > 1.15*got[lengths[0]]['mb'])
    print('missed: ' + '; '.join(missed) if missed else 'all bounds held')
    return int(bool(missed))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--penalty', choices=list(FLOORS), default='tv')
    p.add_argument('--pairs', type=int, default=9, help='interleaved pairs of steps (default 9)')
    p.add_argument('--device', default='cpu')
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--seconds', type=float, default=1., help='length of a segment at 44.1 kHz')
    p.add_argument('--components', type=int, default=800)
    p.add_argument('--kernel', type=int, default=2048)
    p.add_argument('--hop', type=int, default=256)
    p.add_argument('--json', type=Path, help='write the medians here too')
    p.add_argument('--separate', action='store_true', help='speed and memory of separating one minute and ten')
    p.add_argument('--once', type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.once: return separate_once(args.once)
    if args.separate: return separating()
    from disentangle_nb.training.learner import bf16_support
    floors, n, native = FLOORS[args.penalty], round(44100*args.seconds), bf16_support(args.device)[0]
    plain = Plain(args.components, args.kernel, args.hop, n).to(args.device)
    same_weights(plain, make(args))
    data = lambda: batches(args.batch, n, args.device)
    runs = {'plain': plain_steps(plain, data(), args.device, args.penalty), 'float32': our_steps(make(args), data(), args.device, args.penalty)}
    if native: runs['bf16'] = our_steps(make(args), data(), args.device, args.penalty, half=True)
    first = {k: next(r)[0] for k, r in runs.items()}
    for r in runs.values(): next(r)
    took = {k: [] for k in runs}
    for _ in range(args.pairs):
        for k, r in runs.items(): took[k].append(next(r)[1])
    ms = {k: 1000*statistics.median(v) for k, v in took.items()}
    ratio = {k: statistics.median(a/b for a, b in zip(took['plain'], took[k])) for k in runs if k != 'plain'}
    off = abs(first['plain'] - first['float32'])/max(1., abs(first['plain']))
    print(f"Step with {args.penalty}, {args.batch} x {args.seconds:g} s, {args.components} components of {args.kernel}, hop {args.hop}; {torch.get_num_threads()} threads, torch {torch.__version__}, {args.pairs} pairs\n"
          f"  plain   {ms['plain']:9.1f} ms   first loss {first['plain']:.5f}")
    for k in ratio: print(f"  {k:8}{ms[k]:9.1f} ms   first loss {first[k]:.5f}   {ratio[k]:5.2f} x   floor {floors[k]} x")
    if not native: print('  bf16 left out: not native here')
    missed = [k for k in ratio if ratio[k] < floors[k]] + ['the same loss']*(off > 1e-4)
    if args.json: args.json.write_text(json.dumps(dict(ms=ms, ratio=ratio, first=first), indent=1) + '\n')
    print('missed: ' + '; '.join(missed) if missed else 'all floors held')
    return int(bool(missed))


if __name__ == '__main__': sys.exit(main())

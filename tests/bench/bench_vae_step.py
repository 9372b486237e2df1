"""One training step of the published VAE of tones, batch 64, against the plain way to write it.

    python tests/bench/bench_vae_step.py [--pairs 9] [--device cpu] [--json FILE]

The plain way reads clip by clip through librosa, stacks modules as they are described, loops where a formula has an index
and uses an optimiser as it comes. Ours is the step of `vae_learner` with all its callbacks. Three comparisons for each
objective: features made in the step on both sides; features in memory on both sides; the same in bfloat16 on ours.
Steps are interleaved; a ratio is the median over pairs. Exits 1 below a floor.
"""
import argparse, itertools, json, math, statistics, sys, time, warnings
from pathlib import Path
import numpy as np, torch
from torch import nn
from torch.nn import functional as F

FLOORS = {'features made in the step': 4., 'features in memory': 1.5, 'in memory, bf16': 1.7}
CLIPS, BATCH, N_DATA, LATENT = 512, 64, 25600, 8
OBJECTIVES = ('vae', 'tc', 'factor')


class Clips(torch.utils.data.Dataset):
    "Clips and, when asked, one mel spectrogram at a time; or spectrograms that are there already."
    def __init__(self, wav, mel=None): self.wav, self.mel = wav, mel
    def __len__(self): return len(self.wav)

    def __getitem__(self, i):
        if self.mel is not None: return self.mel[i]
        import librosa
        power = librosa.feature.melspectrogram(y=self.wav[i], sr=16000)
        return torch.from_numpy(librosa.util.normalize(power).astype(np.float32))[None]


def stage(i, o): return [nn.Conv2d(i, o, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)]
def unstage(i, o): return [nn.ConvTranspose2d(i, o, 3, 2, 1, 1), nn.LeakyReLU()]


class Plain(nn.Module):
    "The layers in the order in which they are told."
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(*stage(1, 16), *stage(16, 32), *stage(32, 64), nn.Flatten(), nn.Linear(4096, 128), nn.LeakyReLU(),
                                 nn.Linear(128, 64), nn.LeakyReLU())
        self.mu, self.logvar = nn.Linear(64, LATENT), nn.Linear(64, LATENT)
        self.dec = nn.Sequential(nn.Linear(LATENT, 64), nn.LeakyReLU(), nn.Linear(64, 128), nn.LeakyReLU(), nn.Linear(128, 4096), nn.LeakyReLU(),
                                 nn.Unflatten(1, (64, 16, 4)), *unstage(64, 32), *unstage(32, 16), nn.ConvTranspose2d(16, 1, 3, 2, 1, 1), nn.Sigmoid())

    def draw(self, mu, logvar): return mu + torch.exp(.5 * logvar) * torch.randn_like(mu)

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.dec(self.draw(mu, logvar)), mu, logvar


def judge():
    sizes = [LATENT] + [1000] * 5
    return nn.Sequential(*[m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.LeakyReLU(.2))], nn.Linear(1000, 2))


def kl(mu, logvar): return -.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum(1).mean()


def total_correlation(z, mu, logvar):
    "Weighted parts of the divergence, the mixture over the batch written out."
    d = z.shape[1]
    density = lambda z, mu, logvar: -.5 * ((z - mu) ** 2 / logvar.exp() + logvar + math.log(2 * math.pi))
    b = len(z)
    pairs = density(z.view(b, 1, d), mu.view(1, b, d), logvar.view(1, b, d))
    weights = torch.full((b, b), 1 / (b - 1))
    for i in range(b): weights[i, i], weights[i, (i + 1) % b] = 1 / N_DATA, (N_DATA - b + 1) / (N_DATA * (b - 1))
    w = weights.log().to(z.device)
    joint = torch.logsumexp(w + pairs.sum(2), 1)
    single = sum(torch.logsumexp(w + pairs[:, :, k], 1) for k in range(d))
    own, prior = density(z, mu, logvar).sum(1), density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    return (own - joint).mean() + 4 * (joint - single).mean() + (single - prior).mean()


def plain_steps(data, objective, device):
    "Generator of seconds, one plain training step each."
    torch.manual_seed(0)
    model, other = Plain().to(device), judge().to(device)
    opt, opt2 = torch.optim.Adam(model.parameters(), 1e-3), torch.optim.Adam(other.parameters(), 5e-5, (.5, .9))
    bs = BATCH * (1 + (objective == 'factor'))
    while True:
        yield
        start = time.perf_counter()
        x = next_batch(data, bs).to(device)
        if objective == 'factor': factor_step(model, other, opt, opt2, x)
        else:
            x_hat, mu, logvar = model(x)
            loss = F.mse_loss(x_hat, x, reduction='sum')
            loss = loss + (kl(mu, logvar) if objective == 'vae' else total_correlation(model.draw(mu, logvar), mu, logvar))
            opt.zero_grad()
            loss.backward()
            opt.step()
            loss.item()
        yield time.perf_counter() - start


def next_batch(data, bs):
    "A batch, made from its items as a data loader makes it."
    return torch.utils.data.default_collate([data[i] for i in torch.randint(len(data), (bs,)).tolist()])


def factor_step(model, other, opt, opt2, x):
    "Two passes, the first kept for the second."
    one, two = x.chunk(2)
    x_hat, mu, logvar = model(one)
    z = model.draw(mu, logvar)
    logits = other(z)
    loss = F.mse_loss(x_hat, one, reduction='sum') + kl(mu, logvar) + 6 * (logits[:, 0] - logits[:, 1]).mean()
    opt.zero_grad()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        h = model.enc(two)
        z2 = model.draw(model.mu(h), model.logvar(h))
        mixed = torch.stack([z2[torch.randperm(len(z2)), k] for k in range(LATENT)], 1)
    a, b = other(z.detach()), other(mixed)
    zeros = torch.zeros(len(a), dtype=torch.long, device=x.device)
    loss2 = .5 * (F.cross_entropy(a, zeros) + F.cross_entropy(b, zeros + 1))
    opt2.zero_grad()
    loss2.backward()
    opt.step()
    opt2.step()
    loss.item(), loss2.item()


def our_steps(wav, mel, objective, device, bf16=False, made=False):
    "Generator of seconds, one step of our Learner's own loop each."
    from fastai.data.core import DataLoaders
    from disentangle_nb.data.batches import BatchLoader
    from disentangle_nb.features.tonemel import MaxMel
    from disentangle_nb.losses.tc import BetaTCLoss, FactorLoss, VAELoss
    from disentangle_nb.models.vae import Discriminator, ToneVAE
    from disentangle_nb.training.vae import vae_learner
    torch.manual_seed(0)
    feature = MaxMel().to(device)
    bs = BATCH * (1 + (objective == 'factor'))
    loader = BatchLoader((wav if made else mel, torch.arange(len(wav))), bs, shuffle=True, device=device, drop_last=True,
                         augment=(lambda b, g: (feature.encode(b[0]), b[1])) if made else None)
    loss = dict(vae=lambda: VAELoss(1., True), tc=lambda: BetaTCLoss(N_DATA, estimator='stratified', faithful=True),
                factor=lambda: FactorLoss(Discriminator(LATENT), faithful=True))[objective]()
    learn = vae_learner(DataLoaders(loader, loader, device=torch.device(device)), ToneVAE(latent=LATENT), loss, bf16=bf16, bars=False)
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-3)
    learn.n_epoch, learn.epoch, learn.dl, learn.training, learn.n_iter = 1, 0, learn.dls.train, True, len(loader)
    learn('before_fit'), learn('before_epoch'), learn('before_train')
    learn.model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    while True:
        yield
        start = time.perf_counter()
        learn.one_batch(0, next(batches))
        if str(device) != 'cpu': torch.cuda.synchronize()
        yield time.perf_counter() - start


def measure(runs, pairs):
    "Median seconds of each, and the median ratio of the first to every other."
    for r in runs.values():
        for _ in range(4): next(r)  # two steps that allocate
    took = {k: [] for k in runs}
    for _ in range(pairs):
        for k, r in runs.items():
            next(r)
            took[k].append(next(r))
    return {k: statistics.median(v) for k, v in took.items()}, {k: statistics.median(a / b for a, b in zip(took['plain'], v)) for k, v in took.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', type=int, default=9, help='interleaved pairs of steps (default 9)')
    p.add_argument('--device', default='cpu')
    p.add_argument('--json', type=Path, help='write the medians here too')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    from disentangle_nb.core import make_generator
    from disentangle_nb.data.syntone import Tones
    from disentangle_nb.features.tonemel import MaxMel
    from disentangle_nb.training.learner import bf16_support
    wav, _ = Tones(compat=True).batch(CLIPS, make_generator(0))
    mel, native = MaxMel().encode(wav), bf16_support(args.device)[0]
    plain = Clips(wav.double().numpy()), Clips(wav, mel[:, None])
    found, missed = {}, []
    print(f"VAE step, batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.pairs} interleaved pairs")
    for objective in OBJECTIVES:
        ours = lambda **kw: our_steps(wav, mel, objective, args.device, **kw)
        made, ratio = measure(dict(plain=plain_steps(plain[0], objective, args.device), ours=ours(made=True)), args.pairs)
        rows = {'features made in the step': (made['plain'], made['ours'], ratio['ours'])}
        kept, ratio = measure(dict(plain=plain_steps(plain[1], objective, args.device), ours=ours(), **({'bf16': ours(bf16=True)} if native else {})), args.pairs)
        rows |= {'features in memory': (kept['plain'], kept['ours'], ratio['ours'])} | ({'in memory, bf16': (kept['plain'], kept['bf16'], ratio['bf16'])} if native else {})
        for what, (a, b, x) in rows.items():
            print(f"  {objective:7}{what:27}{1000 * a:8.1f} ms ->{1000 * b:8.1f} ms {x:6.2f} x   floor {FLOORS[what]} x", flush=True)
            if x < FLOORS[what]: missed.append(f'{objective}, {what}')
        found[objective] = {w: dict(plain_ms=1000 * a, ours_ms=1000 * b, ratio=x) for w, (a, b, x) in rows.items()}
    if not native: print('  bf16 left out: not native here')
    if args.json: args.json.write_text(json.dumps(found, indent=1) + '\n')
    print('missed: ' + '; '.join(missed) if missed else 'all floors held')
    sys.exit(bool(missed))


if __name__ == '__main__': main()

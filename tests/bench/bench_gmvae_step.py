"""One training step of the full-size GMVAE, batch 128, against a plain implementation of the same maths.

    python tests/bench/bench_gmvae_step.py [--pairs 7] [--device cpu] [--json FILE]

The plain one is written as one would at first: it reads one file for each note, loops over classes, and uses an
optimiser as it comes. Ours is what `gmvae_learner` trains with. Steps are interleaved; the ratio is the median over pairs.
Exits 1 below a floor.
"""
import argparse, json, math, statistics, sys, tempfile, time
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F

FLOOR, FLOOR_BF16, BATCH, NOTES = 1.2, 2.1, 128, 512


def half_encoder(latent=16):
    conv = nn.Sequential(nn.Conv1d(256, 512, 3), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, 512, 3), nn.BatchNorm1d(512), nn.ReLU())
    return nn.ModuleDict(dict(conv=conv, fc=nn.Sequential(nn.Linear(19968, 512), nn.BatchNorm1d(512), nn.ReLU()),
                              mu=nn.Linear(512, latent), logvar=nn.Linear(512, latent)))


class Plain(nn.Module):
    "The same layers, written out; classes are visited one after the other."
    def __init__(self):
        super().__init__()
        self.timbre, self.pitch = half_encoder(), half_encoder()
        self.fc = nn.Sequential(nn.Linear(32, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 19968), nn.BatchNorm1d(19968), nn.ReLU())
        self.deconv = nn.Sequential(nn.ConvTranspose1d(512, 512, 3), nn.BatchNorm1d(512), nn.ReLU(), nn.ConvTranspose1d(512, 256, 3), nn.Tanh())
        self.mu_t, self.mu_p = nn.Parameter(torch.randn(12, 16) * .3), nn.Parameter(torch.randn(82, 16) * .1)
        self.read = nn.Linear(16, 82)

    def code(self, half, x):
        h = half['fc'](half['conv'](x).reshape(len(x), -1))
        mu, logvar = half['mu'](h), half['logvar'](h)
        return mu, logvar, mu + torch.exp(.5 * logvar) * torch.randn_like(mu)

    def loss(self, x, timbre, pitch, labelled):
        mu, logvar, z = self.code(self.timbre, x)
        mu_p, logvar_p, z_p = self.code(self.pitch, x)
        x_hat = self.deconv(self.fc(torch.cat([z, z_p], 1)).reshape(len(x), 512, 39))
        logits = []
        for k in range(12): logits.append((-.5 * ((z - self.mu_t[k]) ** 2 + math.log(2 * math.pi))).sum(1) - math.log(12))
        logits = torch.stack(logits, 1)
        prob = F.softmax(logits, 1)
        kl = 0.
        for k in range(12): kl = kl + prob[:, k] * (.5 * (-logvar - 1 + (mu - self.mu_t[k]) ** 2 + torch.exp(logvar))).sum(1)
        entropy = 0.
        for k in range(12): entropy = entropy + prob[:, k] * F.log_softmax(logits, 1)[:, k]
        recon = ((x_hat - x) ** 2).sum((1, 2)).mean()
        ce = F.cross_entropy(logits[labelled], timbre[labelled])
        kl_p = .5 * (-4 - logvar_p - 1 + ((mu_p - self.mu_p[pitch]) ** 2 + torch.exp(logvar_p)) * math.exp(4)).sum(1).mean()
        ce_p = F.cross_entropy(self.read(z_p), pitch)
        return recon, kl.mean(), (entropy + math.log(12)).mean(), ce, kl_p, ce_p


class Files(torch.utils.data.Dataset):
    "One file for each note, as the published features are laid out."
    def __init__(self, folder, x, labels):
        self.paths, self.labels = [folder/f'{i:05d}.pth' for i in range(len(x))], labels
        for p, v in zip(self.paths, x): torch.save(v.clone(), p)

    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return torch.load(self.paths[i], weights_only=True), *[l[i] for l in self.labels]


def forever(loader):
    while True: yield from loader


def plain_steps(x, labels, folder, device):
    "Generator of seconds; one plain training step each."
    torch.manual_seed(0)
    model = Plain().to(device)
    opt = torch.optim.Adam(model.parameters(), 1e-4, amsgrad=True)
    batches = forever(torch.utils.data.DataLoader(Files(folder, x, labels), BATCH, shuffle=True, drop_last=True))
    while True:
        start = time.perf_counter()
        batch = [v.to(device) for v in next(batches)]
        opt.zero_grad()
        parts = model.loss(*batch)
        sum(parts).backward()
        opt.step()
        log = [p.item() for p in parts]
        yield time.perf_counter() - start, log


class Resident:
    "Stand-in for the project's loader where it can't be imported: tensors sliced by whole batches."
    def __init__(self, tensors, bs): self.tensors, self.bs, self.device, self.n_inp = tensors, bs, tensors[0].device, 1
    def __len__(self): return len(self.tensors[0]) // self.bs
    def to(self, device): return self
    def __iter__(self):
        for i in torch.randperm(len(self.tensors[0]), device=self.device)[:len(self) * self.bs].split(self.bs): yield tuple(t[i] for t in self.tensors)


def our_learner(x, labels, device, bf16):
    "Learner as a study builds it."
    from fastai.data.core import DataLoaders
    from disentangle_nb.models.gmvae import GMVAE
    from disentangle_nb.training.learner import gmvae_learner
    torch.manual_seed(0)
    loader = Resident([v.to(device) for v in (x, *labels)], BATCH)
    return gmvae_learner(DataLoaders(loader, loader, device=torch.device(device)), GMVAE(), bf16=bf16, monitor=None, bars=False)


def our_steps(x, labels, device, bf16=False):
    "Generator of seconds; one step of our Learner's own loop each, with all its callbacks."
    learn = our_learner(x, labels, device, bf16)
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-4)
    learn.n_epoch, learn.epoch, learn.dl, learn.training = 1, 0, learn.dls.train, True
    learn.n_iter = len(learn.dl)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    for batch in forever(learn.dl):
        start = time.perf_counter()
        learn.one_batch(0, batch)
        if str(device) != 'cpu': torch.cuda.synchronize()
        yield time.perf_counter() - start, learn.loss.item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', type=int, default=7, help='interleaved pairs of steps (default 7)')
    p.add_argument('--device', default='cpu')
    p.add_argument('--json', type=Path, help='write the medians here too')
    args = p.parse_args()
    torch.manual_seed(0)
    x = torch.rand(NOTES, 256, 43) - .5
    labels = torch.randint(0, 12, (NOTES,)), torch.randint(0, 82, (NOTES,)), torch.rand(NOTES) < .5
    from disentangle_nb.training.learner import bf16_support
    native, found = bf16_support(args.device)
    with tempfile.TemporaryDirectory() as d:
        runs = {'plain': plain_steps(x, labels, Path(d), args.device), 'ours float32': our_steps(x, labels, args.device)}
        if native: runs['ours bf16'] = our_steps(x, labels, args.device, bf16=True)
        for r in runs.values(): next(r), next(r)  # first steps allocate
        took = {k: [] for k in runs}
        for _ in range(args.pairs):
            for k, r in runs.items(): took[k].append(next(r)[0])
    report(took, native, found, args)


def report(took, native, found, args):
    "Table of medians and ratios; exit code by the floors."
    ratio = {k: statistics.median(a / b for a, b in zip(took['plain'], v)) for k, v in took.items()}
    floors = {'ours float32': FLOOR, 'ours bf16': FLOOR_BF16}
    print(f"GMVAE step, batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.pairs} interleaved steps")
    for k, v in took.items():
        s = statistics.median(v)
        print(f"  {k:14} {1000 * s:8.0f} ms {BATCH / s:8.0f} notes/s   {ratio[k]:5.2f} x" + (f"   floor {floors[k]} x" if k in floors else ''))
    if not native: print(f"  bf16 left out: {found}")
    if args.json: args.json.write_text(json.dumps(dict(ms={k: 1000 * statistics.median(v) for k, v in took.items()}, ratio=ratio), indent=1) + '\n')
    missed = [k for k, f in floors.items() if k in ratio and ratio[k] < f]
    print('missed: ' + ', '.join(missed) if missed else 'all floors held')
    sys.exit(bool(missed))


if __name__ == '__main__': main()

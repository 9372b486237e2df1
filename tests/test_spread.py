"Two processes that share every batch, against one: run as a script by a launcher, this file is what each process does."
import importlib.util, json, math, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders
from fastai.torch_core import num_distrib, rank_distrib
from disentangle_nb.core import seed_everything, write_json
from disentangle_nb.data.batches import BatchLoader
from disentangle_nb.data.syntone import Tones
from disentangle_nb.features.tonemel import LevelMel, world_features
from disentangle_nb.losses.elbo import GMVAELoss
from disentangle_nb.losses.tc import FactorLoss, VAELoss
from disentangle_nb.models.gmvae import GMVAE
from disentangle_nb.models.vae import Discriminator, ToneVAE
from disentangle_nb.training.adversarial import Adversaries
from disentangle_nb.training.learner import gmvae_learner
from disentangle_nb.training.resume import Checkpoint, latest
from disentangle_nb.training.spread import leave, own_device, spread
from disentangle_nb.training.vae import vae_learner, world_dls

pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'disentangle_nb[gpus]'")

LOSS, WEIGHT, NOISY = 1e-5, 1e-4, .06  # the notebook's tolerances: relative, absolute, relative; the first two are float32's order of sums
WORLD = Tones(freqs=[110, 165, 220, 330, 440, 660], amps=[.1, .3, 1], timbres=('sine', 'sawtooth'), sr=8000, dur=.25)
FEATURE = LevelMel(sr=8000, n_fft=1024, hop=256, n_mels=32)


class Curve(Callback):
    "Loss of every step, as reported; may spoil one on one process."
    order, run_valid = 44, False
    def __init__(self, spoil=None): self.spoil, self.losses, self.seeds = spoil, [], []
    def before_train(self): self.seeds.append(torch.initial_seed())
    def after_batch(self): self.losses.append(self.loss.detach())
    def before_batch(self):
        if self.spoil == (self.train_iter, rank_distrib()): self.learn.xb = (self.xb[0] * math.nan,)


class Die(Callback):
    "Ends every process, or one of them the hard way, at the start of an epoch's training."
    order, run_valid = 70, False
    def __init__(self, epoch, rank=None): self.at, self.who = epoch, rank
    def before_train(self):
        if self.epoch == self.at and self.who is None: raise KeyboardInterrupt
        if self.epoch == self.at and self.who == rank_distrib(): os.kill(os.getpid(), signal.SIGKILL)


def tones(bs, seed=3):
    "Batches of an odd size and a smaller last one: the parts of two processes differ in size."
    x, rows, _ = world_features(WORLD, FEATURE)
    dl = BatchLoader((x, rows), bs, shuffle=True, seed=seed)
    return DataLoaders(dl, dl.new(shuffle=False), device=dl.device)


def vae(dls, loss=None, quiet=False, cbs=(), **kw):
    seed_everything(1 if kw.pop('alike', True) else 1 + rank_distrib())
    model = ToneVAE(32, 8, latent=3, channels=(8, 16), hidden=(32,), logvar_clamp=(-30., -29.) if quiet else None)
    return vae_learner(dls, model, loss, lr=5e-3, cbs=[curve := Curve(kw.pop('spoil', None)), *cbs], bars=False, **kw), curve


def kept(learn, curve):
    "Curve, weights and table of a finished run."
    assert type(learn.model).__name__ != 'DistributedDataParallel' and all(dl.share == (0, 1) for dl in learn.dls.loaders) and not hasattr(learn, 'spread')
    out = {'curve': torch.stack(curve.losses), 'table': torch.tensor([[float(v) for v in r] for r in learn.recorder.values], dtype=torch.float64)}
    return out | {f'model.{k}': v for k, v in learn.model.state_dict().items()} | {f'loss.{k}': v for k, v in learn.loss_func.state_dict().items()}


def quiet(folder):
    "No noise, ragged batches, two fits one after the other."
    learn, curve = vae(tones(13), quiet=True)
    with spread(learn):
        learn.fit(2)
        learn.fit(3)
    return kept(learn, curve)


def noisy(folder):
    "Codes and tones with noise, tones rendered live; weights and seeds that differ until the first process's are taken."
    learn, curve = vae(world_dls(WORLD, FEATURE, WORLD.grid(), WORLD.grid(), 12, live=True), alike=False)
    with spread(learn): learn.fit(20)
    write_json(folder/f'seeds{rank_distrib()}.json', curve.seeds)
    return kept(learn, curve)


def factor(folder, epochs=4, die=None, resume=False):
    "A discriminator with an optimiser of its own, checkpoints, the best epoch, a table on disk."
    folder.mkdir(exist_ok=True)
    seed_everything(4)  # of the discriminator
    cbs = [Checkpoint(folder/'factor', resume=resume), CSVLogger(folder/'factor.csv')] + ([] if die is None else [Die(die)])
    learn, curve = vae(tones(12), FactorLoss(Discriminator(3, 16, 2)), cbs=cbs, monitor='lower_bound', patience=9)
    try:
        with spread(learn): learn.fit(epochs)
    except KeyboardInterrupt: return {}
    return kept(learn, curve)


def resumed(folder):
    factor(folder/'again', die=2)
    return factor(folder/'again', resume=True)


def gmvae(folder):
    "Extra views, heads with weights and statistics of their own, few labels, half precision where the processor has it."
    seed_everything(2)
    n = 45
    dl = BatchLoader((torch.rand(n, 20, 8) - .5, torch.arange(n) % 3, torch.arange(n) % 5, torch.arange(n) % 4 == 0), 16, shuffle=True)
    model = GMVAE(n_mels=20, n_frames=8, channels=16, hidden=16, latent=4, n_timbre=3, n_pitch=5)
    loss = GMVAELoss(true_component=1., component_recon=.5, swap=.1, adversary=.5, heads=Adversaries.of(model, hidden=8))
    learn = gmvae_learner(DataLoaders(dl, dl.new(shuffle=False), device=torch.device('cpu')), model, loss, lr=2e-3, bars=False, bf16=True, cbs=[curve := Curve()])
    with spread(learn): learn.fit(3)
    return kept(learn, curve)


def refused(folder):
    "What each process is told when something can't be shared, or breaks on one of them only."
    said = {}
    def told(name, learn, use=lambda l: l.fit(1), **kw):
        try:
            with spread(learn, **kw): use(learn)
        except Exception as e: said[name] = f'{type(e).__name__}: {e}'.split('\n\t')[-1]  # fastai puts the event's name before
    told('faithful', vae(tones(12), VAELoss(faithful=True))[0])
    told('finder', vae(tones(12))[0], lambda l: l.lr_find(num_it=6, show_plot=False))
    told('small', vae(tones(3))[0])
    alien = DataLoaders.from_dsets(*[[(torch.zeros(32, 8), 0)] * 4] * 2, bs=2, device='cpu')
    told('alien', vae(alien)[0])
    told('nan', vae(tones(12), spoil=(4, 1), cbs=[Checkpoint(folder/'nan')])[0], lambda l: l.fit(4))
    write_json(folder/f'said{rank_distrib()}.json', said)
    return {}


JOBS = dict(quiet=quiet, noisy=noisy, factor=factor, resumed=resumed, gmvae=gmvae, refused=refused)


def main(folder):
    torch.set_num_threads(1)
    own_device()
    assert torch.distributed.get_world_size() == num_distrib() == 2
    out = {f'{name}.{k}': v.contiguous() for name, job in JOBS.items() for k, v in job(folder).items()}
    save_file(out, folder/f'process{rank_distrib()}.safetensors')
    torch.distributed.barrier()
    learn, _ = vae(tones(12), cbs=[Checkpoint(folder/'die'), Die(2, rank=1)])
    with spread(learn): learn.fit(4)
    leave()


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "Folder, what each of two processes ended with, exit code of the launcher, and what was said."
    folder, root = tmp_path_factory.mktemp('two'), Path(__file__).resolve().parents[1]
    how = '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'
    env = dict(os.environ, ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')])))
    done = subprocess.run([sys.executable, *how.split(), __file__, str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    ends = [folder/f'process{r}.safetensors' for r in (0, 1)]
    assert all(p.exists() for p in ends), done.stdout[-6000:]
    return folder, [load_file(p) for p in ends], done.returncode, done.stdout


def part(tensors, job): return {k.removeprefix(f'{job}.'): v for k, v in tensors.items() if k.startswith(f'{job}.')}


def test_same_curve_and_weights_as_one_process(both, tmp_path):
    one, two = quiet(tmp_path), part(both[1][0], 'quiet')
    assert one.keys() == two.keys() and len(one['curve']) == 15
    assert ((one['curve'] - two['curve']).abs() / one['curve']).max() < LOSS
    assert ((one['table'] - two['table']).abs() / one['table'].abs().clamp(min=1)).max() < 1e-4
    assert max((one[k] - two[k]).abs().max() for k in one if k.startswith('model.')) < WEIGHT
    assert one['table'][-1, 1] < one['table'][0, 1] - 2  # it did learn


def test_noise_differs_within_a_few_per_cent(both, tmp_path):
    one, two = noisy(tmp_path)['curve'], part(both[1][0], 'noisy')['curve']
    assert len(one) == len(two) == 60 and not torch.equal(one, two)
    assert abs(one.mean() / two.mean() - 1) < NOISY  # seeds of one process alone differ by up to 4 %


def test_each_process_draws_its_own_noise(both):
    a, b = [json.loads((both[0]/f'seeds{r}.json').read_text()) for r in (0, 1)]
    assert len({*a, *b}) == len(a) + len(b) == 40


def test_all_processes_end_alike(both):
    a, b = both[1]
    assert a.keys() == b.keys() and {k.split('.')[0] for k in a} == set(JOBS) - {'refused'}
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    moved = [k for k in a if k.startswith(('factor.loss.adversary', 'gmvae.loss.heads'))]
    assert len(moved) > 10 and all(v.isfinite().all() for v in a.values())


def test_resumed_equals_unbroken(both):
    whole, again = part(both[1][0], 'factor'), part(both[1][0], 'resumed')
    assert [k for k in whole if k != 'curve' and not torch.equal(whole[k], again[k])] == []
    assert torch.equal(whole['curve'][6:], again['curve'])


def test_the_first_process_writes(both):
    folder = both[0]
    assert sorted(p.name for p in (folder/'factor').iterdir()) == ['checkpoint-000002.safetensors', 'checkpoint-000003.safetensors']
    assert latest(folder/'factor')[2]['epoch'] == 3 and not any(k.startswith('model.module') for k in latest(folder/'factor')[1])
    assert len((folder/'factor.csv').read_text().splitlines()) == 1 + 4


def test_all_processes_are_told(both):
    said = [json.loads((both[0]/f'said{r}.json').read_text()) for r in (0, 1)]
    assert said[0].keys() == {'faithful', 'finder', 'small', 'alien', 'nan'} == said[1].keys(), said
    for words in said:
        assert words['faithful'].startswith('faithful=True') and words['finder'].startswith('look for a learning rate in one process')
        assert 'Use a larger bs or fewer processes' in words['small'] and 'BatchLoader' in words['alien'] and 'distrib_ctx' in words['alien']
        assert 'the loss became nan at step 4 (epoch 1, batch 1)' in words['nan'], words['nan']
    assert 'checkpoint-000000' in said[0]['nan']


def test_alone_it_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '1')  # what `--num_processes 1` sets
    inside = quiet(tmp_path)
    learn, curve = vae(tones(13), quiet=True)
    learn.fit(2), learn.fit(3)
    plain = kept(learn, curve)
    assert all(torch.equal(inside[k], plain[k]) for k in plain)


def test_a_killed_process_takes_the_other_along(both):
    folder, _, code, said = both
    assert code != 0 and 'SIGKILL' in said, said[-3000:]
    assert latest(folder/'die')[2]['epoch'] == 1 and len(list((folder/'die').iterdir())) == 2


def test_without_accelerate_it_names_the_extra(monkeypatch):
    for name in ('accelerate', 'fastai.distributed'): monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    spec = importlib.util.spec_from_file_location('disentangle_nb.training.bare', sys.modules[spread.__module__].__file__)
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert bare.own_device('cpu') == torch.device('cpu') and not hasattr(bare.DistributedTrainer, '_wrap_dl')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ImportError, match=r"pip install 'disentangle_nb\[gpus\]'"): bare.own_device('cpu')


if __name__ == '__main__': main(Path(sys.argv[1]))

"Kill a training process at a random step, resume it, and compare every bit with an unbroken run."
import json, multiprocessing, os, random, resource, signal, traceback
from pathlib import Path
import pytest, torch
from fastai.callback.all import SchedLin
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from disentangle_nb.core import seed_everything
from disentangle_nb.data.batches import BatchLoader
from disentangle_nb.losses.elbo import GMVAELoss
from disentangle_nb.models.gmvae import GMVAE
from disentangle_nb.training.adversarial import Adversaries
from disentangle_nb.training.learner import TrainingDiverged, gmvae_learner
from disentangle_nb.training.resume import Checkpoint, checkpoints, latest, read_checkpoint

processes = multiprocessing.get_context('forkserver')  # a clean process for each run; the imports are paid once
processes.set_forkserver_preload(['test_resume'])


class Kill(Callback):
    "Dies like a power cut, at one of three places inside a step."
    order, run_valid = 30, False
    def __init__(self, at): self.at = at
    def before_fit(self): self.n = 0
    def after_pred(self): self.n += 1; self.strike(2)
    def before_step(self): self.strike(1)
    def after_batch(self): self.strike(0)
    def strike(self, place): self.at == 3 * self.n - place and os.kill(os.getpid(), signal.SIGKILL)


def learner(*cbs):
    "A miniature with everything that has a state: adversaries, a schedule, noise, shuffling, a best epoch."
    seed_everything(5)
    n = 96
    dl = BatchLoader((torch.rand(n, 20, 8) - .5, torch.arange(n) % 3, torch.arange(n) % 5, torch.arange(n) % 2 == 0), 16, shuffle=True, seed=5)
    model = GMVAE(n_mels=20, n_frames=8, channels=16, hidden=16, latent=4, n_timbre=3, n_pitch=5)
    loss = GMVAELoss(true_component=1., component_recon=.5, swap=.1, adversary=.5, heads=Adversaries.of(model, hidden=8))
    return gmvae_learner(DataLoaders(dl, dl.new(shuffle=False), device=torch.device('cpu')), model, loss,
                         schedules=dict(adversary=SchedLin(0., 1.)), lr=5e-3, bars=False, cbs=cbs)


def run(folder, out, kill_at, resume, one_cycle, limit):
    "What each process does."
    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        learn = learner(Checkpoint(folder, resume=resume, run=dict(one_cycle=one_cycle)), Kill(kill_at))
        learn.fit_one_cycle(5) if one_cycle else learn.fit(5)
        save_final(learn, out)
    except Exception:
        Path(f'{out}.error').write_text(traceback.format_exc())
        os._exit(1)


def save_final(learn, out):
    "Everything a run ends with, to be compared bit by bit."
    from safetensors.torch import save_file
    final = {**{f'm.{k}': v for k, v in learn.model.state_dict().items()}, **{f'l.{k}': v for k, v in learn.loss_func.state_dict().items()},
             **{f'o.{i}.{k}': v for i, s in learn.opt.state_dict()['state'].items() for k, v in s.items()}, 'losses': torch.stack(list(learn.recorder.losses))}
    told = dict(best=[learn.keep_best.best, learn.keep_best.best_epoch], values=[[float(v) for v in r] for r in learn.recorder.values], parts=learn.parts.history)
    save_file({k: v.contiguous() for k, v in final.items()}, out, metadata={k: json.dumps(v) for k, v in told.items()})


def train(folder, out, kill_at=0, resume=False, one_cycle=True, limit=0):
    "Exit code of a training process, and its error."
    p = processes.Process(target=run, args=(folder, out, kill_at, resume, one_cycle, limit))
    p.start()
    p.join(300)
    said = Path(f'{out}.error')
    return p.exitcode, said.read_text() if said.exists() else ''


def read(path):
    from safetensors import safe_open
    with safe_open(path, 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('whole')
    assert train(tmp/'run', tmp/'final.safetensors') == (0, '')
    return tmp, read(tmp/'final.safetensors')


def test_killed_and_resumed_equals_unbroken(whole, tmp_path):
    at = random.SystemRandom().randint(1, 5 * 6 * 3)
    print('killed at third-of-a-step', at)
    assert train(tmp_path/'run', tmp_path/'final.safetensors', kill_at=at) == (-signal.SIGKILL, '')
    assert not (tmp_path/'final.safetensors').exists()
    assert train(tmp_path/'run', tmp_path/'final.safetensors', resume=True) == (0, '')
    (a, meta_a), (b, meta_b) = whole[1], read(tmp_path/'final.safetensors')
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == [], f'killed at {at}'
    assert meta_a == meta_b
    assert len(list((tmp_path/'run').iterdir())) == 2


def test_killed_while_writing(whole, tmp_path):
    "The newest file is cut short and a temporary one is left: the one before is used."
    import shutil
    shutil.copytree(whole[0]/'run', tmp_path/'run')
    newest = sorted((tmp_path/'run').iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:newest.stat().st_size // 2])
    (tmp_path/'run'/'.checkpoint-000009-abcd.part.safetensors').write_bytes(b'half of it')
    with pytest.warns(UserWarning, match='trying the one before'): latest(tmp_path/'run')
    assert train(tmp_path/'run', tmp_path/'final.safetensors', resume=True) == (0, '')
    a, b = whole[1][0], read(tmp_path/'final.safetensors')[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path/'run').glob('.checkpoint*'))


def test_another_run_is_refused(whole, tmp_path):
    code, said = train(whole[0]/'run', tmp_path/'final.safetensors', resume=True, one_cycle=False)
    assert code and 'one_cycle was True, is False' in said and not (tmp_path/'final.safetensors').exists()


def test_a_full_disk_keeps_the_previous_checkpoint(whole, tmp_path):
    import shutil
    shutil.copytree(whole[0]/'run', tmp_path/'run')
    checkpoints(tmp_path/'run')[-1].unlink()
    kept = checkpoints(tmp_path/'run')[-1]
    code, said = train(tmp_path/'run', tmp_path/'final.safetensors', resume=True, limit=40_000)
    assert code and "can't write checkpoint checkpoint-000004.safetensors" in said, said
    assert f'the last complete checkpoint is {kept}' in said
    assert [p.name for p in (tmp_path/'run').iterdir()] == [kept.name] and latest(tmp_path/'run')[2]['epoch'] == 3


def test_no_space_is_called_so(tmp_path, monkeypatch):
    from disentangle_nb.training import resume
    resume.write_checkpoint(tmp_path, {'a': torch.zeros(1)}, dict(epoch=0))
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(resume, 'save_file', full)
    with pytest.raises(OSError, match='disk full.*the last complete checkpoint is .*checkpoint-000000'): resume.write_checkpoint(tmp_path, {'a': torch.ones(1)}, dict(epoch=1))
    assert resume.latest(tmp_path)[1]['a'].item() == 0


def test_a_pickle_is_no_checkpoint(tmp_path):
    torch.save({'a': torch.zeros(1)}, tmp_path/'checkpoint-000000.safetensors')
    with pytest.raises(ValueError, match='no usable checkpoint'): read_checkpoint(tmp_path/'checkpoint-000000.safetensors')
    with pytest.warns(UserWarning, match='trying the one before'): assert latest(tmp_path) is None


def test_a_diverged_run_names_its_last_good_checkpoint(tmp_path):
    class Poison(Callback):
        order, run_valid = 30, False
        def before_batch(self):
            if self.train_iter == 5: self.model.mu_lookup.weight.data[0, 0] = torch.inf

    seed_everything(0)
    dl = BatchLoader((torch.rand(32, 20, 8) - .5, torch.arange(32) % 3, torch.arange(32) % 5, torch.ones(32, dtype=torch.bool)), 16)
    model = GMVAE(n_mels=20, n_frames=8, channels=8, hidden=8, latent=4, n_timbre=3, n_pitch=5)
    learn = gmvae_learner(DataLoaders(dl, dl.new(), device=torch.device('cpu')), model, cbs=[Checkpoint(tmp_path), Poison()], bars=False)
    with pytest.raises(TrainingDiverged) as e: learn.fit(4)
    assert 'step 5 (epoch 2, batch 1)' in str(e.value) and 'timbre_kl' in str(e.value) and 'checkpoint-000001.safetensors' in str(e.value)

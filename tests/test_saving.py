"A saved system comes back exactly, and nothing else is ever taken for one."
import json, os, pickle, stat, struct
import pytest, torch
from disentangle_nb.features.mel import LogMel
from disentangle_nb.models.gmvae import GMVAE
from disentangle_nb.models.system import CheckpointError, Disentangler, module_args

names = dict(timbre=['Flute', 'Piano', 'Violin'], pitch=[60, 61, 62, 64])


def make(**kw):
    torch.manual_seed(0)
    model = GMVAE(n_mels=32, n_frames=9, channels=16, hidden=16, latent=4, n_timbre=3, n_pitch=4, **kw)
    model.train()(torch.rand(16, 32, 9) - .5)  # running statistics that are not their defaults
    return Disentangler(LogMel(n_mels=32, floor_db=-70.), model, names, card=dict(seed=0, study='test'))


@pytest.fixture(scope='module')
def clip(): return torch.sin(torch.arange(6000) * .11)[None] * torch.tensor([[.2], [.05]])


@pytest.fixture
def saved(tmp_path): return make().save(tmp_path/'system')


def told(folder):
    "The one sentence that a folder earns."
    with pytest.raises(CheckpointError) as e: Disentangler.load(folder, device='cpu')
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


def card(folder, **changes):
    c = json.loads((folder/'card.json').read_text())
    c.update(changes)
    (folder/'card.json').write_text(json.dumps(c))
    return c


def test_round_trip_is_exact(tmp_path, clip):
    system = make()
    again = Disentangler.load(system.save(tmp_path/'s'), device='cpu')
    for k, v in system.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k
    for k, v in system.encode(clip).items(): assert torch.equal(v, again.encode(clip)[k])
    assert again.vocabs == names and again.card == system.card and module_args(again.feature) == module_args(system.feature)
    assert sorted(p.name for p in (tmp_path/'s').iterdir()) == ['card.json', 'weights.safetensors']


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_file_and_hardly_moves_codes(tmp_path, clip, dtype):
    system = make()
    small, full = system.save(tmp_path/'h', dtype=dtype), system.save(tmp_path/'f')
    assert (small/'weights.safetensors').stat().st_size < .6 * (full/'weights.safetensors').stat().st_size
    again = Disentangler.load(small, device='cpu')
    assert all(p.dtype == torch.float32 for p in again.model.parameters())
    for k, v in system.encode(clip).items(): assert (v - again.encode(clip)[k]).abs().max() < (5e-3 if dtype == torch.float16 else 5e-2)


def test_saving_twice_replaces_and_loading_leaves_the_dice_alone(saved):
    make().save(saved)
    torch.manual_seed(3); a = torch.rand(2)
    torch.manual_seed(3); Disentangler.load(saved, device='cpu')
    assert torch.equal(a, torch.rand(2))
    assert len({f.stat().st_mode for f in saved.iterdir()}) == 1  # whoever may read the card may read the weights


def test_weights_that_are_not_numbers_are_refused_both_ways(tmp_path, saved):
    bad = make()
    with torch.no_grad(): bad.model.lin_mu.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match='lin_mu.weight: not finite'): bad.save(tmp_path/'bad')
    assert not (tmp_path/'bad').exists()
    from safetensors.torch import load_file, save_file
    arrays = load_file(saved/'weights.safetensors')
    arrays['model.lin_mu.weight'][0, 0] = torch.inf
    save_file(arrays, saved/'weights.safetensors')
    assert 'NaN or infinity' in told(saved)


def test_numbers_too_large_for_half_precision_are_refused(tmp_path):
    big = make()
    big.model.encoder[1].running_var.fill_(1e6)
    with pytest.raises(CheckpointError, match='too large for torch.float16'): big.save(tmp_path/'b', dtype=torch.float16)


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)


@pytest.mark.parametrize('how', ['pickle', 'torch', 'legacy'])
def test_a_pickle_is_never_read(saved, tmp_path, monkeypatch, how):
    monkeypatch.setenv('BOMB', str(tmp_path/'bomb'))
    w = saved/'weights.safetensors'
    if how == 'pickle': w.write_bytes(pickle.dumps(Bomb()))
    else: torch.save({'a': Bomb()}, w, _use_new_zipfile_serialization=how == 'torch')
    assert 'never read' in told(saved)
    assert not (tmp_path/'bomb').exists()


def test_a_pickle_as_card_is_never_read(saved, tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path/'bomb'))
    (saved/'card.json').write_bytes(pickle.dumps(Bomb()))
    assert "can't be read" in told(saved)
    assert not (tmp_path/'bomb').exists()


@pytest.mark.parametrize('share', [0., .0005, .3, .999])
def test_a_truncated_file(saved, share):
    w = saved/'weights.safetensors'
    w.write_bytes(w.read_bytes()[:int(w.stat().st_size * share)])
    assert 'damaged or cut short' in told(saved)


def test_a_lying_header(saved):
    w = saved/'weights.safetensors'
    w.write_bytes(struct.pack('<Q', 1 << 60) + w.read_bytes()[8:])
    assert 'damaged or cut short' in told(saved)


def test_a_text_file(saved):
    (saved/'weights.safetensors').write_text('these are no weights')
    assert 'damaged or cut short' in told(saved)


def test_missing_files(saved, tmp_path):
    (saved/'weights.safetensors').unlink()
    assert 'is missing' in told(saved)
    (saved/'card.json').unlink()
    assert 'no card.json' in told(saved)
    assert 'no saved system' in told(tmp_path/'nowhere')


@pytest.mark.parametrize('change, words', [
    (dict(version=2), 'format version 2'), (dict(version='1'), "format version '1'"), (dict(format='other'), 'not the card of a system'),
    (dict(arrays=None), 'lacks arrays'), (dict(model=None), 'lacks model'), (dict(vocabs=[]), 'lacks vocabs'),
    (dict(vocabs=dict(timbre=['A'], pitch=[60, 61, 62, 64])), 'has 3 classes of timbre; its vocabulary names 1'),
    (dict(vocabs=dict(timbre=3)), 'vocab')])
def test_a_card_that_does_not_hold_up(saved, change, words):
    card(saved, **change)
    assert words in told(saved)


@pytest.mark.parametrize('text', ['', '{', '[]', '3', 'null', '{"format": NaN}', '\x00\x01'])
def test_a_card_that_is_no_card(saved, text):
    (saved/'card.json').write_text(text)
    assert told(saved)


@pytest.mark.parametrize('cls', ['os.system', 'builtins.eval', 'models.gmvae.math', 'models.gmvae.component_logits', 'models.gmvae.nn', 'models.system.Disentangler',
                                 'models.system.CheckpointError', 'core.RunCard', '__main__.X', 'models.gmvae.GMVAE.__init__', 'models.nothing.X', '', None, 5, ['a']])
def test_only_our_modules_are_built(saved, cls):
    card(saved, model=dict(cls=cls, args={}))
    assert told(saved)


@pytest.mark.parametrize('args', [dict(n_frames=10), dict(n_timbre=10 ** 9), dict(channels=10 ** 7, hidden=10 ** 7), dict(nonsense=1), dict(n_mels='many'), dict(latent=-1), [], None])
def test_arguments_that_do_not_fit_the_weights(saved, args):
    c = json.loads((saved/'card.json').read_text())
    card(saved, model=dict(cls=c['model']['cls'], args={**c['model']['args'], **args} if isinstance(args, dict) else args))
    assert told(saved)


def test_arrays_that_the_card_does_not_declare(saved):
    from safetensors.torch import load_file, save_file
    w = saved/'weights.safetensors'
    arrays, text = load_file(w), (saved/'card.json').read_text()
    save_file({k: v for k, v in arrays.items() if k != 'model.lin_mu.weight'}, w)
    assert 'lacks model.lin_mu.weight' in told(saved)
    save_file({**arrays, 'model.extra': torch.zeros(1)}, w)
    assert 'model.extra' in told(saved)
    save_file({**arrays, 'model.lin_mu.weight': torch.zeros(3, 3)}, w)
    assert 'the file has' in told(saved)
    save_file({**arrays, 'model.lin_mu.weight': arrays['model.lin_mu.weight'].double()}, w)
    assert 'float64' in told(saved)
    save_file(arrays, w)
    (saved/'card.json').write_text(text.replace('model.lin_mu.weight', 'model.lin_nu.weight'))
    assert told(saved)


def test_a_card_and_weights_that_agree_on_a_wrong_shape(saved):
    from safetensors.torch import load_file, save_file
    w, c = saved/'weights.safetensors', json.loads((saved/'card.json').read_text())
    save_file({**load_file(w), 'model.lin_mu.weight': torch.zeros(3, 3)}, w)
    c['arrays']['model.lin_mu.weight'] = ['float32', [3, 3]]
    (saved/'card.json').write_text(json.dumps(c))
    assert 'disagree about the model: lin_mu.weight should be (4, 16)' in told(saved)


def test_a_failed_save_leaves_the_old_system(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    import safetensors.torch
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError, match='[Dd]isk full|No space'): make(mean_gain=3.).save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ['system']


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_a_place_that_can_not_be_written(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError): make().save(tmp_path/'s')


def test_names_that_try_to_leave_the_shelf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('../../etc', '..', 'notes-small/../x', 'no-such-system'):
        with pytest.raises(CheckpointError): Disentangler.load(name)


def test_a_foreign_folder(tmp_path):
    (tmp_path/'model.pth').write_bytes(b'x')
    assert 'not a saved system' in told(tmp_path)


# what a loaded system does with what it can't do
def test_edits_that_can_not_be_made(clip):
    system = make()
    for kw, words in ((dict(timbre='violn'), 'did you mean Violin'), (dict(timbre='Kazoo'), 'Flute, Piano, Violin'), (dict(pitch=63), '60 to 64, not all'),
                      (dict(pitch=99), '60 to 64'), (dict(shift=40), 'a shift of +40'), (dict(loudness=1), 'it has timbre, pitch'),
                      (dict(pitch=60, shift=1), 'not both'), (dict(timbre=['Flute'] * 3), '2 clips got 3')):
        with pytest.raises(ValueError) as e: system.edit(clip, **kw)
        assert words in str(e.value), (kw, str(e.value))


@pytest.mark.parametrize('n', [1, 100, 2048, 2304, 3000, 5000, 22050])
def test_edits_keep_the_length(n):
    system = make()
    wav = torch.sin(torch.arange(n) * .1) * .3
    for out in (system.edit(wav, timbre='Piano', n_iter=4), system.edit(wav[None], pitch=60, alpha=.5, n_iter=4)[0], *system.swap(wav, wav.flip(0), 'timbre', n_iter=4)):
        assert out.shape == wav.shape and out.isfinite().all()


def test_alpha_zero_is_no_edit(clip):
    system = make()
    codes = system.encode(clip)
    assert torch.equal(system.edit(clip, timbre='Piano', pitch=60, alpha=0., envelope=False), system.decode(codes, n_samples=clip.shape[-1], n_iter=64))


def test_silence_stays_silence():
    wav = torch.zeros(22050); wav[:4000] = torch.sin(torch.arange(4000) * .1) * .3
    out = make().edit(wav, timbre='Piano', n_iter=8)
    assert out[12000:].square().mean() < 1e-5

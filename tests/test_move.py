"What translators, their objective and their training must answer."
import pytest, torch
from disentangle_nb.core import seed_everything
from disentangle_nb.losses.move import MoveLoss
from disentangle_nb.models.move import PRESETS, Adversary, code_pitch, move_model, pitch_code
from disentangle_nb.models.system import Disentangler
from disentangle_nb.training.move import SliceLoader, move_learner
from fastai.data.core import DataLoaders

small = dict(n_bins=25, n_frames=8, channels=(4, 6), hidden=(16, 12, 12), film=8)


def batch(k=3, m=4, f=25, n=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(k*m, f, n, generator=g), torch.eye(k).repeat_interleave(m, 0), pitch_code(torch.arange(60, 60 + m)).repeat(k, 1)


@pytest.fixture(params=PRESETS)
def model(request):
    torch.manual_seed(0)
    return move_model(request.param, 3, **small)


@pytest.mark.parametrize('k', [2, 4, 12])
@pytest.mark.parametrize('wide', [False, True])
def test_shapes_of_both_sizes(k, wide):
    m = move_model('move_multi', k, wide)
    x, who, what = batch(k, 1, 500, 16)
    assert m(x, who, what)['x_hat'].shape == x.shape and m.posterior(x, who, what)[0].shape == (k, 3)


def apart(model, x, a, b):
    "Largest differences that a condition makes to decoded slices, means and log-variances."
    z = torch.linspace(-1, 1, 3*len(x)).view(-1, 3)
    with torch.no_grad(): one, other = ([model.decode(z, *told), *model.posterior(x, *told)] for told in (a, b))
    return [(p - q).abs().max().item() for p, q in zip(one, other)]


def step(model, args):
    "One step of the optimiser, towards the slices."
    opt, out = torch.optim.Adam(model.parameters(), 1e-3), model.train()(*args)
    ((out['x_hat'] - out['x']).square().mean() + out['mu'].square().mean() + out['logvar'].exp().mean()).backward()
    opt.step()
    model.eval()


@pytest.mark.parametrize('preset', [p for p, v in PRESETS.items() if v['model']['encoder'] or v['model']['decoder']])
def test_no_condition_is_heard_at_birth_and_each_is_after_a_step(preset):
    torch.manual_seed(0)
    model, (x, who, what) = move_model(preset, 3, **small).eval(), batch()
    others = dict(pitch_class=(who, what.flip(0)), octave=(who, pitch_code(code_pitch(what) + 12)), timbre=(who.roll(4, 0), what))
    if model.args['private']: del others['timbre']           # it has weights of its own for each
    assert all(apart(model, x, (who, what), o) == [0, 0, 0] for o in others.values())
    step(model, (x, who, what))
    varied = slice(2 if model.args['unit'] else 3)           # UNIT's variance is a constant
    assert all(min(apart(model, x, (who, what), o)[varied]) > 1e-6 for o in others.values())  # 1e-4 and more in a step of 1e-3; rounding is 1e-7


def test_every_parameter_gets_a_gradient(model):
    x, who, what = batch(m=16)
    model.route = dict(by=1, cycle=True)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.03*torch.randn_like(p))
    out = model.train()(x, who, what)
    sum(v.square().sum() for k, v in out.items() if k != 'x').backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_one_slice_equals_itself_in_a_batch(model):
    x, who, what = batch()
    a = model.eval().posterior(x, who, what)[0][5]
    assert (model.posterior(x[5:6], who[5:6], what[5:6])[0][0] - a).abs().max() < 1e-5


def test_evaluation_is_deterministic_and_training_is_not(model):
    args = batch()
    assert torch.equal(model.eval()(*args)['x_hat'], model(*args)['x_hat'])
    assert not torch.equal(model.train()(*args)['z'], model(*args)['z'])


def test_save_and_load_are_exact(model, tmp_path):
    from disentangle_nb.features.nsgt import NSGTMel
    model.args['pitches'] = list(range(55, 80))
    system = Disentangler(NSGTMel(n_bins=25, fmax=10000.), model, dict(timbre=['a', 'b', 'c'], pitch=list(range(55, 80))))
    system.save(tmp_path/'s')
    again = Disentangler.load(tmp_path/'s', 'cpu')
    args = batch()
    assert torch.equal(again.model(*args)['x_hat'], system.model(*args)['x_hat']) and again.vocabs == system.vocabs


@pytest.mark.parametrize('m', [21, 60, 69, 108])
def test_notes_are_said_and_read(m): assert code_pitch(pitch_code(m)).item() == m


def test_a_glide_is_a_mixture():
    a, b = pitch_code(71.), pitch_code(72.)
    assert torch.allclose(pitch_code(71.25), .75*a + .25*b)


def test_a_soft_instrument_is_between(model):
    if model.args['decoder'] != ['timbre', 'pitch'] or model.args['private']: return
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    z, what = torch.zeros(1, 3), pitch_code(torch.tensor([60.]))
    whole = [model.decode(z, torch.tensor([v]), what) for v in ([1., 0, 0], [.5, .5, 0], [0, 1., 0])]
    near = lambda a, b: (a - b).norm().item()
    assert 0 < near(whole[1], whole[0]) < near(whole[0], whole[2]) and near(whole[1], whole[2]) < near(whole[0], whole[2])


def test_perfect_translations_cost_nothing():
    x, _, _ = batch(2, 16)
    out = dict(x=x, x_hat=x, x_to=x, mu=torch.zeros(32, 3), logvar=torch.zeros(32, 3), z=torch.randn(32, 3))
    loss = MoveLoss('mmd')
    loss(out, torch.ones(16, dtype=torch.bool))
    assert loss.parts['recon'] == 0 and loss.parts['kl'] == 0 and loss.parts['translate'].abs() < .05
    loss(out | dict(x_to=x + 3), torch.ones(16, dtype=torch.bool))
    assert loss.parts['translate'] > .3


def test_a_batch_without_whole_columns_has_no_translation():
    x, who, what = batch(2, 4)
    m = move_model('move_multi', 2, **small)
    m.route = dict(by=1)
    loss = MoveLoss('mmd')
    assert loss(m(x, who, what), torch.tensor([False, True, False, False])).isfinite() and 'translate' not in loss.parts


def loaders(seed=0):
    g = torch.Generator().manual_seed(3)
    midi = torch.arange(60, 66)
    x = torch.randn(12, 25, 40, generator=g)
    one = SliceLoader((x, torch.arange(2).repeat_interleave(6), midi.repeat(2)), 4, 2, 8, 1e9, shuffle=True, seed=seed)
    return DataLoaders(one, one.new(shuffle=False), device=torch.device('cpu'))


def test_columns_hold_one_note_and_starts_stay_inside():
    dl = loaders().train
    for x, who, what, whole in dl:
        assert x.shape == (8, 25, 8) and whole.all() and torch.equal(what[:4], what[4:])
        assert torch.equal(who.argmax(1), torch.arange(2).repeat_interleave(4))


def test_a_missing_note_is_replaced_by_another_and_its_column_marked():
    x, who, midi = torch.randn(3, 25, 20), torch.tensor([0, 0, 1]), torch.tensor([60, 61, 61])
    _, t, p, whole = SliceLoader((x, who, midi), 8, 2, 8, 1e9).one_batch()
    notes = code_pitch(p)
    assert (notes[8:] == 61).all() and torch.equal(whole, notes[:8] == 61)


def test_silent_ends_are_left_out():
    x = torch.zeros(1, 25, 64)
    x[..., 20:] = -9.
    dl = SliceLoader((x, torch.zeros(1).long(), torch.tensor([60])), 4, 1, 8, 3.)
    assert int(dl.last[0]) < 20


def test_an_instrument_without_notes_is_an_error():
    with pytest.raises(ValueError, match='number 1 has none'): SliceLoader((torch.randn(2, 25, 20), torch.tensor([0, 2]), torch.tensor([60, 60])), 2, 3, 8)


@pytest.mark.parametrize('preset', ['unit_film', 'move_multi'])
def test_stopped_and_resumed_equals_unbroken(preset, tmp_path):
    from disentangle_nb.training.resume import Checkpoint
    def learner(cbs=()):
        seed_everything(0)
        return move_learner(loaders(), preset, move_model(preset, 2, **small), cbs=cbs)
    class Stop(RuntimeError): pass
    from fastai.callback.core import Callback
    class Halt(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch == 1: raise Stop('here')
    whole = learner()
    whole.fit_one_cycle(4, 1e-3)
    with pytest.raises(Stop): learner([Checkpoint(tmp_path, every=1), Halt()]).fit_one_cycle(4, 1e-3)
    again = learner([Checkpoint(tmp_path, every=1, resume=True)])
    again.fit_one_cycle(4, 1e-3)
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_adversaries_are_one_an_instrument():
    x = torch.randn(8, 500, 16)
    d = Adversary(2)
    assert not torch.allclose(d(x)[:4], d(torch.cat([x[4:], x[:4]]))[4:])

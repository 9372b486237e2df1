"The gated autoencoder: counts, timing, shifts, the exact Fourier form, foreign weights read as data; and its training: keys, loss, resume."
import math, os, pickle, zipfile
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F

from disentangle_nb.core import make_generator, seed_everything
from disentangle_nb.data.frames import comb, contrast, draw_melody, draw_pieces, since
from disentangle_nb.models import gated as G
from disentangle_nb.models.gated import ComplexAutoencoder, GatedAutoencoder, shift_bins
from disentangle_nb.models.system import CheckpointError
from disentangle_nb.training import gated as T
from disentangle_nb.training.gated import GatedLoss, Transpose, fit_gated, frame_blocks, gated_dls, gated_learner, two_keys
from disentangle_nb.training.resume import Checkpoint


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def born(seed=0, **kw):
    torch.manual_seed(seed)
    return GatedAutoencoder(**kw)


# --- drawn frames ---------------------------------------------------------------------------------------------------------

def test_a_note_has_its_harmonics_where_they_belong():
    b = torch.arange(120.)
    by_hand = sum(.6**(h - 1)*torch.exp(-.5*((b - 2*7 - 24*math.log2(h))/.9)**2) for h in range(1, 9))
    assert torch.allclose(comb(7, .6), by_hand, atol=1e-6)
    assert torch.allclose(comb(torch.tensor([[7., 9.]]), .6)[0, 0], by_hand, atol=1e-6)


def test_frames_have_no_level_and_silence_stays_silent():
    c = torch.rand(4, 120)
    c[2] = .3
    before = c.clone()
    out = contrast(c)
    assert torch.equal(c, before) and not out[2].any()
    assert torch.allclose(out[0].norm(), torch.tensor(1.)) and torch.allclose(out, contrast(5*c + 1), atol=1e-4)


def test_pieces_depend_on_the_seed_alone_and_avoid_timbres():
    a = draw_pieces(1500, seed=5)
    assert torch.equal(a[:700], draw_pieces(700, seed=5)) and not torch.equal(a, draw_pieces(1500, seed=6))
    assert a.shape == (1500, 120) and torch.allclose(a.norm(dim=1), torch.ones(1500), atol=1e-3)
    assert torch.equal(since(torch.tensor([2, 3])), torch.tensor([0, 1, 0, 1, 2]))
    drawn = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr('disentangle_nb.data.frames.math.exp', lambda x, e=math.exp: e(x))
        real = torch.Tensor.__rpow__
        m.setattr(torch.Tensor, '__rpow__', lambda self, base: drawn.append(base) or real(self, base))
        draw_pieces(30_000, seed=1, avoid=(.55, .75))
    rs = [r for r in drawn if isinstance(r, float)]
    assert len(rs) > 60 and all(abs(r - a) > .03 for r in rs for a in (.55, .75))


# --- the model ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('args, published', [({}, 348_472), (dict(n_factors=512), 688_440), (dict(n_factors=1024), 1_368_376), (dict(n_factors=1024, n_bins=64), 794_880)])
def test_parameters_are_as_many_as_published(args, published):
    model = GatedAutoencoder(**args)
    layout = G.published_layout(model)
    assert sum(math.prod(s) for s in layout.values()) == published
    assert sum(p.numel() for p in model.parameters()) == published - model.n_bins
    assert {k: p.numel() for k, p in model.named_parameters()} == {k: math.prod(s) for k, s in layout.items() if k != 'bias_x'}


def test_shapes_and_a_model_rebuilt_from_its_arguments():
    model, x = born(gain=(3., 2.)), rand(2, 120, 30)
    codes = model.encode(x)
    assert codes['interval'].shape == (2, 64, 30) and codes['context'] is x and model.decode(**codes).shape == x.shape
    assert codes['interval'].abs().max() <= 1
    again = GatedAutoencoder(**model.args)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(x)['interval'], codes['interval'])
    with pytest.raises(ValueError, match='120 bins'): model.encode(rand(2, 64, 30))
    model.decode(**codes).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters())


def test_one_item_is_the_same_inside_a_batch():
    model, x = born().eval(), rand(3, 120, 20)
    assert torch.allclose(model.encode(x[1:2])['interval'], model.encode(x)['interval'][1:2], atol=1e-6)


def test_the_penalty_is_a_mean_square_in_disguise():
    for i, shape in enumerate(((2, 30, 64), (5, 1024, 64), (3, 17, 9))):
        m = rand(*shape, seed=i)
        assert G.published_r(m).item() == pytest.approx((shape[1] + shape[2])*m.square().mean().item(), rel=1e-4)
    assert G.activity_weight() == pytest.approx(.004352) and G.activity_weight(2e-6, 10, 20) == pytest.approx(6e-5)


@pytest.mark.parametrize('context', [1, 5, 9])
def test_a_code_depends_on_its_frame_and_those_before(context):
    model, x = born(context=context, gain=(6, 4)), rand(1, 120, 30)
    base = model.encode(x)['interval']
    for k in (1, 7, 15, 29):  # before frame 0 is silence, which opens no gate
        y = x.clone()
        y[..., k] += rand(120, seed=k)
        moved = (model.encode(y)['interval'] - base).abs().amax((0, 1))
        assert (moved > 1e-6).nonzero().flatten().tolist() == [t for t in range(30) if t - context <= k <= t]
    assert model.heard(30).nonzero()[0] == context and model.heard(30).sum() == 30 - context


def test_decoding_never_looks_at_the_frame_it_imagines():
    model, x = born(), rand(1, 120, 30)
    m = model.encode(x)['interval']
    y = x.clone()
    y[..., 12] += 1
    moved = (model.decode(m, y) - model.decode(m, x)).abs().amax((0, 1)) > 1e-7
    assert moved.nonzero().flatten().tolist() == list(range(13, 22))


def test_filters_keep_their_length_and_the_optimiser_its_state():
    model = born()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    blocks = contrast(torch.rand(2, 30, 120))
    for _ in range(2):
        opt.zero_grad()
        GatedLoss(onset=0.)(model(blocks[:, :-1], blocks[:, :-1], blocks[:, 9:]), blocks[:, 9:]).backward()
        opt.step()
    assert (model.U.norm(dim=1) - .4).abs().max() > 1e-3
    ids, state, grown = [id(p) for p in model.parameters()], {id(p): {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}, model.W0.clone()
    model.project_()
    for w in (model.U, model.V): assert (w.norm(dim=1) - .4).abs().max() < 1e-6
    assert [id(p) for p in model.parameters()] == ids and torch.equal(model.W0, grown)
    assert all(torch.equal(v, opt.state[p][k]) for p in model.parameters() for k, v in state[id(p)].items())
    with torch.no_grad(): model.V[0] = 0
    assert model.project_().V.isfinite().all()


@pytest.mark.parametrize('delta', [-60, -7, 0, 1, 60, 119, 120, 300])
def test_shifts_go_down_and_come_back(delta):
    x = rand(3, 120)
    out = shift_bins(x, delta)
    for i in range(120): assert torch.equal(out[:, i], x[:, i + delta]) if 0 <= i + delta < 120 else not out[:, i].any()
    back = shift_bins(out, -delta)
    kept = [i for i in range(120) if 0 <= i - delta < 120]
    assert torch.equal(back[:, kept], x[:, kept])
    around = shift_bins(x, delta, circular=True)
    assert torch.equal(around.sort(-1).values, x.sort(-1).values) and torch.equal(shift_bins(around, -delta, True), x)
    each = torch.tensor([delta, 0, -3])
    for c in (False, True): assert torch.equal(shift_bins(x[:, None], each, c)[0, 0], shift_bins(x[0], delta, c)) and torch.equal(shift_bins(x[:, None], each, c)[2, 0], shift_bins(x[2], -3, c))


def test_the_convolution_the_n_gram_and_ours_are_one():
    model, x = born(), rand(2, 40, 120)
    y = x[:, 8:]
    windows = torch.stack([x[:, t:t + 9].flatten(1) for t in range(32)], 1)
    m = torch.tanh(F.linear(torch.tanh(F.linear((windows @ model.U.T)*(y @ model.V.T), model.W0, model.b0)), model.W1, model.b1))
    conv = F.conv2d(x[:, None], model.U.view(256, 1, 9, 120))[..., 0].mT
    assert (model.look(x) - conv).abs().max() < 1e-5 and (model.look(x) - windows @ model.U.T).abs().max() < 1e-5
    assert (model.relate(model.look(x), y) - m).abs().max() < 1e-5
    h = F.linear(F.linear(m, model.W1.T) + model.b0, model.W0.T)
    assert (model.imagine(m, conv) - (h*conv) @ model.V).abs().max() < 1e-5


def test_binary_frames_come_back_as_probabilities():
    model, x = born(binary=True, n_bins=64), (torch.rand(2, 64, 20) > .9).float()
    p = model.decode(**model.encode(x))
    assert 0 < p.min() and p.max() < 1
    out, y = model(x.mT[:, :-1], x.mT[:, :-1], x.mT[:, 9:]), x.mT[:, 9:].contiguous()
    loss = GatedLoss(onset=0., binary=True)
    loss(out, y)
    assert loss.parts['recon'].item() == pytest.approx(F.binary_cross_entropy(p[..., 9:].mT, y).item()/math.log(2), rel=2e-3)


# --- written down instead of learnt -----------------------------------------------------------------------------------------

def test_written_gates_are_invariant_on_the_circle():
    model, g = G.fourier_gates(), torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 120, generator=g)/30
    code = lambda d, y=y: model.relate(F.linear(shift_bins(x, d, True), model.U), shift_bins(y, d, True))
    with torch.no_grad():
        assert max((code(d) - code(0)).abs().max().item() for d in range(1, 120)) < 1e-5
        assert (code(0, y.roll(3)) - code(0)).abs().max() > 1e-4
    assert model.W0.shape == (32, 64) and model.window == 1


@pytest.mark.parametrize('i, j', [(0, 0), (10, 17), (100, 3), (55, 119)])
def test_written_gates_hold_the_step_and_lead_to_it(i, j):
    model, k, spot = G.fourier_gates(), torch.arange(1, 17), torch.eye(120)
    with torch.no_grad():
        pre = F.linear(F.linear(spot[i], model.U)*F.linear(spot[j], model.V), model.W0)
        angle = 2*math.pi*k*(j - i)/120
        assert (pre - torch.cat([angle.cos(), angle.sin()])).abs().max() < 1e-5
        for up in (0, 20):
            y = F.linear(F.linear(pre, model.W0.T)*F.linear(spot[(i + up) % 120], model.U), model.V.T)
            assert y.argmax() == (j + up) % 120 and y.max().item() == pytest.approx(16, abs=1e-3)


def test_written_waves_turn_and_keep_their_size():
    model, x = G.fourier_basis(), torch.rand(1, 120, 32, generator=torch.Generator().manual_seed(4))
    at = lambda d: {k: v[0, :, 0] for k, v in model.encode(shift_bins(x.mT, d, True).mT).items()}
    with torch.no_grad():
        base = at(0)
        for d in (1, 7, 50, 119):
            there, turn = at(d), 2*math.pi*torch.arange(1, 17).repeat_interleave(4)*d/120
            assert (there['amplitude'] - base['amplitude']).abs().max() < 1e-5
            assert ((there['phase'] - base['phase'] - turn).cos() - 1).abs().max() < 1e-3


def test_a_complex_code_comes_back():
    model = ComplexAutoencoder(12, 3, 18)
    with torch.no_grad(): model.W.copy_(torch.linalg.qr(rand(36, 36))[0])
    x = rand(2, 12, 9)
    parts = model.encode(x)
    assert parts['amplitude'].shape == (2, 18, 9) and (model.decode(**parts) - x).abs().max() < 1e-4
    assert sum(p.numel() for p in ComplexAutoencoder().parameters()) == 1_966_080


# --- foreign weights ------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    "What somebody might have pickled as a whole."
    def __init__(self):
        super().__init__()
        self.conv_x, self.conv_y = nn.Conv2d(1, 256, (9, 120), padding=(4, 0), bias=False), nn.Conv2d(1, 256, (1, 120), bias=False)
        self.maps, self.bias_x = nn.ModuleList([nn.Conv2d(256, 128, 1), nn.Conv2d(128, 64, 1)]), nn.Parameter(torch.zeros(120))


class Evil:
    def __init__(self, name='system'): self.name = name
    def __reduce__(self): return getattr(os, self.name), ('touch was-here',)


@pytest.mark.parametrize('new', [True, False])
def test_weights_are_read_from_a_pickled_module_without_running_it(new, tmp_path):
    torch.manual_seed(0)
    net = Net()
    torch.save(net, tmp_path/'model.save', _use_new_zipfile_serialization=new)
    found = G.tensors_in(tmp_path/'model.save')
    assert set(found) == set(net.state_dict()) and all(torch.equal(found[k], v) for k, v in net.state_dict().items())
    model, x = G.read_published(tmp_path/'model.save'), rand(1, 120, 15)
    assert torch.equal(model.U.view(256, 1, 9, 120), net.conv_x.weight) and torch.equal(model.b1, net.maps[1].bias)
    with pytest.raises(CheckpointError, match='0 arrays of shape'): G.read_published(tmp_path/'model.save', context=7)
    assert model.encode(x)['interval'].isfinite().all()


@pytest.mark.parametrize('new', [True, False])
def test_a_pickle_with_a_program_in_it_is_refused(new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(w=torch.zeros(3), x=Evil()), 'evil', _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match='nothing was run'): G.tensors_in('evil')
    assert not Path('was-here').exists()


def test_a_pickle_of_builtins_is_refused(tmp_path):
    for body in (b"cbuiltins\neval\n(V1+1\ntR.", b"cposix\nsystem\n(Vtouch was-here\ntR.", b"csubprocess\nPopen\n(Vls\ntR."):
        with zipfile.ZipFile(tmp_path/'bad', 'w') as z: z.writestr('a/data.pkl', body)
        with pytest.raises(CheckpointError, match='nothing was run'): G.tensors_in(tmp_path/'bad')


def test_damaged_files_of_weights_are_named(tmp_path):
    torch.save(dict(w=torch.zeros(300)), tmp_path/'w')
    whole = (tmp_path/'w').read_bytes()
    for bad in (b'', b'hello', whole[:len(whole)//2], pickle.dumps([1, 2])):
        (tmp_path/'w').write_bytes(bad)
        with pytest.raises(CheckpointError, match="can't be read"): G.tensors_in(tmp_path/'w')
    with zipfile.ZipFile(tmp_path/'big', 'w') as z:  # asks for more than is there
        z.writestr('a/data.pkl', b"\x80\x02ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\xff\xff\xff\x7ftQK\x00K\x01\x85K\x01\x85tR.")
        z.writestr('a/data/0', b'1234')
    with pytest.raises(CheckpointError, match='2147483647 numbers'): G.tensors_in(tmp_path/'big')


# --- blocks and keys ------------------------------------------------------------------------------------------------------

def test_blocks_are_whole_and_have_their_past():
    x = rand(3000, 120)
    blocks = frame_blocks(x)
    assert blocks.shape == (2, 1033, 120)  # as many blocks of 1024 as fit, where the published program makes none
    assert torch.equal(blocks[1], x[1024:2057])
    assert len(frame_blocks([x, x[:1032], x[:1033]])) == 3
    with pytest.raises(ValueError, match='1032 frames'): frame_blocks([x[:1032]])


def test_targets_follow_their_contexts():
    model, block = born(gain=(6, 4)).eval(), contrast(torch.rand(2, 59, 120))
    x, moved, y, y_moved = two_keys(block, 0)
    assert torch.equal(x, moved) and torch.equal(y, y_moved)
    assert torch.allclose(model(x, moved, y)['m'], model.encode(block.mT)['interval'].mT[:, 9:], atol=1e-6)


def test_the_code_is_made_in_the_old_key_and_used_in_the_new():
    model, block = born(gain=(6, 4)).train(), contrast(torch.rand(2, 59, 120))
    x, moved, y, y_moved = two_keys(block, 6)
    out = model(x, moved, y, y_moved)
    assert 'm_moved' not in out and torch.allclose(out['m'], model.relate(model.look(x), y), atol=1e-6)
    assert torch.allclose(out['y_hat'], model.imagine(out['m'], model.look(moved)), atol=1e-6)
    assert torch.allclose(model.eval()(x, moved, y, y_moved)['m_moved'], model.relate(model.look(moved), y_moved), atol=1e-6)


def test_dropout_takes_half_of_the_context_and_moves_with_it():
    block = torch.rand(4, 200, 120) + .1
    x, moved, y, y_moved = two_keys(block, -5, dropout=.5, g=make_generator(0))
    assert torch.equal(moved, shift_bins(x, -5)) and torch.equal(y_moved, shift_bins(block[:, 9:], -5)) and torch.equal(y, block[:, 9:])
    assert abs((x == 0).float().mean() - .5) < .01 and torch.allclose(x[x > 0], 2*block[:, :-1][x > 0])
    for p in (.25, .9): assert abs((T.keep_some(block, p, make_generator(1)) == 0).float().mean() - p) < .01
    lags = [(x[..., i:] == 0)[..., :100].float().flatten() for i in (0, 1, 8)]
    assert abs(torch.corrcoef(torch.stack(lags))[0, 1:]).max() < .02  # neighbours fall independently
    assert torch.equal(two_keys(block, 3, dropout=.5, g=make_generator(7))[0], two_keys(block, 3, dropout=.5, g=make_generator(7))[0])


def test_keys_are_equally_likely_and_seeded():
    d = T.draw_keys(make_generator(0), 60, 20_000)
    count = d.add(60).bincount(minlength=121)
    assert d.min() == -60 and d.max() == 60 and count.min() > 100 and count.max() < 240
    assert T.draw_keys(make_generator(1)) == T.draw_keys(make_generator(1)) and T.draw_keys(make_generator(1), 0) == 0


# --- loss and training ------------------------------------------------------------------------------------------------------

def test_predicting_nothing_costs_one_in_every_key():
    y = contrast(torch.rand(3, 40, 120))
    out, loss = dict(m=torch.full((3, 40, 64), .1), y_hat=torch.zeros(3, 40, 120)), GatedLoss(4e-6, onset=0.)
    for delta in (0, 20, -60):
        loss.delta = delta
        assert loss(out, shift_bins(y, delta)).item() == pytest.approx(1 + 120*.004352*.01, rel=1e-4)
    assert [k for k in loss.parts if k.startswith('shift')] == ['shift 46-60']
    loss.delta = 15
    loss(out, y)
    assert 'shift 0-15' in loss.parts


def test_frames_that_bring_something_count_more():
    y, rise = contrast(torch.rand(1, 10, 120)), torch.zeros(1, 10)
    rise[0, 4] = 1.
    wrong_there, wrong_elsewhere = y.clone(), torch.zeros_like(y)
    wrong_there[0, 4], wrong_elsewhere[0, 4] = 0., y[0, 4]
    out = lambda y_hat: dict(m=torch.zeros(1, 10, 64), y_hat=y_hat)
    loss = GatedLoss(onset=9.)
    assert loss(out(wrong_there), y, rise).item() == pytest.approx(10/19, rel=1e-4) and loss(out(wrong_elsewhere), y, rise).item() == pytest.approx(9/19, rel=1e-4)
    assert GatedLoss(onset=0.)(out(wrong_there), y, rise).item() == pytest.approx(.1, rel=1e-4)
    tune = draw_melody([12, 16], 20)
    assert T.flux(tune).argmax() == 20 and T.flux(tune)[0] == 0


def test_the_gap_is_nothing_for_a_constant():
    m = torch.ones(2, 30, 8)
    assert T.gap(dict(m=m, m_moved=m))['gap'].item() == pytest.approx(0., abs=1e-6)
    far = rand(2, 300, 64)
    assert T.gap(dict(m=far, m_moved=far))['gap'].item() == pytest.approx(1., abs=.02)


PIECES = draw_pieces(3000, seed=1), draw_pieces(1000, seed=2)


def small(seed=0, cbs=None, keys=None, epochs=4, **kw):
    seed_everything(seed)
    learn = gated_learner(gated_dls(*PIECES, bs=4, size=64, seed=seed), GatedAutoencoder(n_factors=32, n_mapping=(16, 8), gain=(6, 4)), keys=keys, cbs=cbs, bars=False, **kw)
    fit_gated(learn, epochs, 3e-3)
    return learn


class Strike(Callback):
    order = 100
    def __init__(self, at): self.at = at
    def after_step(self):
        if self.train_iter == self.at: raise SystemExit('power cut')


@pytest.mark.parametrize('each', [False, True])
def test_a_run_struck_down_goes_on_to_the_same_bits(each, tmp_path):
    whole = small(keys=Transpose(each=each))
    with pytest.raises(SystemExit): small(keys=Transpose(each=each), cbs=[Checkpoint(tmp_path), Strike(29)])
    again = small(keys=Transpose(each=each), cbs=[Checkpoint(tmp_path, resume=True)])
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    assert whole.parts.history == again.parts.history
    assert torch.stack(list(whole.recorder.losses)).equal(torch.stack(list(again.recorder.losses)))


def test_training_moves_filters_keeps_lengths_and_says_what_it_does():
    learn = small()
    history = learn.parts.history
    assert history['train'][-1]['recon'] < .95*history['train'][0]['recon'] and history['valid'][-1]['recon'] < history['valid'][0]['recon']
    assert {'recon', 'activity', 'gap'} <= set(history['valid'][-1]) and any(k.startswith('shift 46') for e in history['train'] for k in e)
    for w in (learn.model.U, learn.model.V): assert (w.norm(dim=1) - .4).abs().max() < 1e-6
    assert list(learn.recorder.metric_names[3:6]) == ['recon', 'activity', 'gap']
    assert learn.opt.hypers[-1]['lr'] < 1e-4  # the step has gone to zero


def test_validation_asks_the_same_whatever_training_does():
    seen = {}
    class Watch(Callback):
        order, run_valid = 41, True
        def before_batch(self):
            seen.setdefault(self.training, []).append(self.loss_func.delta)
            if not self.training: assert (self.xb[0] != 0).float().mean() > .95  # nothing is dropped
    small(keys=Transpose(reach=0), cbs=[Watch()], epochs=2)
    valid = seen[False]
    assert set(seen[True]) == {0} and any(valid) and valid[:len(valid)//2] == valid[len(valid)//2:] and max(map(abs, valid)) <= 24


def test_schedules_by_name():
    learn = gated_learner(gated_dls(*PIECES, bs=8, size=64), GatedAutoencoder(n_factors=8, n_mapping=(8, 4)), bars=False)
    with pytest.raises(ValueError, match='one_cycle, cosine or constant'): fit_gated(learn, 1, schedule='linear')
    for how in ('one_cycle', 'constant'): fit_gated(learn, 1, 1e-3, how)
    assert learn.opt.hypers[-1]['lr'] == 1e-3
    assert learn.model.n_bins == 120 and gated_learner(learn.dls, bars=False).model.args['gain'] == [6, 4]

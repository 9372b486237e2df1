"What a portrait must be indifferent to, and what adding an instrument must leave alone."
import pytest, torch
from types import SimpleNamespace
from disentangle_nb.features.nsgt import NSGTMel
from disentangle_nb.losses.move import MoveLoss
from disentangle_nb.models.move import pitch_code
from disentangle_nb.models.portrait import PortraitMoVE, coloured, enrol, filters, mingled, sitters
from disentangle_nb.models.system import Disentangler

small = dict(n_bins=125, channels=(4, 8), hidden=(32, 16, 16), film=16, pitches=tuple(range(60, 72)))
SR = 22050


def model(k=2, **kw):
    torch.manual_seed(0)
    m = PortraitMoVE(k, **small | kw)
    for film in (m.film_in, m.film_out, m.painter.film): torch.nn.init.normal_(film.heads.weight, 0, .3)  # as if trained: portraits matter
    m.gallery.uniform_(-1, 1)
    return m.eval()


def batch(k=2, m=4):
    x = torch.rand(k*m, 125, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.eye(k).repeat_interleave(m, 0), pitch_code(60 + torch.arange(m)).repeat(k, 1)


def tone(midi, seconds=.6):
    t = torch.arange(int(seconds*SR))/SR
    f = 440*2**((midi - 69)/12)
    return .1*sum((2*torch.pi*f*h*t).sin()/h for h in (1, 2, 3, 4))


def system(k=2, **kw):
    return Disentangler(NSGTMel(n_bins=125).fit_range(tone(60)[None]), model(k, **kw), dict(timbre=[f'i{n}' for n in range(k)], pitch=range(60, 72)))


@pytest.mark.parametrize('most', [None, 1, 3])
def test_no_slice_sits_for_its_own_portrait(most):
    midi = torch.randint(60, 66, (3, 12), generator=torch.Generator().manual_seed(0))
    share = sitters(pitch_code(midi), most, torch.Generator().manual_seed(0))
    same = midi[:, :, None] == midi[:, None]
    assert (share[same] == 0).all() and torch.allclose(share.sum(-1), torch.ones(3, 12))
    assert most is None or ((share > 0).sum(-1) <= most).all()


def test_a_slice_does_not_reach_its_own_condition():
    m, (x, _, pitch) = model(), batch()
    x.requires_grad_()
    told = sitters(pitch.unflatten(0, (2, -1))) @ m.painter(x, pitch).unflatten(0, (2, -1))
    told[1, 2].square().sum().backward()
    moved = x.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [False]*4 + [True, True, False, True]  # its block, without itself


def test_a_block_of_one_pitch_still_keeps_each_slice_from_itself():
    share = sitters(pitch_code(torch.full((2, 3), 60)), 2, torch.Generator().manual_seed(0))
    assert (share.diagonal(dim1=1, dim2=2) == 0).all() and torch.allclose(share.sum(-1), torch.ones(2, 3))
    x, timbre, pitch = batch(2, 1)
    with pytest.raises(ValueError, match='more columns'): model()(x, timbre, pitch)


def test_the_order_of_references_does_not_matter():
    m, (x, _, pitch) = model(), batch(1, 8)
    i = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(m.portrait(x, pitch), m.portrait(x[i], pitch[i]), atol=1e-6)


def test_a_column_moves_with_its_references():
    "Blocks and columns in another order give the same outputs in that order."
    m, (x, timbre, pitch) = model(), batch()
    i = torch.tensor([3, 1, 0, 2])
    rows = torch.cat([i + 4, i])
    assert torch.allclose(m(x, timbre, pitch)['x_hat'][rows], m(x[rows], timbre[rows], pitch[rows])['x_hat'], atol=1e-5)


def test_every_parameter_gets_a_gradient():
    m, (x, timbre, pitch) = model().train(), batch()
    m.route = dict(by=1)
    MoveLoss('mmd')(m(x, timbre, pitch), torch.ones(4, dtype=torch.bool)).backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_changes_are_the_same_for_a_whole_block_and_none_in_evaluation():
    m, (x, timbre, pitch) = model(), batch()
    assert torch.equal(m(x, timbre, pitch)['x'], x)
    blocks, curves = x.unflatten(0, (2, -1)), filters(2, 125, .3, generator=torch.Generator().manual_seed(0))
    step = coloured(blocks, curves) - blocks
    inside = (blocks + curves[:, None, :, None] > blocks.amin()) & (blocks > blocks.amin())
    assert torch.allclose(step[inside], curves[:, None, :, None].expand_as(step)[inside], atol=1e-6)
    assert torch.equal(mingled(blocks, pitch.unflatten(0, (2, -1)), torch.zeros(2)), blocks)


def test_saving_is_exact_with_the_gallery(tmp_path):
    s = system()
    back = Disentangler.load(s.save(tmp_path/'s'), 'cpu')
    assert torch.equal(back.model.gallery, s.model.gallery) and back.model.args == s.model.args
    a, b = (v.edit(tone(64), timbre='i1', heard=dict(timbre='i0', pitch=64), n_iter=2) for v in (s, back))
    assert torch.equal(a, b)


def test_enrolling_leaves_the_others_alone(tmp_path):
    s = system()
    before = {k: v.clone() for k, v in s.model.state_dict().items()}
    more = enrol(s, 'new', [tone(m) for m in (61, 64, 68)])
    assert s.vocabs['timbre'] == ['i0', 'i1'] and s.model.args['n_timbre'] == 2
    assert all(torch.equal(v, before[k]) for k, v in s.model.state_dict().items())
    for name in ('i0', 'i1'):
        a, b = (v.edit(tone(64), timbre=name, heard=dict(timbre='i0', pitch=64), n_iter=2) for v in (s, more))
        assert torch.equal(a, b)
    back = Disentangler.load(more.save(tmp_path/'more'), 'cpu')
    assert back.vocabs['timbre'] == ['i0', 'i1', 'new'] and torch.equal(back.model.gallery, more.model.gallery)
    assert enrol(more, 'newer', [tone(66)]).card['enrolled'] == ['new', 'newer']


def test_the_order_of_notes_does_not_matter_and_hearing_equals_being_told():
    s, notes = system(), [tone(m) for m in (61, 64, 68)]
    last = lambda *a: enrol(s, 'new', *a).model.gallery[-1]
    assert torch.allclose(last(notes), last(notes[::-1]), atol=1e-6)
    assert torch.allclose(last(notes), last(notes, [61, 64, 68]), atol=.05)  # the tracker's few cents are a soft pitch


@pytest.mark.parametrize('name, clips, midi, says', [
    ('i1', [tone(60)], None, 'taken'), ('new', [], None, 'no notes'), ('new', [tone(60), torch.zeros(9999)], None, 'note 2 of 2 is silent'),
    ('new', [tone(60)], [60, 61], 'one each'), ('new', [.1*torch.randn(13000, generator=torch.Generator().manual_seed(0))], None, 'no pitch'),
    ('new', [torch.full((9999,), torch.nan)], None, 'NaN')])
def test_what_cannot_be_enrolled_says_why(name, clips, midi, says):
    with pytest.raises(ValueError, match=says): enrol(system(), name, clips, midi)


def test_an_empty_gallery_is_named():
    s = system()
    s.model.gallery.zero_()
    with pytest.raises(ValueError, match='hang'): enrol(s, 'new', [tone(60)])


def test_the_gallery_is_hung_from_what_sounds():
    m, x = model(), torch.rand(4, 125, 48, generator=torch.Generator().manual_seed(2))
    notes = SimpleNamespace(tensors=(x, torch.tensor([0, 0, 1, 1]), torch.tensor([60, 61, 60, 61])), last=torch.tensor([32, 0, 32, 16]), size=16)
    m.hang(notes)
    first = torch.cat([x[0].unfold(-1, 16, 16).permute(1, 0, 2), x[1, None, :, :16]])
    assert torch.allclose(m.gallery[0], m.portrait(first, pitch_code(torch.tensor([60, 60, 60, 61]))), atol=1e-6)
    assert (m.nearest('timbre', m.component('timbre', torch.arange(2))).argmax(-1) == torch.arange(2)).all()


def test_convolutions_of_ones_own_are_refused():
    with pytest.raises(ValueError, match='portraits'): PortraitMoVE(2, private=True)

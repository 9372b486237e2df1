"What any frame and any feature made of it must stand: bounds, any length, odd input, one clip as in a batch."
import math
import pytest, torch
from disentangle_nb.features.nsgt import NSGT, NSGTMel, joined, log_scale, lowest_fmax, slices

frames = {'mel': dict(), 'mel, 125 rows': dict(n_bins=125), 'log': dict(scale='log', n_bins=96, fmin=32.7, fmax=10800.), 'own': dict(scale=[50., 120., 700., 900., 4000., 9000.]),
          'short': dict(n_samples=8820), 'rate': dict(sr=16000, fmax=7980., n_samples=32000)}


@pytest.fixture(params=frames, scope='module')
def frame(request): return NSGT(**frames[request.param], dtype=torch.float64)


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.filterwarnings('ignore:the last row')
def test_reconstruction_is_exact_in_both_precisions(frame):
    x = noise(2, frame.L)
    assert (frame.synthesise(frame.analyse(x)) - x).norm() < 1e-10*x.norm()
    single = NSGT(frame.freqs, sr=frame.sr, n_samples=frame.L, n_frames=frame.N)
    assert (single.synthesise(single.analyse(x.float())) - x).norm() < 1e-5*x.norm()


def test_energy_lies_between_the_bounds(frame):
    c, x = frame.analyse(noise(1, frame.L)), noise(1, frame.L)
    energy = (c[:, [0, -1]].abs().square().sum() + 2*c[:, 1:-1].abs().square().sum())*frame.N/frame.L
    assert frame.S.min() > 0 and frame.S.min()*x.square().sum()*.99 <= energy <= frame.S.max()*x.square().sum()*1.01


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_gradients_pass_both_ways(dtype):
    f = NSGT(n_bins=12, fmin=200., fmax=9000., n_samples=512, n_frames=400, dtype=dtype)
    x = torch.randn(1, 512, dtype=dtype, requires_grad=True)
    f.synthesise(f.analyse(x).abs()*f.analyse(x)).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_a_low_end_is_warned_about_and_lowest_fmax_is_not():
    with pytest.warns(UserWarning, match='lowest_fmax'): NSGT(fmax=8000.)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        NSGT(n_bins=125, fmax=lowest_fmax(125))


@pytest.mark.parametrize('n', [1, 7, 4410, 44099, 100_001])
def test_slices_join_at_any_length(n):
    f, x = NSGT(n_samples=8820, dtype=torch.float64), noise(2, n)
    cut = slices(x, f.L)
    back = joined(torch.stack([f.synthesise(f.analyse(s)) for s in cut.unbind(1)], 1), n)
    assert back.shape == x.shape and (back - x).norm() < 1e-10*x.norm()


feature = NSGTMel(n_bins=125)


@pytest.mark.parametrize('n', [1, 2, 169, 170, 4410, 30_001])
def test_the_feature_takes_any_length(n):
    x = feature.encode(noise(2, n).float()*.1)
    assert x.shape == (2, *feature.shape(n)) and x.isfinite().all()
    assert feature.decode(x, n_samples=n, n_iter=1).shape == (2, n)


def test_silence_is_the_floor_and_returns_silent():
    x = feature.encode(torch.zeros(1, 4410))
    assert ((x*feature.scale + feature.mean - feature.floor).abs() < 1e-4).all()
    assert (feature.decode(x, n_iter=2) == 0).all()


def test_one_clip_equals_itself_in_a_batch():
    x = noise(5, 8820).float()
    assert torch.equal(feature.encode(x)[3], feature.encode(x[3])) or (feature.encode(x)[3] - feature.encode(x[3])).abs().max() < 1e-5


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match='0 samples'): feature.encode(torch.zeros(1, 0))


def test_silent_training_clips_are_refused():
    with pytest.raises(ValueError, match='silent'): NSGTMel(n_bins=125).fit_range(torch.zeros(2, 4410))


def test_arguments_and_state_rebuild_it():
    f = NSGTMel(n_bins=125).fit_range(noise(2, 8820).float())
    again = NSGTMel(**f.args)
    again.load_state_dict(f.state_dict())
    x = noise(1, 8820).float()
    assert torch.equal(again.encode(x), f.encode(x)) and set(f.state_dict()) == {'mean', 'scale', 'floor'}


def test_magnitudes_are_amplitudes_at_any_length():
    f = NSGTMel()
    for n in (44100, 66150, 110250):
        t = torch.arange(n)/22050
        assert f.magnitude(.25*torch.sin(2*math.pi*float(f.freqs[250])*t)[None])[0, 250, n//400:-n//400].mean().item() == pytest.approx(.25, abs=.01)


def test_log_rows_are_even_in_octaves():
    r = log_scale(50)[1:]/log_scale(50)[:-1]
    assert torch.allclose(r, r[:1])

"""Descriptors of spectra, and pitch with voicing: what is left when frames are missing, few, single, or on another axis."""
import math
import numpy as np, pytest, torch
from disentangle_nb.features.descriptors import cents_between, pyin_f0, pyin_track
from disentangle_nb.features.timbre import (bandwidth, centroid, describe, flatness, inharmonicity, loudness, partials, rolloff, sharpness,
                                            tristimulus, units)

FREQS = torch.linspace(20, 11000, 300)
PLAIN, PITCHED = (centroid, bandwidth, rolloff, flatness, loudness, sharpness), (inharmonicity, tristimulus)
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]


def spectra(b=3, n=20, seed=0, dtype=torch.float32):
    return torch.rand(b, len(FREQS), n, generator=torch.Generator().manual_seed(seed)).to(dtype)**3


@pytest.mark.parametrize('b, n', [(1, 1), (3, 1), (2, 0), (0, 4), (4, 7)])
def test_shapes_of_few_and_none(b, n):
    out = describe(spectra(b, n), FREQS, 300.)
    assert list(out) == list(units) and all(v.shape == (b, n) and v.isfinite().all() for v in out.values())
    assert tristimulus(spectra(b, n), FREQS, 300.).shape == (b, 3, n)


def test_one_item_is_the_same_in_a_batch():
    x, f0 = spectra() * torch.tensor([1e-4, 1., 1e3])[:, None, None], torch.tensor([150., 300., math.nan])
    whole = describe(x, FREQS, f0)
    for i in range(3):
        for k, v in describe(x[i:i + 1], FREQS, f0[i:i + 1]).items(): torch.testing.assert_close(v[0], whole[k][i], equal_nan=True, rtol=1e-5, atol=1e-6)
    for k, v in describe(x[..., 7:8], FREQS, f0).items(): torch.testing.assert_close(v[:, 0], whole[k][:, 7], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_one_number_one_a_clip_and_one_a_frame_are_the_same_f0():
    x = spectra()
    for f0 in (torch.full((3,), 300.), torch.full((3, 20), 300.), np.full((3, 1), 300.)):
        assert torch.equal(inharmonicity(x, FREQS, f0), inharmonicity(x, FREQS, 300.))
    with pytest.raises(ValueError, match='one a frame'): inharmonicity(x, FREQS, torch.ones(20))


@pytest.mark.parametrize('bad', [0., math.nan], ids=['silent', 'NaN'])
def test_a_frame_without_sound_is_nan_and_only_that(bad):
    x = spectra(); x[1, :, 4] = bad
    for k, v in describe(x, FREQS, 300.).items(): assert v.isnan().nonzero().tolist() == [[1, 4]], k


@pytest.mark.parametrize('none', [math.nan, 0., -1., None])
def test_no_f0_is_nan_where_one_is_needed(none):
    out = describe(spectra(), FREQS, none)
    assert {k for k, v in out.items() if v.isnan().all()} == {'inharmonicity', 'tristimulus', 'tristimulus2', 'tristimulus3'}
    assert all(v.isfinite().all() for k, v in out.items() if k in {f.__name__ for f in PLAIN})


def test_an_f0_above_all_rows_has_no_partials():
    assert inharmonicity(spectra(), FREQS, 30000.).isnan().all() and (partials(spectra(), FREQS, 30000.)[0] == 0).all()


@pytest.mark.parametrize('gain', [1e-25, 1e-3, 1e6])
def test_only_loudness_knows_the_gain(gain):
    before, after = describe(spectra(), FREQS, 300.), describe(spectra()*gain, FREQS, 300.)
    for k in units: torch.testing.assert_close(after[k], before[k]*(gain if k == 'loudness' else 1), rtol=2e-4, atol=0 if k == 'loudness' else 1e-5)


@pytest.mark.parametrize('fn', PLAIN + PITCHED, ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_formula(fn):
    freqs = torch.linspace(100, 4000, 24, dtype=torch.float64)
    x = torch.rand(1, 24, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + .1
    x[:, ::5] *= 3e-6                                                                # under every floor
    x.requires_grad_()
    more = (700.,) if fn in PITCHED else ()
    assert torch.autograd.gradcheck(lambda a: fn(a, freqs, *more), x, eps=1e-9, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_kind_and_place_are_those_of_the_magnitudes(device, dtype):
    x = spectra(dtype=dtype)
    for k, v in describe(x.to(device), FREQS.numpy(), 300.).items():
        assert v.dtype == dtype and v.device.type == device
        torch.testing.assert_close(v.cpu(), describe(x, FREQS, 300.)[k], rtol=1e-4, atol=1e-4)


# --- pitch with voicing -----------------------------------------------------------------------------------------------

def sung(f=220., dur=.8, sr=22050):
    t = torch.arange(int(dur*sr), dtype=torch.float64)/sr
    return .1*sum(torch.sin(2*math.pi*f*h*t)/h for h in (1, 2, 3)).float()


@pytest.mark.parametrize('t, n', [(0, 0), (1, 1), (169, 1), (22050, 130)])
def test_a_frame_for_every_centre_in_the_clip(t, n):
    f, voiced, p = pyin_track(torch.zeros(t), fmin=100, fmax=400, rate=130.)
    assert f.shape == voiced.shape == p.shape == (n,) and voiced.dtype == torch.bool
    assert f.isnan().all() and not voiced.any() and (p == 0).all()


@pytest.mark.parametrize('sr', [16000, 44100])
def test_pitch_at_other_rates(sr):
    f, voiced, _ = pyin_track(sung(sr=sr), sr, fmin=100, fmax=400, rate=50., frame=round(2048*sr/22050))
    assert voiced[3:-3].all() and cents_between(f[3:-3], 220.).abs().max() < 15        # the states are ten cents apart


@pytest.mark.parametrize('block, overlap', [(.1, .3), (.25, .25), (.8, 0.), (100., 1.)])
def test_blocks_leave_no_seam(block, overlap):
    wav = torch.cat([sung(220.), torch.zeros(4000), sung(247.)])
    whole, parts = (pyin_track(wav, fmin=150, fmax=400, rate=60., **kw) for kw in (dict(block=1e6), dict(block=block, overlap=overlap)))
    for a, b in zip(whole, parts): assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_is_no_clip_is_refused():
    with pytest.raises(ValueError, match='one finite clip'): pyin_track(torch.zeros(2, 5000))
    with pytest.raises(ValueError, match='3 NaN'): pyin_track(torch.tensor([math.nan]*3 + [0.]*5000))
    assert math.isnan(pyin_f0(torch.zeros(5000), fmin=100, fmax=400))

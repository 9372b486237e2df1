"""Every feature answers the same questions: is it exact, is it invertible, and does it stand odd input?

A feature is an `nn.Module` with `encode`, `decode`, `shape`, `sr`. Add new ones to FEATURES, with the error that a round trip may leave.
"""
import warnings
from functools import cache

import numpy as np, pytest, torch

from disentangle_nb.core import shared_audio
from disentangle_nb.features.invert import frames, griffin_lim, istft, mel_error_db, nnls_mel, peak_phases, spectral_convergence, stft
from disentangle_nb.features.mel import LogMel

# Round-trip floors: spectral convergence of (tone, noise, note, voice), and log-mel error in dB. Measured values are about a fifth lower.
FEATURES = {
    'logmel': (dict(), (.16, .50, .10, .26), (6., 1.1, 2.7, 2.9)),
    'logmel, floor -80 dB': (dict(floor_db=-80.), (.16, .50, .10, .26), (6., 1.1, 2.7, 2.9)),
    'logmel, 64 bands at 16 kHz': (dict(sr=16000, n_fft=1024, hop=160, n_mels=64, fmax=8000.), (.38, .56, .32, .53), (4.6, 1., 4.3, 3.9)),
}
DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()


@cache
def make(name): return LogMel(**FEATURES[name][0])


@pytest.fixture(params=list(FEATURES))
def name(request): return request.param


@pytest.fixture
def feature(name): return make(name)


@cache
def sounds(sr):
    "Tone, noise, note and voice, one second each; made here, so that the floors hold everywhere."
    s = torch.arange(sr).double() / sr
    def voiced(f0, amp):
        ph = 2 * np.pi * torch.cumsum(f0, 0) / sr
        return sum(amp(k * f0) * torch.sin(k * ph) for k in range(1, 40) if k * f0.max() < .45 * sr)
    flat, glide = torch.full_like(s, 220.), 180 + 40 * torch.sin(2 * np.pi * 1.5 * s)
    formants = lambda f: sum(torch.exp(-((f - c) / w) ** 2) for c, w in ((500, 120), (1500, 200), (2500, 300))) + .01
    out = [voiced(flat, lambda f: 1 / f), torch.randn(sr, generator=torch.Generator().manual_seed(0)).double(),
           voiced(flat, lambda f: f ** -1.5) * torch.exp(-4 * s), voiced(glide, formants)]
    return torch.stack([.3 * w / w.abs().max() for w in out]).float()


def test_inverse_error_is_below_its_floor(name, feature, capsys):
    x = sounds(feature.sr)
    y = feature.decode(feature.encode(x), n_samples=x.shape[1])
    conv = spectral_convergence(y, stft(x, feature.n_fft, feature.hop).abs(), feature.n_fft, feature.hop)
    db = mel_error_db(feature.mel_power(y), feature.mel_power(x))
    _, conv_floor, db_floor = FEATURES[name]
    with capsys.disabled():
        print(f'\n{name}: convergence {conv.numpy().round(3)} below {conv_floor}; log-mel {db.numpy().round(2)} below {db_floor} dB')
    assert y.shape == x.shape and y.isfinite().all()
    assert (conv < torch.tensor(conv_floor)).all() and (db < torch.tensor(db_floor)).all()


def test_parity_with_librosa(feature):
    "1e-4 in the logarithm down to 60 dB below a frame's loudest band; lower ones are rounding of single precision, in both."
    import librosa
    x = sounds(feature.sr)
    args = dict(sr=feature.sr, n_fft=feature.n_fft, hop_length=feature.hop, n_mels=feature.n_mels, fmin=feature.fmin, fmax=feature.fmax)
    ref = np.stack([librosa.feature.melspectrogram(y=w.numpy(), pad_mode='reflect', **args) for w in x])
    ref = np.log(float(feature.eps) + ref)
    ours = ((feature.encode(x) + 1) / 2 * (feature.hi - feature.lo) + feature.lo).numpy()
    gap = np.abs(ours - ref)
    assert gap[ref > ref.max(1, keepdims=True) - np.log(1e6)].max() < 1e-4
    assert np.median(gap) < 1e-4


def test_double_precision_agrees_with_librosa_in_double(feature):
    import librosa
    x = sounds(feature.sr)[3].double()
    ref = librosa.feature.melspectrogram(y=x.numpy(), sr=feature.sr, n_fft=feature.n_fft, hop_length=feature.hop, n_mels=feature.n_mels,
                                         fmin=feature.fmin, fmax=feature.fmax, pad_mode='reflect')
    double = LogMel(**feature.args).double()
    ours = double.mel_power(x).numpy()
    assert ours.dtype == np.float64
    keep = ref > 1e-6 * ref.max(0)
    assert np.abs(np.log(ours[keep] / ref[keep])).max() < 1e-4  # weights and window are stored in single precision


def test_one_item_equals_the_same_item_in_a_batch(feature):
    x = sounds(feature.sr)
    alone, batch = torch.stack([feature.encode(w) for w in x]), feature.encode(x)
    assert (alone - batch).abs().max() < 1e-4
    y = feature.decode(batch, n_iter=4)
    for i in range(4): assert (feature.decode(batch[i], n_iter=4) - y[i]).abs().max() < 1e-3 * y[i].abs().max()


def test_order_of_a_large_batch_does_not_matter(feature):
    x = torch.randn(40, feature.sr // 4, generator=torch.Generator().manual_seed(1))
    turned = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert (feature.encode(x)[turned] - feature.encode(x[turned])).abs().max() < 1e-4


def test_silence(feature):
    x = feature.encode(torch.zeros(2, 4000))
    assert (x + 1).abs().max() < 1e-5
    assert feature.decode(x, n_samples=4000).abs().max() < 1e-4


def test_impulse(feature):
    "A click is flat: every band that holds a bin gets power, in the frames around it and in no other."
    x = torch.zeros(1, 8 * feature.n_fft)
    x[0, 4 * feature.n_fft] = 1.
    p = feature.mel_power(x)[0]
    at = round(4 * feature.n_fft / feature.hop)
    reach = feature.n_fft // 2 // feature.hop
    assert p[:, at].min() > 0 and abs(int(p.sum(0).argmax()) - at) <= 1
    assert p[:, :at - reach - 1].abs().max() == 0 and p[:, at + reach + 2:].abs().max() == 0


def test_offset_is_not_seen(feature):
    "A constant has its power in the two lowest bins, below the first band; a tone on top of it looks as it does alone."
    assert feature.mel_power(.5 * torch.ones(1, feature.sr)).max() < 1e-9
    tone = sounds(feature.sr)[0]
    a, b = feature.mel_power(tone), feature.mel_power(tone + .5)
    assert (a - b).abs().max() < 1e-5 * a.max()


@pytest.mark.parametrize('n', [1, 2, 3, 127, 255, 256, 257, 1023, 1024, 1025, 2049, 11007, 22051])
def test_any_length(feature, n):
    w = torch.randn(2, n, generator=torch.Generator().manual_seed(n)) * .1
    x = feature.encode(w)
    assert x.shape == (2, *feature.shape(n)) and x.isfinite().all()
    y = feature.decode(x, n_samples=n, n_iter=2)
    assert y.shape == w.shape and y.isfinite().all()


@pytest.mark.parametrize('n', [1, 5, 1000, 3001])
def test_padding_of_short_clips_is_librosas(n):
    w = torch.randn(1, n, generator=torch.Generator().manual_seed(n))
    want = np.lib.stride_tricks.sliding_window_view(np.pad(w[0].numpy(), 1024, mode='reflect'), 2048)[::256][:1 + n // 256]
    assert np.array_equal(frames(w)[0].numpy(), want)


def test_no_samples_is_an_error(feature):
    with pytest.raises(ValueError, match='0 samples'): feature.encode(torch.zeros(2, 0))


def test_leading_dimensions_are_kept(feature):
    w = torch.randn(3, 2, 3000, generator=torch.Generator().manual_seed(0))
    x = feature.encode(w)
    assert x.shape == (3, 2, *feature.shape(3000)) and feature.encode(w[0, 0]).shape == feature.shape(3000)
    assert feature.decode(x, n_samples=3000, n_iter=1).shape == w.shape
    assert (x[1, 1] - feature.encode(w[1, 1])).abs().max() < 1e-4


def test_gradient_flows_and_changes_no_value(feature):
    w = (torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) * .1).requires_grad_()
    x = feature.encode(w)
    assert (x.detach() - feature.encode(w.detach())).abs().max() < 1e-6
    x.square().mean().backward()
    assert w.grad.isfinite().all() and (w.grad != 0).float().mean() > .9


def test_gradient_is_the_slope(feature):
    "Central difference along a random direction, in double precision."
    double, g = LogMel(**feature.args).double(), torch.Generator().manual_seed(0)
    w, d = torch.randn(2, 1, 3000, generator=g, dtype=torch.float64) * .1
    f = lambda u: double.encode(u).square().sum()
    (slope,) = torch.autograd.grad(f(w.requires_grad_()), w)
    h = 1e-5
    numeric = (f(w.detach() + h * d) - f(w.detach() - h * d)) / (2 * h)
    assert float((slope * d).sum()) == pytest.approx(float(numeric), rel=1e-5)


def test_input_is_left_alone(feature):
    w = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    kept = w.clone()
    x = feature.encode(w)
    kept_x = x.clone()
    feature.decode(x, n_iter=2)
    assert torch.equal(w, kept) and torch.equal(x, kept_x)


def test_mixed_precision_does_not_reach_the_feature(feature):
    w = sounds(feature.sr)
    with torch.autocast('cpu', dtype=torch.bfloat16): x = feature.encode(w)
    assert x.dtype == torch.float32 and (x - feature.encode(w)).abs().max() < 1e-5


@pytest.mark.parametrize('device', DEVICES)
def test_any_device(feature, device):
    there, w = LogMel(**feature.args).to(device), sounds(feature.sr)
    x = there.encode(w.to(device))
    assert x.device.type == device
    assert (x.cpu() - feature.encode(w)).abs().median() < 1e-4
    y = there.decode(x, n_iter=8)
    assert y.device.type == device and y.isfinite().all()


def test_arguments_and_state_rebuild_it(feature):
    w = sounds(feature.sr)
    fitted = LogMel(**feature.args).fit_range(w)
    assert torch.equal(LogMel(**fitted.args).encode(w), fitted.encode(w))
    other = LogMel(**feature.args)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.encode(w), fitted.encode(w))


def test_normalisation_has_an_exact_inverse(feature):
    p = feature.mel_power(sounds(feature.sr))
    back = feature.power(feature._scale(p.clone()))
    keep = p > 100 * float(feature.eps)
    assert ((back / p)[keep] - 1).abs().max() < 1e-4  # the rounding of a logarithm of size 36 in single precision
    assert (back >= 0).all()


def test_non_negative_least_squares(feature):
    p = feature.mel_power(sounds(feature.sr)[:, :8000])
    q = nnls_mel(p, feature.basis, 200)
    assert (q >= 0).all() and q.isfinite().all()
    assert (q[:, feature.basis.sum(0) == 0] == 0).all()
    assert mel_error_db(feature.basis @ q, p).max() < 1.
    assert (nnls_mel(0 * p, feature.basis) == 0).all()


def test_perfect_phases_give_the_clip_back():
    w = sounds(22050)
    for n_fft, hop in ((2048, 256), (1024, 300), (512, 512 // 3)):
        X = stft(w, n_fft, hop)
        assert (istft(X, n_fft, hop, w.shape[1]) - w).abs().max() < 1e-5
        assert (griffin_lim(X.abs(), n_fft, hop, n_iter=0, init=X.angle(), n_samples=w.shape[1]) - w).abs().max() < 1e-4


def test_griffin_lim_improves_from_every_start():
    w = sounds(22050)
    mag = stft(w).abs()
    for init in ('peaks', 'random', 'zero'):
        err = [float(spectral_convergence(griffin_lim(mag, n_iter=k, init=init, n_samples=w.shape[1]), mag).mean()) for k in (0, 4, 32)]
        assert err[2] < err[1] < err[0]
    assert err[0] < 1.1 and griffin_lim(0 * mag, n_iter=2).abs().max() == 0


def test_peaks_are_a_better_start_than_chance():
    mag = stft(sounds(22050)[[0, 2, 3]]).abs()
    peaks, chance = (spectral_convergence(griffin_lim(mag, n_iter=16, init=i), mag) for i in ('peaks', 'random'))
    assert (peaks < .85 * chance).all()
    assert peak_phases(mag.mT).abs().max() <= 2 * np.pi


@pytest.mark.skipif(shared_audio() is None, reason='the real recordings are not at hand')
def test_real_notes_survive_the_round_trip():
    from disentangle_nb.audio import load_audio
    files = sorted((shared_audio() / 'notes').rglob('*.flac'))[::9]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        w = torch.stack([torch.nn.functional.pad(torch.as_tensor(load_audio(p, 22050, duration=.6)[0]), (0, 13230))[:13230] for p in files])
    f = make('logmel')
    y = f.decode(f.encode(w), n_samples=13230)
    assert spectral_convergence(y, stft(w).abs()).median() < .15
    assert mel_error_db(f.mel_power(y), f.mel_power(w)).median() < 4.


def test_any_length_can_be_asked_for(feature):
    x = feature.encode(sounds(feature.sr))
    natural = feature.decode(x, n_iter=2)
    short, long = feature.decode(x, n_samples=777, n_iter=2), feature.decode(x, n_samples=2 * feature.sr, n_iter=2)
    assert torch.equal(short, natural[:, :777])
    assert long.shape[1] == 2 * feature.sr and long[:, feature.sr + feature.hop:].abs().max() == 0

"Griffin-Lim in any frame: the published targets on the NSGT, and what each start is worth there."
import math

import pytest, torch

from disentangle_nb.core import shared_audio
from disentangle_nb.features.invert import istft, spectral_convergence, stft
from disentangle_nb.features.phase import begin, convergence_table, frame_griffin_lim, gradient_phases, turns
from disentangle_nb.features.nsgt import NSGT


def made(sr=22050, t=110250):
    "Two notes: a decaying one with 20 partials, a swelling one with vibrato."
    s = torch.arange(t).double()/sr
    def wave(f): return sum((2*math.pi*k*f.cumsum(0)/sr).sin()/k for k in range(1, 20))
    return .1*torch.stack([wave(torch.full_like(s, 196.3))*(-1.5*s).exp(), wave(440 + 4*(2*math.pi*5*s).sin())*(math.pi*s/5).sin()]).float()


def recorded():
    "Two notes of the recordings, five seconds each."
    from disentangle_nb.audio import load_audio
    files = [next((shared_audio()/'notes').glob(p)) for p in ('Trumpet/*_067_*', 'Oboe/*_083_*')]
    wavs = [torch.as_tensor(load_audio(f, 22050)[0]) for f in files]
    return torch.stack([torch.nn.functional.pad(w, (0, 110250))[:110250] for w in wavs])


@pytest.fixture(scope='module', params=['made', 'recorded'])
def notes(request):
    if request.param == 'recorded' and shared_audio() is None: pytest.skip('the recordings are not at hand')
    return made() if request.param == 'made' else recorded()


@pytest.fixture(scope='module')
def frame(): return NSGT()


def consistent(frame, wavs):
    "Magnitudes of real clips, the two outer rows silent."
    mag = frame.analyse(wavs).abs()
    mag[:, [0, -1]] = 0
    return mag


def test_targets_on_the_nsgt(frame, notes):
    t = convergence_table(consistent(frame, notes), frame.analyse, frame.synthesise, {'random': 'random'}, tuple(range(0, 101, 10)))
    plain, fast = (g.set_index('iterations')['spectral convergence'] for _, g in t.groupby('momentum'))
    assert (plain.diff().dropna() < 0).all()
    assert plain[100] < .08 and fast[100] < .06
    assert fast[50] < min(.06, plain[100])


def test_a_start_along_partials_is_worth_more_than_iterations(frame, notes):
    mag = consistent(frame, notes)
    def inside(w): return stft(w, 8192, 1024)[..., 4:-4]
    def judge(w): return spectral_convergence(w, inside(notes).abs(), analyse=inside)
    t = convergence_table(mag, frame.analyse, frame.synthesise, {'random': 'random', 'partials': frame.phases}, (0, 10, 30), (.99,), judge=judge)
    random, along = (t[t.start == k].set_index('iterations') for k in ('random', 'partials'))
    assert along['spectral convergence'][10] < .7*random['spectral convergence'][10]
    assert (along['judged'] < .5*random['judged'][30]).all()


def test_free_rows_are_found(frame, notes):
    mag = frame.analyse(notes[:1]).abs()
    blind = mag.clone()
    blind[:, [0, -1]] = 0
    for rows in ([0, -1], torch.tensor([0, 501])):
        for momentum in (0., .99):
            wav = frame_griffin_lim(blind, frame.analyse, frame.synthesise, 5, momentum, frame.phases, free=rows)
            assert wav.shape == notes[:1].shape and wav.isfinite().all()
            assert spectral_convergence(wav, mag[:, 1:-1], analyse=lambda w: frame.analyse(w)[:, 1:-1]) < .2


def test_pieces_change_nothing():
    mag = stft(made()[:, :8192]).abs()
    def back(m, **kw): return frame_griffin_lim(m, stft, lambda c: istft(c, n_samples=8192), 4, **kw)
    torch.testing.assert_close(back(mag, piece=1), back(mag, piece=2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back(mag[None]), back(mag)[None], atol=1e-5, rtol=1e-4)
    assert back(mag[0]).shape == (8192,)
    phases = torch.rand(mag.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(back(mag, init=phases, piece=1), back(mag, init=lambda m: phases, piece=2), atol=1e-5, rtol=1e-4)


def test_magnitudes_are_left_as_they_were():
    mag, X = stft(made()[:, :8192]).abs(), stft(made()[:, :8192])
    before = mag.clone(), X.clone()
    for momentum in (0., .99): frame_griffin_lim(mag, stft, lambda c: istft(c, n_samples=8192), 3, momentum, X, free=slice(0, 5))
    assert torch.equal(mag, before[0]) and torch.equal(X, before[1])


def test_each_turn_is_a_new_tensor():
    "Whoever keeps an earlier turn must find it unchanged later."
    mag = stft(made()[:1, :8192]).abs()
    for momentum in (0., .99):
        kept = []
        for c, _ in zip(turns(mag, begin(mag), stft, lambda c: istft(c, n_samples=8192), momentum), range(5)): kept.append((c, c.clone()))
        assert all(torch.equal(a, b) for a, b in kept)


def test_phases_of_a_sine_between_two_rows(frame):
    f = float(frame.freqs[100]*.6 + frame.freqs[101]*.4)
    wav = (2*math.pi*round(f*5)/5*torch.arange(110250)/22050).cos()[None]
    mag = frame.analyse(wav).abs()
    wrong = frame_griffin_lim(mag, frame.analyse, frame.synthesise, 0, init='zero')
    right = frame_griffin_lim(mag, frame.analyse, frame.synthesise, 0, init=frame.phases)
    def seen(w): return float(spectral_convergence(w, stft(wav, 8192, 1024).abs(), 8192, 1024))
    assert spectral_convergence(wrong, mag, analyse=frame.analyse) < .05 and seen(wrong) > .2
    assert seen(right) < .1
    assert gradient_phases(0*mag, frame.centre*22050/110250, frame.frame_rate).isfinite().all()

"""Solos through a model that asks for notes: lengths, rests, blocks, tracks from elsewhere, and everything that may be wrong with them."""
import math
import numpy as np, pytest, torch
from disentangle_nb.audio import load_audio, save_audio
from disentangle_nb.features.nsgt import NSGTMel
from disentangle_nb.features.track import PitchTrack, TrackError, clarity, track_pitch
from disentangle_nb.models.move import MoVE
from disentangle_nb.models.system import Disentangler
from disentangle_nb.synthesis.transfer import EditError, Heard, listen, transfer, transfer_file, woven

NAMES = ['Clarinet-Bb', 'Trumpet', 'Violin']


@pytest.fixture(scope='module')
def system():
    torch.manual_seed(0)
    return Disentangler(NSGTMel(125), MoVE(3, 125, pitches=range(55, 80)).eval(), dict(timbre=NAMES, pitch=list(range(55, 80))))


def tone(hz=440., seconds=1., sr=22050):
    t = torch.arange(round(seconds*sr))/sr
    return sum(torch.sin(2*math.pi*k*hz*t)/k for k in (1, 2, 3))*.2


def line(hz=440., seconds=1., step=.01): return PitchTrack(torch.arange(round(seconds/step) + 1)*step, torch.full((round(seconds/step) + 1,), float(hz)))


KNOWN = dict(source='Trumpet', n_iter=2)


@pytest.mark.parametrize('n', [1, 100, 2000, 2713, 22050, 22051])
def test_every_length_comes_back(system, n):
    out = transfer(system, tone(seconds=2.)[:n], 'Violin', track=line(seconds=n/22050), **KNOWN)
    assert out.shape == (n,) and out.isfinite().all()


def test_shorter_than_a_slice_without_being_told_anything(system):
    assert transfer(system, tone()[:900], 'Violin', n_iter=2).shape == (900,)


def test_silence_stays_silence_and_is_named(system):
    with pytest.warns(UserWarning, match='silent'): assert not transfer(system, torch.zeros(9000), 'Violin').any()


def test_tracker_reaches_as_far_as_the_trained_notes():
    "A contrabass's lowest note is below the tracker's usual range, and rates other than 22,050 Hz are rates too."
    torch.manual_seed(0)
    bass = Disentangler(NSGTMel(125), MoVE(3, 125, pitches=range(28, 60)).eval(), dict(timbre=NAMES, pitch=list(range(28, 60))))
    heard = listen(bass, lambda: [(0., tone(41.2, 1.)[None])], 1., source='Trumpet')
    assert abs(heard.tracks[0].midi.nanmedian() - 28) < .3
    bass.sr = bass.feature.sr = 44100
    heard = listen(bass, lambda: [(0., tone(110., 1., 44100)[None])], 1., source='Trumpet')
    assert abs(heard.tracks[0].midi.nanmedian() - 45) < .3


def test_rests_stay_quiet(system):
    wav = torch.cat([tone(440., .5), torch.zeros(11025), tone(392., .5)])
    out = transfer(system, wav, 'Violin', **KNOWN)
    assert out[13000:20000].abs().max() < 1e-3 < out[:11025].abs().max()


def test_noise_and_chords_are_warned_of_but_done(system):
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0))*.1
    for wav in (noise, tone(261.63) + tone(329.63) + tone(392.)):
        with pytest.warns(UserWarning, match='no pitch|one note at a time|outside'): out = transfer(system, wav, 'Violin', **KNOWN)
        assert out.isfinite().all() and out.shape == wav.shape


def test_notes_outside_are_named_and_folded_only_when_asked(system):
    with pytest.warns(UserWarning, match=r'G3 to G5: A5 \(1 s\); they may not'): transfer(system, tone(880.), 'Violin', track=line(880.), **KNOWN)
    with pytest.warns(UserWarning, match='A5 .*moved into it'): transfer(system, tone(880.), 'Violin', track=line(880.), fold=True, **KNOWN)
    with pytest.warns(UserWarning, match='A5'): transfer(system, tone(), 'Violin', track=line(), shift=12, **KNOWN)


def test_unknown_names_are_answered_by_the_list(system):
    for kw in (dict(to='Tuba'), dict(to='Violin', source='Tuba')):
        with pytest.raises(EditError, match='Clarinet-Bb, Trumpet, Violin'): transfer(system, tone(), track=line(), **kw)


def test_a_track_of_another_sound_is_refused_before_anything_is_written(system, tmp_path):
    save_audio(tmp_path/'a.wav', tone(), 22050)
    (tmp_path/'ms.csv').write_text('0,440\n500,440\n1000,440\n')
    (tmp_path/'bad.csv').write_text('time,frequency\n0,440\n.1,high\n')
    for name, said in (('ms.csv', 'milliseconds'), ('bad.csv', 'bad.csv, line 3'), ('none.csv', "can't be read")):
        with pytest.raises(TrackError, match=said): transfer_file(system, tmp_path/'a.wav', tmp_path/'new'/'b.wav', 'Violin', track=tmp_path/name)
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('sr, channels, mono', [(8000, 1, True), (44100, 2, False), (48000, 2, True)])
def test_other_rates_and_channels(system, tmp_path, sr, channels, mono):
    wav = tone(440., 1.3, sr).expand(channels, -1)
    save_audio(tmp_path/'in.wav', wav, sr)
    line(440., 1.3).save(tmp_path/'line.csv')
    out, rate = load_audio(transfer_file(system, tmp_path/'in.wav', tmp_path/'out.flac', 'Violin', mono=mono, track=tmp_path/'line.csv', **KNOWN), mono=False)
    assert rate == sr and out.shape == (1 if mono else channels, wav.shape[1])


def test_blocks_hear_the_same_melody_and_do_not_break_the_level(system):
    wav = torch.cat([tone(440., 1.5), tone(523.25, 1.5)])
    track = PitchTrack(torch.arange(300)*.01, torch.cat([torch.full((150,), 440.), torch.full((150,), 523.25)]))
    whole, parts = (transfer(system, wav, 'Violin', track=track, block=b, overlap=.3, **KNOWN) for b in (60., 1.2))
    level = lambda v: v.unfold(-1, 2205, 2205).square().mean(-1).clamp(min=1e-8).log10()*10
    assert parts.shape == whole.shape and (level(parts) - level(whole)).abs().max() < 3


def test_a_batch_has_a_melody_each(system):
    clips = torch.stack([tone(440., .6), tone(294., .6)])
    both = transfer(system, clips, 'Violin', envelope=False, **KNOWN)
    alone = transfer(system, clips[1], 'Violin', envelope=False, **KNOWN)
    assert (both[1] - alone).abs().mean() < .05*(both[1] - both[0]).abs().mean()  # phases of a batch differ by rounding, most at the onset


def test_dense_decoding_leaves_no_pulse(system):
    """A decoder with a fixed pattern in every slice: it must not come back as a modulation with the slices' rate."""
    class Patterned(MoVE):
        def decode(self, z, timbre, pitch, blocks=False):
            slope = torch.hann_window(16)*torch.linspace(.5, 1, 16)
            return slope.expand(len(z), 125, 16)
    model = Patterned(3, 125, pitches=range(55, 80)).eval()
    odd = Disentangler(NSGTMel(125), model, system.vocabs)
    n = 400
    codes = dict(z=torch.zeros(1, 49, 3), timbre=torch.eye(3)[:1].expand(1, 49, 3), pitch=torch.zeros(1, 49, 21))
    x = woven(odd, codes, Heard([line(440., 10.)]), n)[0, 40, 32:-32]
    assert x.std() < .01


def test_tracks_of_no_points_and_of_one():
    none, one = PitchTrack([], []), PitchTrack([0.], [440.])
    assert none.windows([0, 10], 10, 100).isnan().all() and none.median().held().hz.shape == (0,) and none.outside(50, 60) == {}
    assert torch.allclose(one.windows([0, 1000], 10, 22050), torch.tensor([[69., 69.]]))
    assert 'none with a pitch' in repr(none)


def test_following_stops_for_nothing():
    assert math.isnan(clarity(torch.zeros(10))) and len(track_pitch(torch.ones(10)*.1)) == 1
    with pytest.raises(ValueError, match='samples in it'): track_pitch(torch.zeros(0))
    with pytest.raises(ValueError, match='NaN'): track_pitch(torch.tensor([0., math.nan]*500))


@pytest.mark.parametrize('text, hz', [('0\t440\n1\t0\n', [440, math.nan]), ('0 440 .9\n1 440 .2\n', [440, math.nan]), ('\ufefftime;f0\n0;440\n', [440]),
                                      ('0,440\n1,nan\n', [440, math.nan]), ('Time,Frequency,Confidence\r\n0,440,\r\n', [440])])
def test_dialects_of_tracks(tmp_path, text, hz):
    (tmp_path/'t.csv').write_text(text, encoding='utf-8')
    np.testing.assert_allclose(PitchTrack.read(tmp_path/'t.csv').hz, hz)


@pytest.mark.parametrize('track, text', [(line(440., .2), 'no pitch after 0.2 s'), (PitchTrack([], []), 'no pitch at all'), (PitchTrack([0., .5], [math.nan]*2), 'no pitch at all')])
def test_a_track_of_a_small_part_is_warned_of(system, track, text):
    with pytest.warns(UserWarning, match=text): transfer(system, tone(), 'Violin', track=track, **KNOWN)


def test_a_note_that_is_asked_for_is_in_tune(system):
    """A source a quarter tone off is played in tune when `pitch` says what to play; its vibrato stays."""
    class Told(MoVE):
        def decode(self, z, timbre, pitch, blocks=False):
            x = torch.full((len(z), 125, 16), -1.)
            x[:, 60] = 1.
            return x
    odd = Disentangler(NSGTMel(125), Told(3, 125, pitches=range(55, 80)).eval(), system.vocabs)
    codes = dict(z=torch.zeros(1, 49, 3), timbre=torch.eye(3)[:1].expand(1, 49, 3), pitch=torch.zeros(1, 49, 21))
    heard = Heard([line(440.*2**(.45/12), 10.)])
    rows = lambda **kw: woven(odd, codes, heard, 400, **kw)[0, :, 200]
    assert torch.allclose(rows(pitch=69), torch.full((125,), -1.).index_fill(0, torch.tensor(60), 1.), atol=1e-4)
    assert (rows()[60] - 1).abs() > .1

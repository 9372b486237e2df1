"Training on voices, separating files, and the study: objectives by hand, resume through stages, sums, broken input, musdb and museval."
import json, math, shutil, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from disentangle_nb.audio import AudioError, load_audio, save_audio
from disentangle_nb.core import CardError, shared_audio
from disentangle_nb.data.stems import SongError, make_song, read_songs, song_segments, write_songs
from disentangle_nb.evaluation.separation import song_scores
from disentangle_nb.features.waveform import Waveform
from disentangle_nb.losses.sinkhorn import sinkhorn_penalty
from disentangle_nb.losses.waveform import total_variation
from disentangle_nb.models.cosine import CosineAutoencoder
from disentangle_nb.models.mask import Separator
from disentangle_nb.models.system import Disentangler
from disentangle_nb.studies import voice as study
from disentangle_nb.synthesis import separate as S
from disentangle_nb.synthesis.transfer import spans
from disentangle_nb.training.voice import Apart, MaskLoss, PairLoss, VoiceLoss, mask_dls, mask_learner, voice_dls, voice_learner

rand = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
SIZE = dict(components=16, kernel=64, hop=32, sr=8000)
TINY = dict(songs=(3, 1), dur=(2., 2.), held=.34, sr=8000, components=16, kernel=64, hop=32, epochs=2, bs=4, seconds=.5, piece=1., width=8, inner=8, blocks=2, mask_epochs=2, mask_bs=2, tune_epochs=2)


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DISENTANGLE_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setattr(study, 'player_of', lambda: (None, 'plucked'))
        m.setattr(study, 'write_songs', lambda *a, **kw: write_songs(*a, band='plucked', **kw))
        yield


def separator(bank='stft', sr=8000, seed=0, **kw):
    "A system with a small separator that nobody trained."
    torch.manual_seed(seed)
    args = dict(n_fft=128, hop=32, sr=sr) if bank == 'stft' else SIZE | dict(sr=sr, n_frames=100)
    model = Separator(bank, args, 'tcn', dict(width=8, inner=8, blocks=3), 100).eval()
    return Disentangler(Waveform(sr, 32), model, {})


# --- objectives ----------------------------------------------------------------------------------------------------------

def activations(seed=0): return rand(3, 8, 12, seed=seed).relu()


def test_the_papers_ratio_is_one_for_the_batch_and_ours_one_a_clip():
    x, x_hat = rand(3, 500)*torch.tensor([[1.], [.1], [.01]]), rand(3, 500, seed=1)*.2
    dB = lambda x, y: -10*math.log10(x.double().square().sum()/(x - y).double().square().sum())
    out = dict(x_hat=x_hat, a_mix=activations())
    assert VoiceLoss('none', each=False)(out, x).item() == pytest.approx(dB(x, x_hat), abs=1e-4)
    assert VoiceLoss('none')(out, x).item() == pytest.approx(np.mean([dB(a, b) for a, b in zip(x, x_hat)]), abs=1e-4)


@pytest.mark.parametrize('penalty, how, of', [('tv', {}, total_variation), ('tv', dict(norm='l1'), lambda a: total_variation(a, norm='l1')),
                                             ('sinkhorn', dict(reg=.7, p=1.5, normalise='component'), lambda a: sinkhorn_penalty(a, 1.5, .7, 'component'))])
def test_a_penalty_is_weighed_and_reaches_the_representation(penalty, how, of):
    x, a = rand(3, 500), activations().requires_grad_()
    out = dict(x_hat=rand(3, 500, seed=1), a_mix=a)
    bare, loss = VoiceLoss('none')(out, x), VoiceLoss(penalty, .3, **how)
    total = loss(out, x)
    assert total.item() == pytest.approx(bare.item() + .3*of(a).item(), rel=1e-5)
    assert loss.parts['level'].item() == pytest.approx(a.mean().item()) and loss.parts['zeros'].item() == pytest.approx((a == 0).double().mean().item())
    total.backward()
    assert a.grad.abs().max() > 0
    free = VoiceLoss(penalty, scale_free=True, **how)
    assert free.omega(a).item() == pytest.approx(free.omega(30*a).item(), rel=1e-4)


def pairs(faithful=False, **kw):
    torch.manual_seed(0)
    return PairLoss(8, 4, faithful=faithful, weight=0., **kw)


def test_a_discriminator_that_knows_nothing_is_at_the_logarithm_of_two():
    loss, x = pairs(), rand(5, 400)
    torch.nn.init.zeros_(loss.judge.head[-1].weight)
    loss(dict(x_hat=x + .1, a_voice=activations(1)[[0, 1, 2, 0, 1]], a_mix=torch.cat([activations(2)[[0, 1, 2, 0, 1]]]*2)), x)
    assert loss.parts['pair'].item() == pytest.approx(math.log(2), abs=1e-6)


def test_voices_are_paired_with_others_and_quiet_ones_with_nobody(monkeypatch):
    loss, x, seen = pairs(), rand(5, 400), []
    x[1] *= 1e-6
    monkeypatch.setattr(loss.judge, 'pool', lambda a: a.mean(-1))
    monkeypatch.setattr(loss.judge, 'judge', lambda v, w: (seen.append((v, w)), v.sum(1))[1])
    a = rand(5, 8, 12).abs()
    loss.compare(a, a + 1, x)
    (v, partner), (_, rest) = seen
    keep = [0, 2, 3, 4]
    assert torch.equal(v, a[keep].mean(-1)) and torch.equal(rest, (a + 1)[keep].mean(-1))
    assert torch.equal(partner, v.roll(1, 0)) and (partner != v).any(1).all()
    x[2:4] *= 1e-6
    assert loss.compare(a, a + 1, x).item() == 0 and len(seen) == 2


def songs(n=3, dur=2., **kw): return [make_song(s, dur, 8000, band='plucked', **kw) for s in range(n)]


def batches(**kw): return voice_dls(song_segments(songs(), seconds=.5), song_segments(songs(1, part='test'), seconds=.5), 4, **kw)


def test_the_model_sees_accompaniments_after_mixtures():
    dls = batches()
    noisy, mix, voice = dls.train.one_batch()
    cb = Apart()
    cb.learn = type('L', (), dict(xb=(noisy, mix), yb=(voice,)))()
    cb.before_batch()
    first, both = cb.learn.xb
    assert torch.equal(first, noisy) and torch.equal(both[:len(mix)], mix) and torch.allclose(both[len(mix):] + voice, mix, atol=1e-6)
    assert both[len(mix):].abs().max() > .01


@pytest.mark.parametrize('loss', [VoiceLoss(), VoiceLoss('sinkhorn', reg=.5), PairLoss(16, 4)], ids=['tv', 'sinkhorn', 'pairs'])
def test_every_objective_trains_everything_it_should(loss):
    torch.manual_seed(0)
    model, dls = CosineAutoencoder(**SIZE), batches()
    before = {k: v.clone() for k, v in (model.state_dict() | {f'loss.{k}': v for k, v in loss.state_dict().items()}).items()}
    learn = voice_learner(dls, model, loss, 1e-3)
    learn.fit(2, 1e-3)
    after = model.state_dict() | {f'loss.{k}': v for k, v in loss.state_dict().items()}
    assert all(not torch.equal(v, after[k]) for k, v in before.items()), [k for k, v in before.items() if torch.equal(v, after[k])]
    last = learn.parts.history['valid'][-1]
    assert all(math.isfinite(v) for v in last.values()) and ('pair' in last) == isinstance(loss, PairLoss)


def test_a_separators_ratio_by_hand_and_in_pauses():
    v, m = rand(2, 600), rand(2, 600, seed=1)
    v[1] = 0
    e = 1e-3*m.square().sum(1) + 1e-8
    x_hat = .5*v + .01
    want = (10*torch.log10((v.square().sum(1) + e)/((v - x_hat).square().sum(1) + e))).mean().item()
    out = dict(x_hat=x_hat, mix=m, a_hat=activations(), a_voice=activations(1), a_mix=activations(2))
    loss = MaskLoss()
    l1 = ((out['a_hat'] - out['a_voice']).abs().mean((1, 2))/out['a_mix'].mean((1, 2))).mean().item()
    assert loss(out, v).item() == pytest.approx(-want + .1*l1, abs=1e-4)
    quiet = x_hat.clone().requires_grad_()
    loss.ratio(quiet, v, m).backward()
    assert quiet.grad[1].abs().max() > 0   # a pause teaches, too
    assert torch.isfinite(MaskLoss('si_sdr')(out, v))


def test_frozen_is_frozen_and_tuned_is_not():
    torch.manual_seed(0)
    model = Separator('cosine', SIZE | dict(n_frames=100), 'tcn', dict(width=8, inner=8, blocks=2), 100)
    train, valid = (song_segments(s, seconds=1., loud_db=None) for s in (songs(), songs(1, part='test')))
    dls, bank = mask_dls(train, valid, 2), {k: v.clone() for k, v in model.bank.state_dict().items()}
    mask = {k: v.clone() for k, v in model.mask.state_dict().items() if v.is_floating_point()}
    mask_learner(dls, model.freeze(), monitor=None).fit(1, 1e-3)
    assert all(torch.equal(v, model.bank.state_dict()[k]) for k, v in bank.items())
    assert all(not torch.equal(v, model.mask.state_dict()[k]) for k, v in mask.items())
    mask_learner(dls, model.freeze(False), monitor=None).fit(1, 1e-4)
    assert all(not torch.equal(v, model.bank.state_dict()[k]) for k, v in bank.items())


# --- separating ----------------------------------------------------------------------------------------------------------

def test_joined_linearly_is_overlap_add_with_triangles():
    n, size, k, rng = 1003, 200, 30, np.random.default_rng(0)
    cut = spans(n, size, k)
    pieces = [torch.from_numpy(rng.normal(size=(2, z - a))).float() for a, z in cut]
    total, ramp = np.zeros((2, n)), np.arange(1, k + 1)/(k + 1)
    for i, ((a, z), p) in enumerate(zip(cut, pieces)):
        w = np.ones(z - a)
        if i: w[:k] = ramp
        if i < len(cut) - 1: w[-k:] = 1 - ramp
        total[:, a:z] += w*p.numpy()
    out = torch.cat(list(S.joined(iter(pieces), k, torch.lerp)), -1)
    assert out.shape == (2, n) and np.abs(out.numpy() - total).max() < 1e-5


@pytest.mark.parametrize('bank', ['stft', 'cosine'])
@pytest.mark.parametrize('shape, sr', [((1,), 8000), ((2, 777), 8000), ((40_001,), 8000), ((3, 9000), 11025), ((2, 44100), 44100)])
def test_both_sum_to_the_clip_whatever_it_is(bank, shape, sr):
    x = .3*rand(*shape)
    voice, rest = S.separate(separator(bank), x, sr)
    assert voice.shape == rest.shape == x.shape and (voice + rest - x).abs().max() < 1e-6
    assert voice.isfinite().all() and (shape == (1,) or voice.abs().max() > 0)


def test_silence_stays_silence():
    voice, rest = S.separate(separator(), torch.zeros(2, 20_000))
    assert not voice.any() and not rest.any()


def test_blocks_change_little_and_channels_nothing():
    system, x = separator(), .3*rand(2, 80_000)
    whole = S.separate(system, x)[0]
    cut = S.separate(system, x, block=3., overlap=.5)[0]
    assert (cut - whole).square().sum() < 1e-3*whole.square().sum()
    assert torch.allclose(S.separate(system, x[:1])[0], whole[:1], atol=1e-6)


def test_a_pause_is_not_turned_up():
    "The level is the song's: a quiet block gets the mask it would have in the song."
    system, x = separator(), .3*rand(1, 80_000)
    x[:, 40_000:] *= 1e-3
    cut, whole = S.separate(system, x, block=2., overlap=.25)[0], S.separate(system, x, block=60.)[0]
    end = slice(60_000, 78_000)
    alone = S.separate(system, x[:, end])[0]
    off = [float((v - whole[:, end]).square().sum()/whole[:, end].square().sum()) for v in (cut[:, end], alone)]
    assert off[0] < 5e-4 < 2e-3 < off[1]   # a block has the song's level; on its own the pause would have its own, and another mask


@pytest.mark.parametrize('sr, c, suffix', [(8000, 1, 'wav'), (44100, 2, 'flac'), (48000, 3, 'wav'), (22050, 2, 'ogg')])
def test_files_keep_length_rate_and_channels(tmp_path, sr, c, suffix):
    save_audio(tmp_path/f'song.{suffix}', .3*rand(c, round(1.3*sr)), sr)
    files = S.separate_file(separator(), tmp_path/f'song.{suffix}', tmp_path/'out'/'stems', block=1., overlap=.2)
    x = load_audio(tmp_path/f'song.{suffix}', mono=False)[0]
    (v, rv), (r, rr) = (load_audio(files[k], mono=False) for k in ('vocals', 'accompaniment'))
    assert v.shape == r.shape == x.shape and rv == rr == sr and (v + r - x).abs().max() < 1e-6
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['stems'] and sorted(p.name for p in (tmp_path/'out'/'stems').iterdir()) == ['accompaniment.wav', 'separated.json', 'vocals.wav']


def test_other_peoples_files_are_never_replaced(tmp_path):
    song, system = .3*rand(1, 8000), separator()
    for k in ('vocals', 'accompaniment', 'song'): save_audio(tmp_path/'set'/f'{k}.wav', song, 8000)
    (tmp_path/'set'/'song.wav').rename(tmp_path/'song.wav')
    before = {p: p.read_bytes() for p in (tmp_path/'set').iterdir()}
    for src, says in (('set/vocals.wav', 'lies in'), ('song.wav', "weren't made by separating")):
        with pytest.raises(S.SeparationError, match=says): S.separate_file(system, tmp_path/src, tmp_path/'set')
    (tmp_path/'other').mkdir(), (tmp_path/'other'/'notes.txt').touch()
    with pytest.raises(S.SeparationError, match='holds other files'): S.separate_file(system, tmp_path/'song.wav', tmp_path/'other')
    for _ in range(2): S.separate_file(system, tmp_path/'song.wav', tmp_path/'stems') # its own may be made again
    with pytest.raises(S.SeparationError, match='lies in'): S.separate_file(system, tmp_path/'stems'/'vocals.wav', tmp_path/'stems')
    shutil.copy(tmp_path/'song.wav', tmp_path/'other'/'song.wav')
    with pytest.raises(S.SeparationError, match='stems of another song'): S.separate_file(system, tmp_path/'other'/'song.wav', tmp_path/'stems')
    with pytest.raises(AudioError, match='is a folder'): S.separate_file(system, tmp_path/'set', tmp_path/'new')
    with pytest.raises(S.SeparationError, match='Transpose'): S.separate(system, torch.zeros(8000, 2))
    assert {p: p.read_bytes() for p in (tmp_path/'set').iterdir()} == before


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    import soundfile as sf
    save_audio(tmp_path/'song.wav', .3*rand(1, 8000), 8000)
    def full(self, x): raise sf.LibsndfileError(2)
    monkeypatch.setattr(sf.SoundFile, 'write', full)
    with pytest.raises(AudioError, match='(vocals|accompaniment).wav.*disk full'): S.separate_file(separator(), tmp_path/'song.wav', tmp_path/'a'/'stems')
    assert [p.name for p in tmp_path.iterdir()] == ['song.wav']


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    save_audio(tmp_path/'song.wav', .3*rand(1, 32_000), 8000)
    system, calls = separator(), []
    real = system.model.separate
    def fails(*a):
        calls.append(1)
        if len(calls) > 2: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(system.model, 'separate', fails)
    with pytest.raises(KeyboardInterrupt): S.separate_file(system, tmp_path/'song.wav', tmp_path/'a'/'b', block=1., overlap=.2)
    assert [p.name for p in tmp_path.iterdir()] == ['song.wav']


def test_what_goes_beyond_full_scale_is_kept_and_said(tmp_path):
    x, system = rand(2, 16_000), separator()
    torch.nn.init.constant_(system.model.mask.out.bias, 20.)   # all of it is voice
    save_audio(tmp_path/'song.wav', 1.2*x/x.abs().max(), 8000, subtype='FLOAT')
    with pytest.warns(UserWarning, match='vocals.wav: peak 1.2.*beyond full scale'): files = S.separate_file(system, tmp_path/'song.wav', tmp_path/'stems')
    v, r = (load_audio(f, mono=False)[0] for f in files.values())
    assert (v + r).abs().max() == pytest.approx(1.2, abs=1e-4) and v.abs().max() > 1.19


def test_files_that_cannot_be_separated_are_named(tmp_path, monkeypatch):
    (tmp_path/'text.wav').write_text('Dear diary, today I sang.')
    (tmp_path/'movie.mp4').write_bytes(bytes(1000))
    save_audio(tmp_path/'song.wav', .3*rand(1, 8000), 8000)
    monkeypatch.setenv('PATH', str(tmp_path))
    before = sorted(tmp_path.rglob('*'))
    for name, says in (('text.wav', 'not readable'), ('none.wav', 'no such file'), ('movie.mp4', 'ffmpeg.*apt-get install ffmpeg')):
        with pytest.raises(AudioError, match=says): S.separate_file(separator(), tmp_path/name, tmp_path/'x'/'stems')
    with pytest.raises(S.SeparationError, match='holds other files'): S.separate_file(separator(), tmp_path/'song.wav', tmp_path)
    with pytest.raises(S.SeparationError, match='separates nothing.*timbre'): S.separate_file(Disentangler.load('notes-small', 'cpu'), tmp_path/'song.wav', tmp_path/'stems')
    assert sorted(tmp_path.rglob('*')) == before


needs_ffmpeg = pytest.mark.skipif(not (shutil.which('ffmpeg') and shutil.which('ffprobe')), reason='ffmpeg and ffprobe are not installed')


@needs_ffmpeg
def test_an_mp4_is_read_where_ffmpeg_is(tmp_path):
    import subprocess
    save_audio(tmp_path/'song.wav', .3*rand(2, 44_100), 44100)
    subprocess.run(['ffmpeg', '-v', 'error', '-nostdin', '-i', tmp_path/'song.wav', tmp_path/'song.m4a'], check=True)
    files = S.separate_file(separator(), tmp_path/'song.m4a', tmp_path/'stems')
    v, sr = load_audio(files['vocals'], mono=False)
    assert sr == 44100 and v.shape[0] == 2 and abs(v.shape[1] - 44_100) < 3000   # AAC has frames of its own
    (tmp_path/'noise.mp4').write_bytes(bytes(1000))
    with pytest.raises(AudioError, match="ffmpeg can't decode"): S.separate_file(separator(), tmp_path/'noise.mp4', tmp_path/'other')
    assert not (tmp_path/'other').exists()


@needs_ffmpeg
def test_two_songs_through_musdb_the_separator_and_museval(tmp_path):
    "Their reader, our separator, their evaluation: our scores are theirs."
    pytest.importorskip('musdb'), pytest.importorskip('museval')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import musdb, museval
    write_songs(tmp_path/'set', (1, 2), (2., 2.5), 44100, 2, band='plucked')
    system, db = separator(sr=44100), musdb.DB(str(tmp_path/'set'), is_wav=True, subsets='test')
    assert len(db) == 2
    for track in db:
        voice, rest = S.separate(system, torch.from_numpy(track.audio.T.copy()).float(), track.rate)
        theirs = museval.eval_mus_track(track, dict(vocals=voice.T.numpy(), accompaniment=rest.T.numpy())).scores['targets']
        true = torch.from_numpy(track.targets['vocals'].audio.T.copy()).float()
        ours = song_scores(dict(vocals=voice, accompaniment=rest), true, torch.from_numpy(track.targets['accompaniment'].audio.T.copy()).float(), 44100)
        for target in theirs:
            want = [float(f['metrics']['SDR']) for f in target['frames']]
            got = ours[f"{target['name']} SDR"]
            keep = [i for i, (a, b) in enumerate(zip(want, got)) if math.isfinite(a) and math.isfinite(b)]
            assert keep and [got[i] for i in keep] == pytest.approx([want[i] for i in keep], abs=1e-3)


# --- the study -----------------------------------------------------------------------------------------------------------

def test_the_papers_have_their_parameters():
    count = lambda preset: sum(p.numel() for p in study.random_basis(study.bank_args(study.voice_card(preset, 'paper'))).parameters())
    assert {p: count(p) for p in ('tv', 'cosine', 'conv', 'sinc')} == dict(tv=6_478_400, cosine=4_842_048, conv=6_476_800, sinc=4_843_648)
    card = study.voice_card('tv', 'paper')
    assert (card.sr, card.hop, card.seconds, card.bs, card.epochs, card.lr, card.noise, card.weight) == (44100, 256, 1., 8, 8, 1e-4, 1e-4, .5)


@pytest.mark.parametrize('changes, says', [(dict(preset='opera'), 'preset'), (dict(epochs=0), 'epochs'), (dict(overlap=1.), 'overlap'), (dict(kernel=100, hop=128), 'kernels'), (dict(power=3), 'power'), (dict(songs=(1, 1)), 'two songs'), (dict(remix=2.), 'remix'), (dict(low=-1.), 'low'), (dict(p=3.), 'p lies'), (dict(reg=0.), 'reg'), (dict(weight=-5.), 'weight'), (dict(estimator='lstm', width=33), 'even')])
def test_settings_of_no_use_are_refused(changes, says):
    with pytest.raises(CardError, match=says): study.check_card(study.VoiceCard().replace(**changes))


class Stop(Exception): pass


def stopper(at_stage, epoch):
    from fastai.callback.core import Callback
    class Stopper(Callback):
        order = 90
        def after_epoch(self):
            if getattr(self.learn, 'stage', '') == at_stage and self.epoch == epoch: raise Stop('here')
    return Stopper()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run in one go: card, system, numbers."
    card = study.voice_card('separator', 'quick', **TINY)
    system, data, _ = study.train_study(card, 'cpu')
    return card, system, data


@pytest.mark.parametrize('stage, epoch', [('', 0), ('mask', 0), ('tune', 0)])
def test_a_run_that_was_stopped_in_any_stage_ends_with_the_same_weights(whole, tmp_path, stage, epoch):
    from disentangle_nb.training.resume import Checkpoint
    card, system, data = whole
    keep = lambda resume: Checkpoint(tmp_path/'c', resume=resume, run=card.to_dict())
    with pytest.raises(Stop): study.train_study(card, 'cpu', data, [keep(False), stopper(stage, epoch)])
    again = study.train_study(card, 'cpu', data, [keep(True)])[0]
    for k, v in system.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k


def test_a_run_says_its_numbers(whole, tmp_path):
    card, system, data = whole
    numbers = json.loads(json.dumps(study.evaluate_study(system, data), allow_nan=True))
    rep = numbers['representation']
    assert set(rep) == {'mixture', 'ours', 'untrained', 'STFT'} and rep['STFT']['voice']['median'] > 60
    assert all(len(v) == len(numbers['segments']['voice']) > 0 for v in numbers['segments'].values())
    assert np.median(numbers['segments']['voice']) == pytest.approx(rep['ours']['voice']['median'], abs=1e-3)
    assert len(numbers['separation']['songs']) == 1 and numbers['separation']['mixture']['vocals SI-SDR gain']['median'] == 0
    assert numbers['separation']['STFT oracle']['vocals SI-SDR']['median'] > numbers['separation']['mixture']['vocals SI-SDR']['median'] + 2
    assert 0 <= numbers['pitch']['kernel'] <= 1 and numbers['parameters'] == sum(p.numel() for p in system.model.parameters())
    system.save(tmp_path/'run')
    back = Disentangler.load(tmp_path/'run', 'cpu')
    x = .3*rand(1, 20_000)
    assert torch.equal(S.separate(back, x)[0], S.separate(system, x)[0])
    files = study.study_sounds(system, data, tmp_path/'sounds')
    assert [f.name for f in files] == ['vox_rec_0.wav', 'voice_0.wav', 'rest_0.wav']


@pytest.mark.parametrize('preset', ['pairs', 'sinkhorn_large', 'stft', 'random', 'scratch'])
def test_every_row_runs_to_numbers(preset):
    result = study.run_study(study.voice_card(preset, 'quick', **TINY | dict(epochs=1, mask_epochs=1)), 'cpu')
    assert json.dumps(result) and result['parameters'] > 0
    assert ('separation' in result) == (preset in ('stft', 'random', 'scratch')) and ('embedded' in result.get('representation', {})) == (preset == 'pairs')
    assert ('representation' in result) == (preset != 'stft')


def test_the_faithful_way_and_ours_differ_where_they_should():
    data = study.study_data(study.voice_card('tv', 'quick', **TINY))
    learn = {f: study.study_learner(study.voice_card('tv', 'quick', **TINY, faithful=f), data) for f in (True, False)}
    assert [learn[f].dls.train.zero_mean for f in (True, False)] == ['batch', 'segment'] and [learn[f].loss_func.each for f in (True, False)] == [False, True]
    assert (learn[True].dls.train.data.song < 0).any() and (learn[False].dls.train.data.song >= 0).all()


def test_songs_are_divided_once_and_short_ones_named():
    card = study.voice_card('separator', 'quick', **TINY)
    data = study.study_data(card)
    assert data.table.split.value_counts().to_dict() == dict(train=2, valid=1, test=1) and data.judged() == 'test' and data.judged('valid') == 'valid'
    assert study.study_data(card.replace(seed=7)).table.split.tolist() == data.table.split.tolist()
    with pytest.raises(SongError, match='less than a segment of 3 s.*piece'): study.study_data(card.replace(piece=3.))
    with pytest.raises(SongError, match='less than a segment of 4 s.*seconds'): study.study_data(card.replace(seconds=4.))


def test_a_tone_is_read_by_kernels_and_by_carriers():
    "A bank whose kernels are what they say: both readings find the pitch, and only one after the carriers are lost."
    sr, n = 8000, 512
    class Bank:
        def __init__(self): self.sr, self.hop, self.hz = sr, 128, torch.arange(n//2)*sr/n
        def basis(self): return torch.cos(2*math.pi*self.hz[:, None]*torch.arange(n)/sr)*torch.hann_window(n)
        def carriers_hz(self): return self.hz
        def encode(self, x): return torch.stft(x, n, 128, window=torch.hann_window(n), return_complex=True).abs()[:, :-1]
    t, bank = torch.arange(sr)/sr, Bank()
    tone = sum(torch.sin(2*math.pi*250*h*t)/h for h in range(1, 9))
    near = lambda by: ((study.read_pitch(bank, tone, by)[5:-5]/250).log2().abs() < 1/24).double().mean().item()
    assert near('kernel') > .95 and near('carrier') > .95
    bank.carriers_hz = lambda: bank.hz.flip(0)
    assert near('kernel') > .95 and near('carrier') < .5


def test_aims_say_missed_when_one_seed_misses():
    def run(preset, seed, voice, **kw):
        m = lambda **v: {k: dict(median=x) for k, x in v.items()}
        return dict(card=dict(preset=preset, seed=seed), result=dict(representation=dict(ours=m(voice=voice, mixture=11., masked=6., additivity=kw.get('e', .3)), untrained=m(voice=-40.), mixture=m(masked=1.), STFT=m(masked=9.))))
    frame = study.study_frame([run('tv', 0, 16.), run('tv', 1, 14.5), run('cosine', 0, 3.), run('cosine', 1, 4.), run('sinkhorn_large', 0, 9., e=.2), run('sinkhorn_large', 1, 9., e=.1)])
    table = study.aims_table(frame)
    assert table.verdict['voice comes back, dB'] == 'missed' and table.worst['voice comes back, dB'] == 14.5
    assert table.verdict['mixture comes back, dB'] == 'reached' and table.verdict['envelopes of their own against one for all, dB'] == 'reached'
    assert table['mean']['additivity error: tv minus Sinkhorn with a large r'] == pytest.approx(.15) and table.verdict['informed mask against the STFT, dB'] == ''
    assert table.seeds['separator: gain, dB'] == 0 and table.verdict['separator: gain, dB'] == ''
    assert study.three_columns(frame)['ours, songs made here']['voice'] == pytest.approx(15.25)


def test_recorded_runs_hold_their_cards():
    for run in study.study_results(): study.VoiceCard.from_dict(run['card'])
    names = [(c.preset, c.seed) for c in study.study_grid()]
    assert len(set(names)) == len(names) == 3*len(study.PRESETS)


# --- commands ------------------------------------------------------------------------------------------------------------

SET = [w for k, v in TINY.items() for w in ('--set', f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}")]


def test_train_eval_and_separate_from_the_terminal(tmp_path, monkeypatch, capsys):
    from disentangle_nb import cli
    monkeypatch.chdir(tmp_path)
    assert cli.train(['voice', '--profile', 'quick', '--out', 'run', *SET]) == 0, capsys.readouterr().err
    assert {p.name for p in Path('run').iterdir()} == {'card.json', 'weights.safetensors', 'run.json', 'result.json', 'log.csv', 'log-mask.csv', 'log-tune.csv'}
    told = capsys.readouterr()
    assert 'Separated' in told.out and 'tune epoch 2/2' in told.err and 'parameters' in told.out
    heads = [line.split('  ') for line in told.out.splitlines() if line.startswith(('Medians', 'Separated'))]
    assert [[w.strip() for w in h if w][1:] for h in heads] == [['here', 'untrained', 'STFT'], ['here', 'mixture', 'oracle', 'STFT oracle']]
    for s in range(2):
        song = make_song(50 + s, 2., 11025, channels=2, band='plucked')
        save_audio(f'stems/song {s}/vocals.wav', song['vocals'], 11025); save_audio(f'stems/song {s}/accompaniment.wav', song.rest, 11025)
    save_audio('song.wav', song.mixture, 11025)
    assert cli.evaluate(['run', '--data', 'stems', '--json', 'n.json', '--figures', 'pictures']) == 0, capsys.readouterr().err
    assert len(json.loads(Path('n.json').read_text())['separation']['songs']) == 2 and (tmp_path/'pictures'/'carriers.png').is_file()
    assert cli.separate(['run', 'song.wav']) == 0
    v, r = (load_audio(tmp_path/'out'/'song'/f'{k}.wav', mono=False)[0] for k in ('vocals', 'accompaniment'))
    assert (v + r - load_audio('song.wav', mono=False)[0]).abs().max() < 1e-6
    before = sorted(tmp_path.rglob('*'))
    capsys.readouterr()
    for args in (['run', 'none.wav'], ['run', 'song.wav', '--out', 'stems'], ['run', 'song.wav', '--block', '1'], ['notes-small', 'song.wav'], ['nowhere', 'song.wav']):
        assert cli.separate(args) == 2 and capsys.readouterr().err.count('error:') == 1
    assert sorted(tmp_path.rglob('*')) == before


def test_pairs_from_the_terminal_are_examined_as_by_the_study(tmp_path, monkeypatch, capsys):
    from disentangle_nb import cli
    monkeypatch.chdir(tmp_path)
    assert cli.train(['voice', '--profile', 'quick', '--out', 'run', *SET, '--set', 'preset=pairs']) == 0, capsys.readouterr().err
    heard = json.loads(Path('run/result.json').read_text())['representation']
    expected = study.run_study(study.voice_card('pairs', 'quick', **TINY), 'cpu')['representation']
    assert set(heard) == {'ours', 'embedded', 'untrained', 'STFT', 'mixture'} and heard['embedded'] == expected['embedded'] != heard['ours']
    assert 'here     embedded    untrained' in capsys.readouterr().out


def broken(at):
    "Folders that can't be trained on, and what is said of them."
    good = make_song(1, 2., 8000, band='plucked')
    for i in range(3):
        for k in ('vocals', 'accompaniment'): save_audio(at/'length'/f's{i}'/f'{k}.wav', good['vocals'][:, :8000 if k == 'vocals' else 9000], 8000)
        for k in ('vocals', 'accompaniment'): save_audio(at/'rate'/f's{i}'/f'{k}.wav', good['vocals'], 8000 if k == 'vocals' else 11025)
        for k in ('vocals', 'accompaniment'): save_audio(at/'channels'/f's{i}'/f'{k}.wav', good['vocals'].expand(1 if k == 'vocals' else 2, -1), 8000)
        save_audio(at/'missing'/f's{i}'/'vocals.wav', good['vocals'], 8000)
        for k in ('vocals', 'accompaniment'): save_audio(at/'short'/f's{i}'/f'{k}.wav', good['vocals'][:, :2000], 8000)
        for k in ('vocals', 'accompaniment'): save_audio(at/'silent'/f's{i}'/f'{k}.wav', good.rest*(k != 'vocals'), 8000)
    for i in range(3):
        for split in ('train', 'valid', 'test'):
            for k in ('vocals', 'accompaniment'): save_audio(at/'mute'/split/f's{i}'/f'{k}.wav', good.rest*(k != 'vocals') if split == 'test' else good['vocals'], 8000)
    (at/'empty').mkdir()
    return dict(mute='silent', length='length', rate='rate', channels='channels', missing='mixture or accompaniment', short='less than a segment', silent='silent', empty='no song', absent='no such folder')


def test_folders_that_cannot_be_trained_on_cost_a_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    from disentangle_nb import cli
    says = broken(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    for folder, words in says.items():
        assert cli.train(['voice', '--profile', 'quick', '--data', folder, '--out', 'run', *SET]) == 2, folder
        lines = [l for l in capsys.readouterr().err.splitlines() if 'error:' in l]
        assert len(lines) == 1 and words in lines[0], (folder, lines)
    assert cli.train(['voice', '--profile', 'quick', '--data', 'silent', '--out', 'run', *SET, '--set', 'preset=stft']) == 2
    assert 'silent' in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before


def test_the_real_stems_are_scored():
    at = shared_audio()
    if at is None: pytest.skip('no real recordings here: set DISENTANGLE_AUDIO')
    numbers = study.recordings_study(separator(sr=8000))
    assert len(numbers['songs']) == len(read_songs(at/'stems')) == 2
    assert numbers['STFT oracle']['vocals SI-SDR gain']['median'] > 8

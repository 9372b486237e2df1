"""Songs in stems: the pitch against the house's tracker, exact sums, the real musdb package, broken folders, segments, batches."""
import os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from disentangle_nb.audio import load_audio, save_audio
from disentangle_nb.data import stems
from disentangle_nb.data.stems import (DenoiseLoader, MixLoader, Song, SongError, band_events, load_f0, load_song, make_song, plan_song, read_songs,
                                       segments, slower, song_segments, write_song, write_songs)
from disentangle_nb.data.voice import SINGERS, TEST_SINGERS, TRAIN_SINGERS, compose, sing, stream

SR = 16000


@pytest.fixture(scope='module')
def songs(tmp_path_factory):
    root = tmp_path_factory.mktemp('songs')/'set'
    return write_songs(root, (5, 2), (4., 3.), band='plucked')


@pytest.mark.parametrize('name', SINGERS)
def test_the_pitch_that_comes_with_a_voice_is_the_one_that_is_heard(name):
    from disentangle_nb.features.descriptors import track_f0
    melody = compose(stream(5, 'tune'), name, 6.)
    wav, f0 = sing(melody, 6., SR, name, 5)
    heard, unsure = track_f0(wav, SR, fmin=80, fmax=1000, frame=1024, hop=160)
    at = (np.arange(heard.shape[1])*160 + 512)/SR
    known = f0[np.minimum(np.round(at*100).astype(int), len(f0) - 1)]
    use = ~np.isnan(known) & (unsure[0].numpy() < .3)
    cents = np.abs(1200*np.log2(heard[0].numpy()[use]/known[use]))
    assert use.sum() > .9*(~np.isnan(known)).sum()
    assert np.median(cents) < 6 and (cents > 50).mean() < .03 # measured 1.4-3.8 and .002-.012; the rest are glides
    midi = 12*np.log2(known[use]/440) + 69
    assert SINGERS[name].low - 1.5 <= midi.min() and midi.max() <= SINGERS[name].high + 1.5


def test_a_voice_is_silent_where_it_has_no_pitch_and_no_consonant():
    melody = compose(stream(2, 'tune'), 'alto', 6.)._replace()
    tied = melody._replace(onset=np.full_like(melody.onset, -1))
    wav, f0 = sing(tied, 6., SR, 'alto', 2)
    level = wav.unfold(0, 160, 160).square().mean(1).sqrt()
    quiet = torch.from_numpy(np.isnan(f0))[:len(level)]
    inside = quiet & quiet.roll(8) & quiet.roll(-8) # rooms ring for some 50 ms
    assert inside.sum() > 40 and level[inside].max() < 10**(-50/20)*level.max()


def test_vibrato_stays_within_sixty_cents_at_five_to_six_and_a_half_hertz():
    from disentangle_nb.data.voice import CONTROL, Melody, pitch_curve
    one = Melody(*(np.array([v]) for v in (0., 4., 60., 0, -1, .5)))
    for s in SINGERS.values():
        hz = pitch_curve(one, s, 4*CONTROL, stream(0, s.name))[CONTROL:]
        cents = 1200*np.log2(hz/np.median(hz))
        assert np.abs(cents).max() < 60 + 35, s # vibrato, drift (8) and jitter (3)
        if s.depth < 20: continue
        power = np.abs(np.fft.rfft((cents - cents.mean())*np.hanning(len(cents)), 8192))**2
        assert 4.6 < np.fft.rfftfreq(8192, 1/CONTROL)[power.argmax()] < 6.9, s


@pytest.mark.parametrize('sr, channels', [(16000, 1), (44100, 2)])
def test_stems_sum_to_the_mixture_bit_by_bit_in_memory_and_on_disk(tmp_path, sr, channels):
    song = make_song(3, 2., sr, channels=channels, band='plucked')
    total = song['drums'] + song['other'] + song['vocals'] + song['bass']
    assert torch.equal(total, song.mixture) and .49 < max(float(x.abs().max()) for x in (song.mixture, *song.values())) <= .501
    write_song(tmp_path/'song', song)
    back = {k: load_audio(tmp_path/'song'/f'{k}.wav', mono=False)[0] for k in ('bass', 'drums', 'other', 'vocals', 'mixture')}
    assert torch.equal(back.pop('mixture'), sum(back.values())) and all(torch.equal(back[k], song[k]) for k in back)
    row = read_songs(tmp_path).iloc[0]
    for kw in ({}, dict(sr=22050), dict(mono=False), dict(offset=.5, duration=1., sr=8000)):
        mix, voice, rest = load_song(row, **kw)
        assert torch.equal(mix, voice + rest)


def test_the_same_seed_is_the_same_song_in_another_process_and_other_seeds_are_others():
    code = ("import hashlib; from disentangle_nb.data.stems import make_song\n"
            "print(hashlib.sha256(make_song(7, 2., band='plucked').mixture.numpy().tobytes()).hexdigest())")
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout.strip()
    import hashlib
    assert out == hashlib.sha256(make_song(7, 2., band='plucked').mixture.numpy().tobytes()).hexdigest()
    assert not torch.equal(make_song(8, 2., band='plucked').mixture, make_song(7, 2., band='plucked').mixture)


def test_training_and_test_share_no_singer_and_no_recording():
    assert not set(TRAIN_SINGERS) & set(TEST_SINGERS)
    try: font = stems.SoundFont()
    except stems.SoundFontError as e: pytest.skip(str(e))
    heard = dict(train=set(), test=set())
    for part in heard:
        for seed in range(40):
            for e in sum(band_events(stream(seed, 'band', part), plan_song(stream(seed, 'plan', part)), 8., part).values(), []):
                heard[part] |= set(font.zone_id(e[0], e[3], e[4], 128 if len(e) == 6 else 0).split('+')) - {''}
    assert min(map(len, heard.values())) > 15 and not heard['train'] & heard['test']


def test_ratio_pauses_and_tempo_are_what_they_say(songs):
    for seed in range(6):
        s = make_song(seed, 10., band='plucked')
        assert abs(float(10*torch.log10(s['vocals'].square().sum()/s.rest.square().sum())) - s.ratio) < .05 and -6 <= s.ratio <= 3
        assert .25 <= 1 - s.melody.length.sum()/10 <= .35 and 80 <= s.plan.bpm <= 140


def test_a_set_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    made = []
    def spied(seed, *a, **kw):
        made.append(seed)
        if len(made) == 3: raise KeyboardInterrupt
        return make_song(seed, *a, **kw)
    monkeypatch.setattr(stems, 'make_song', spied)
    with pytest.raises(KeyboardInterrupt): write_songs(tmp_path/'s', (3, 1), (2., 2.), band='plucked')
    assert len(read_songs(tmp_path/'s')) == 2 and not [p for p in (tmp_path/'s').rglob('*') if '.part' in p.name]
    table = write_songs(tmp_path/'s', (3, 1), (2., 2.), band='plucked')
    assert made == [0, 1, 2, 2, 100000] and len(table) == 4
    once = write_songs(tmp_path/'t', (3, 1), (2., 2.), band='plucked')
    for a, b in zip(table.itertuples(), once.itertuples()): assert Path(a.mixture).read_bytes() == Path(b.mixture).read_bytes()
    with pytest.raises(SongError, match='other settings'): write_songs(tmp_path/'s', (3, 1), (2., 2.), seed=1, band='plucked')


def test_a_song_that_another_process_has_just_made_is_taken(tmp_path, monkeypatch):
    def beaten(folder, song):
        write_song(folder, song)
        raise OSError(39, 'Directory not empty')
    monkeypatch.setattr(stems, 'write_song', beaten)
    assert len(write_songs(tmp_path, (1, 1), (1., 1.), 8000, band='plucked')) == 2
    assert not list(tmp_path.rglob('.*'))


def test_a_song_whose_writing_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(path, *a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(stems, 'save_audio', fails)
    with pytest.raises(OSError, match='disk full'): write_song(tmp_path/'song', make_song(0, 2., band='plucked'))
    assert not [*tmp_path.iterdir()]


def copy(songs, to, edit=lambda d: None):
    shutil.copytree(songs.folder[0], to)
    edit(to)
    return to.parent


def put(name, *shape, sr=SR): return lambda d: save_audio(d/name, .1*torch.randn(*shape), sr)


@pytest.mark.parametrize('edit, says', [
    (put('vocals.wav', 999), 'differ in length'), (put('vocals.wav', 64000, sr=22050), 'differ in rate'), (put('bass.wav', 2, 64000), 'differ in channels'),
    (lambda d: (d/'vocals.wav').unlink(), 'needs vocals'), (lambda d: (d/'mixture.wav').unlink(), 'mixture or accompaniment'),
    (lambda d: (d/'vocals.wav').write_bytes(b'junk'), 'not readable'), (lambda d: (d/'vocals.wav').write_bytes(b''), 'not readable')])
def test_a_song_that_cannot_be_used_is_named(songs, tmp_path, edit, says):
    root = copy(songs, tmp_path/'set'/'My song', edit)
    with pytest.raises(SongError, match=says) as e: read_songs(root)
    assert 'My song' in str(e.value)


def test_one_bad_song_among_many_is_left_out_with_a_warning(songs, tmp_path):
    for i in range(11): copy(songs, tmp_path/'set'/f'{i:02d}')
    (tmp_path/'set'/'05'/'vocals.wav').unlink()
    with pytest.warns(UserWarning, match='left out 1 songs.*05'): table = read_songs(tmp_path/'set')
    assert len(table) == 10 and '05' not in set(table.song)


def test_folders_without_songs(tmp_path):
    with pytest.raises(SongError, match='no such folder'): read_songs(tmp_path/'x')
    with pytest.raises(SongError, match='no song in it'): read_songs(tmp_path)
    (tmp_path/'train').mkdir()
    with pytest.raises(SongError, match='no song in it'): read_songs(tmp_path)


@pytest.mark.parametrize('suffix', ['flac', 'ogg', 'aiff'])
def test_plain_folders_in_any_format(tmp_path, suffix):
    x = .1*torch.randn(2, 2, 8000)
    save_audio(tmp_path/'a'/f'vocals.{suffix}', x[0], SR); save_audio(tmp_path/'a'/f'accompaniment.{suffix}', x[1], SR)
    save_audio(tmp_path/'b'/f'Vocals.{suffix}', x[0], SR); save_audio(tmp_path/'b'/f'mixture.{suffix}', x.sum(0), SR)
    (tmp_path/'b'/'vocals.json').write_text('{}')
    table = read_songs(tmp_path)
    assert table.layout.tolist() == ['accompaniment', 'mixture'] and table.split.tolist() == ['', '']
    for row in table.itertuples():
        mix, voice, rest = load_song(row)
        assert torch.equal(mix, voice + rest) and len(mix) == 8000
        if suffix == 'flac': assert (voice - x[0].mean(0)).abs().max() < 1e-4 and (rest - x[1].mean(0)).abs().max() < 2e-4
    assert len(read_songs(tmp_path/'a')) == 1 # a song's own folder
    with pytest.raises(SongError, match='f0.csv'): load_f0(table.iloc[0])


def test_mono_files_keep_their_level(tmp_path):
    x = .5*torch.sin(torch.arange(8000)/5)
    for k in ('vocals', 'accompaniment'): save_audio(tmp_path/'a'/f'{k}.wav', x, SR, 'FLOAT')
    assert torch.equal(load_song(read_songs(tmp_path).iloc[0])[1], x)


def test_an_mp4_without_ffmpeg_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path/'train').mkdir()
    (tmp_path/'train'/'A - B.stem.mp4').write_bytes(bytes(100))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(SongError, match='ffmpeg.*Install ffmpeg.*MUSDB18-HQ'): read_songs(tmp_path)


def musdb_here():
    if not shutil.which('ffmpeg') or not shutil.which('ffprobe'): pytest.skip('no ffmpeg here')
    pytest.importorskip('musdb')


def test_the_real_musdb_package_reads_what_we_write(tmp_path):
    musdb_here()
    import musdb
    table = write_songs(tmp_path/'m', (1, 1), (2., 2.), 44100, 2, band='plucked')
    db = musdb.DB(root=str(tmp_path/'m'), is_wav=True)
    assert [t.name for t in db] == table.song.tolist() and {t.subset for t in db} == {'train', 'test'}
    for track, row in zip(db, table.itertuples()):
        mix, voice, rest = load_song(row, mono=False)
        for ours, theirs in ((mix, track.audio), (voice, track.targets['vocals'].audio), (rest, track.targets['accompaniment'].audio)):
            assert theirs.shape == (88200, 2) and np.abs(ours.numpy().T - theirs).max() < 1e-4 # its decoder rounds on its own
    assert len(stems.open_musdb(tmp_path/'m', 'train', is_wav=True)) == 1


def test_compressed_stems_are_read_through_musdb(tmp_path):
    musdb_here()
    import stempeg
    song = make_song(1, 3., 44100, channels=2, band='plucked')
    order = [song.mixture, song['drums'], song['bass'], song['other'], song['vocals']]
    (tmp_path/'set'/'train').mkdir(parents=True)
    stempeg.write_stems(str(tmp_path/'set'/'train'/'A - B.stem.mp4'), np.stack([x.numpy().T for x in order]), 44100, writer=stempeg.StreamsWriter())
    table = read_songs(tmp_path/'set')
    assert table[['song', 'split', 'layout', 'sr', 'channels']].values.tolist() == [['A - B', 'train', 'stem.mp4', 44100, 2]]
    mix, voice, rest = load_song(table.iloc[0])
    assert torch.equal(mix, voice + rest) and abs(table.seconds[0] - 3) < .1
    def like(a, b): return float((a*b).sum()/(a.norm()*b.norm()))
    n = min(len(voice), 3*44100)
    assert like(voice[:n], song['vocals'].mean(0)[:n]) > .98 and like(rest[:n], song.rest.mean(0)[:n]) > .98 # AAC
    part = load_song(table.iloc[0], 16000, offset=1., duration=1.)[0]
    assert abs(len(part) - 16000) <= 16
    held = load_song(table.assign(split='valid').iloc[0])[1] # held out of training, it lies where it lay
    assert torch.equal(held, voice)
    flat = tmp_path/'flat'
    flat.mkdir(), shutil.copy(tmp_path/'set'/'train'/'A - B.stem.mp4', flat)
    assert torch.equal(load_song(read_songs(flat).replace(dict(split={'': 'train'})).iloc[0])[1], voice)
    (flat/'A - B.stem.mp4').unlink(), stems._musdb.cache_clear()
    with pytest.raises(SongError, match='gone'): load_song(table.assign(folder=str(flat), vocals=str(flat/'A - B.stem.mp4')).iloc[0])


def test_segments_of_the_papers():
    x = torch.rand(441000) + .1
    assert [(len(r), int((r == 0).all(1).sum())) for r in (segments(x, faithful=True), segments(x, overlap=0, faithful=True, bs=1))] == [(24, 4), (12, 2)]
    for t in (441001, 440999, 50000, 44100): # against the rule written out
        R = 22050
        y = torch.cat([x, x])[:t]
        y = torch.cat([y, torch.zeros(R - len(y) % R)])
        rows = [y[a:a + 44100] for a in range(0, len(y) - 44100 + 1, R)]
        rows += [torch.zeros(44100)]*(8 - len(rows) % 8)
        assert torch.equal(segments(torch.cat([x, x])[:t], faithful=True), torch.stack(rows))


def test_segments_of_ours_cover_every_sample_and_add_none():
    for t in (8, 9, 11, 20, 31):
        for overlap in (0, 3, 7):
            rows = segments(torch.arange(t) + 1., 8, overlap)
            assert set(rows.flatten().int().tolist()) == set(range(1, t + 1)) and (rows.diff(dim=1) == 1).all()
    for bad in ((7, 8, 0), (20, 8, 8), (20, 8, -1)):
        with pytest.raises(SongError): segments(torch.zeros(bad[0]), *bad[1:])


def test_segments_of_a_set_stay_within_songs_and_follow_the_rule_on_silence(songs):
    train = songs[songs.split == 'train']
    every, loud = song_segments(train, seconds=.5, loud_db=None), song_segments(train, seconds=.5)
    clips = [load_song(r) for r in train.itertuples()]
    v, r = every.rows()
    for i, (_, voice, rest) in enumerate(clips):
        assert torch.equal(v[every.song == i], segments(voice, 8000, 4000)) and torch.equal(r[every.song == i], segments(rest, 8000, 4000))
    rms = v.square().mean(1).sqrt()
    assert torch.equal(loud.rows()[0], v[rms >= 10**(stems.LOUD_DB/20)]) and len(loud) < len(every)
    other_rate = song_segments(train, 8000, .5, loud_db=None)
    assert (other_rate.n, other_rate.sr, len(other_rate)) == (4000, 8000, len(every))
    from_memory = song_segments([make_song(i, 4., band='plucked') for i in range(5)], seconds=.5, loud_db=None)
    assert torch.equal(from_memory.rows()[0], v) and torch.equal(from_memory.rows()[1], r)


def test_the_papers_rule_on_silence_is_a_norm_of_a_tenth_in_a_second():
    known, one = make_song(0, 2., band='plucked').known, torch.ones(1, 44100)/210 # norm 1
    song = Song(dict(vocals=torch.cat([one*.099, one*.101, one*.099], 1), **{k: torch.zeros(1, 3*44100) for k in ('bass', 'drums', 'other')}), **known | dict(sr=44100))
    assert song_segments([song], overlap=0.).starts.tolist() == [44100]
    assert len(song_segments([song], overlap=0., loud_db=None)) == 3


def test_silent_vocals_and_short_songs_are_named(songs):
    song = make_song(0, 2., band='plucked')
    mute = Song(dict(song, vocals=torch.zeros_like(song['vocals'])), **song.known)
    with pytest.warns(UserWarning, match='song 1: its vocals are silent'): data = song_segments([song, mute])
    assert set(data.song.tolist()) == {0}
    with pytest.warns(UserWarning), pytest.raises(SongError, match='silent'): song_segments([mute])
    with pytest.raises(SongError, match='song 0 lasts 2.00 s, less than a segment of 3.00 s'): song_segments([song], seconds=3.)
    with pytest.raises(SongError, match='one rate'): song_segments([song, make_song(0, 2., 22050, band='plucked')])
    with pytest.raises(SongError, match='one rate'): song_segments([])


def test_faithful_batches_stay_within_their_set_and_remove_one_mean(songs):
    data = song_segments(songs, seconds=.5, faithful=True, set_size=3)
    loader = DenoiseLoader(data, 8, shuffle=True, noise=0.)
    v, r = data.rows()
    sets = [data.group[a:a + 8].unique().tolist() for a in range(0, len(data), 8)]
    assert all(len(s) == 1 for s in sets) and sum(sets, []) == sorted(sum(sets, [])) and len(data) % 8 == 0
    order, other = loader.order(0), loader.permuted('rest', 0)
    for p in (order, other): assert torch.equal(data.group[p], data.group) and p.sort().values.equal(torch.arange(len(data)))
    for i, (x, mix, voice) in enumerate(loader):
        at = slice(8*i, 8*i + 8)
        m = v[order[at]] + r[other[at]]
        assert torch.equal(x, voice) and torch.allclose(voice, v[order[at]] - v[order[at]].mean()) and torch.allclose(mix, m - m.mean())
    assert not torch.equal(order, other)


def test_an_epoch_is_known_by_its_number_and_validation_never_changes(songs):
    data = song_segments(songs, seconds=.5, loud_db=None)
    for make in (DenoiseLoader, MixLoader):
        a, b = make(data, 8, shuffle=True, seed=4), make(data, 8, shuffle=True, seed=4)
        epochs = [[*a] for _ in range(3)]
        b.epoch = 2
        for x, y in zip(epochs[2], [*b]): assert all(torch.equal(p, q) for p, q in zip(x, y))
        assert not torch.equal(a.order(0), a.order(1)) and not torch.equal(a.permuted('rest', 0), a.permuted('rest', 1))
        valid = a.new(shuffle=False)
        for x, y in zip([*valid], [*valid]): assert all(torch.equal(p, q) for p, q in zip(x, y))
        assert type(valid) is make and len(valid) == len(a) and len(a.new(bs=4)) > len(a)


def test_some_voices_go_lower_and_say_so_by_octaves(songs):
    data = song_segments(songs[songs.split == 'train'])
    seen = torch.cat([b[2] for b in DenoiseLoader(data, 8, shuffle=True, seed=3)])
    low = DenoiseLoader(data, 8, shuffle=True, seed=3, low=.6)
    made = torch.cat([b[2] for b in low])
    power = lambda x: torch.fft.rfft(x).abs().square()
    median = lambda x: (power(x).cumsum(-1) < .5*power(x).sum(-1, keepdim=True)).sum(-1).float()
    same, one, two = ((made - x + x.mean(-1, keepdim=True)).abs().amax(1) < 1e-5 for x in (seen, slower(seen), slower(seen, 2)))
    assert (same | one | two).all() and same.any() and one.any() and two.any() and made.square().mean(1).min() > 1e-7 # none is silent
    assert median(made[two]).median() < .5*median(seen).median()
    low.epoch = 0
    assert torch.equal(torch.cat([b[2] for b in low]), made)
    assert torch.equal(next(iter(DenoiseLoader(data, 8, low=.6)))[2], next(iter(DenoiseLoader(data, 8)))[2])
    x, u = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([[.2], [.5], [.9]])
    assert torch.allclose(low.lowered(x, u), torch.cat([slower(x[:1]), slower(x[1:2], 2), x[2:]]))
    rest = torch.cat([torch.zeros(3, 8), x[:, :8]], 1)
    assert torch.equal(low.lowered(rest, u), rest) # what is left of it would be silence
    with pytest.raises(SongError, match='share'): DenoiseLoader(data, low=1.5)


def test_gains_and_remixing(songs):
    data = song_segments(songs, seconds=.5, loud_db=None)
    v, r = data.rows()
    loader = MixLoader(data, 8, shuffle=True, remix=.5)
    order, at, apart, gains = loader.order(0), 0, 0, []
    for mix, voice in loader:
        clean, own = v[order[at:at + len(mix)]], r[order[at:at + len(mix)]]
        g = (voice*clean).sum(1)/clean.square().sum(1).clamp(min=1e-9)
        assert torch.allclose(voice, g[:, None]*clean, atol=1e-6)
        gains += g[clean.square().mean(1) > 1e-5].tolist()
        like = torch.nn.functional.cosine_similarity(mix - voice, own)
        apart += int((like < .9).sum()); at += len(mix)
    assert min(gains) >= .249 and max(gains) <= 1.251 and np.std(gains) > .2
    assert .3 < apart/len(data) < .7
    plain = MixLoader(data, 8, shuffle=True, remix=0., gains=None)
    i = plain.order(0)[:8]
    mix, voice = next(iter(plain))
    assert torch.equal(voice, v[i]) and torch.equal(mix, v[i] + r[i])


def test_two_processes_share_a_batch_between_them(songs):
    data = song_segments(songs, seconds=.5, loud_db=None)
    for make, which in ((DenoiseLoader, 1), (lambda *a, **kw: DenoiseLoader(*a, **kw, low=.5), 1), (MixLoader, 0)):
        whole = [*make(data, 8, shuffle=True)]
        halves = [[*make(data, 8, shuffle=True, share=(k, 2))] for k in (0, 1)]
        for w, a, b in zip(whole, *halves): assert torch.equal(w[which], torch.cat([a[which], b[which]]))


def test_real_stems_work_as_they_are():
    from disentangle_nb.core import shared_audio
    if shared_audio() is None: pytest.skip('no real recordings here')
    table = read_songs(shared_audio()/'stems')
    assert set(table.song) == {'hydrogen_a', 'potassium_a'} and set(table.layout) == {'accompaniment'}
    ratios = {}
    for row in table.itertuples():
        mix, voice, rest = load_song(row)
        assert torch.equal(mix, voice + rest)
        ratios[row.song] = float(10*torch.log10(voice.square().sum()/rest.square().sum()))
    assert abs(ratios['hydrogen_a'] + .2) < .15 and abs(ratios['potassium_a'] + 12.4) < .15

"""Separation scores: against loops, librosa, and the field's own `musdb` and `museval` on two songs made here in the MUSDB layout."""
import importlib.util, json, math, shutil, warnings
import numpy as np, pandas as pd, pytest, torch
from disentangle_nb.audio import load_audio, save_audio
from disentangle_nb.evaluation import separation as S
from disentangle_nb.losses.waveform import si_sdr

has = lambda name: importlib.util.find_spec(name) is not None
needs_museval = pytest.mark.skipif(not has('museval'), reason='museval is not installed')
needs_ffmpeg = pytest.mark.skipif(not (shutil.which('ffmpeg') and shutil.which('ffprobe')), reason='ffmpeg and ffprobe are not on the path')
rand = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def song(seed, n=2*44100 + 5000):
    "Four stems `(2, n)` on the 16-bit grid; the mixture is their sum, exactly."
    t, rng = np.arange(n)/44100, np.random.default_rng(seed)
    pan = lambda x, left: np.stack([left*x, (1 - left)*x])
    f0 = 220*2**(.3*np.sin(2*np.pi*5*t)/12 + seed/12)
    tone = lambda f, k: sum(np.sin(2*np.pi*h*np.cumsum(np.broadcast_to(f, n))/44100)/h for h in range(1, k))
    stems = dict(vocals=pan(.2*tone(f0, 9), .5), bass=pan(.1*tone(55., 4), .5), other=pan(.1*tone(330., 5)*np.exp(-2*(t % .7)), .7),
                 drums=pan(.2*rng.normal(size=n)*np.exp(-30*(t % .35)), .4))
    return {k: torch.from_numpy(np.round(v*2**15)/2**15).float() for k, v in stems.items()}


@pytest.fixture(scope='module')
def musdb_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('musdb')
    for i, name in enumerate(("A Band - It's a Song", 'Émile & Co - Zürich')):
        stems = song(i)
        for k, x in {**stems, 'mixture': sum(stems.values())}.items():
            (root/'test'/name).mkdir(parents=True, exist_ok=True)
            save_audio(root/'test'/name/f'{k}.wav', x, 44100)
    return root


def read(root):
    "(song, voice, accompaniment) `(2, n)` of the fixture, from its files."
    for d in sorted((root/'test').iterdir()):
        x = {p.stem: load_audio(p, mono=False)[0] for p in d.glob('*.wav')}
        yield d.name, x['vocals'], x['mixture'] - x['vocals']


def poor(mix):
    "A separator of little use, that leaves no window silent: half the mixture, a little smoothed."
    return .5*mix + .3*torch.roll(mix, 1, -1)


# --- masks, additivity, spectrogram ------------------------------------------------------------------------------------

def test_mask_is_the_division_it_replaces():
    v, b = rand(4, 30, 20).relu(), rand(4, 30, 20, seed=1).relu()         # half of each are zeros: all four corner cases occur
    assert all(((v == 0) == p).logical_and((b == 0) == q).any() for p in (True, False) for q in (True, False))
    with np.errstate(divide='ignore', invalid='ignore'): ratio = v.double().numpy()/b.double().numpy()
    for threshold in (.3, .5, 1., 2.):
        assert (S.oracle_mask(v, b, threshold).numpy() == np.nan_to_num(ratio > threshold)).all()
    phase = torch.exp(2j*math.pi*torch.rand(4, 30, 20))
    assert torch.equal(S.oracle_mask(v, b), S.oracle_mask((4*v*phase).to(torch.complex64), 4*b))
    assert ((S.oracle_mask(v, b, None) + S.oracle_mask(b, v, None)).sub(1).abs() < 1e-6).logical_or((v == 0) & (b == 0)).all()


def test_additivity_and_wdo_by_loops():
    m, v, b = (rand(3, 5, 4, seed=i).relu() for i in range(3))
    for i in range(3):
        top = sum(abs(float(m[i, c, t] - v[i, c, t] - b[i, c, t])) for c in range(5) for t in range(4))
        assert S.additivity_error(m, v, b)[i].item() == pytest.approx(top/float(m[i].sum()), rel=1e-5)
        g = [[float(v[i, c, t]) > .5*float(b[i, c, t]) for t in range(4)] for c in range(5)]
        kept, leak = (sum(float(a[i, c, t])**2 for c in range(5) for t in range(4) if g[c][t]) for a in (v, b))
        psr, sir = kept/float((v[i]**2).sum()), kept/leak
        got = {k: x[i].item() for k, x in S.wdo(v, b, .5).items()}
        assert got == pytest.approx(dict(psr=psr, sir=sir, wdo=psr - psr/sir), rel=1e-5)
    assert S.additivity_error(v + b, v, b).max() < 1e-6 and S.additivity_error(2*m, 2*v, 2*b).allclose(S.additivity_error(m, v, b))


@pytest.mark.parametrize('n, hop', [(44100, 256), (44100, 384), (16000, 128), (5001, 384)])
def test_spectrogram_is_librosas_and_gives_everything_back(n, hop):
    import librosa
    x, codec = rand(2, n), S.STFTCodec(2048, hop)
    a = codec.encode(x)
    theirs = librosa.stft(x[0].numpy(), n_fft=2048, hop_length=hop, window='hann', center=True, pad_mode='reflect')
    assert a.shape[1:] == theirs.shape and np.abs(a[0].numpy() - theirs).max() < 1e-4*np.abs(theirs).max()
    y = S.stft_oracle(x, torch.zeros_like(x), hop=hop)
    assert y.shape == x.shape and si_sdr(y[:, 1024:-1024], x[:, 1024:-1024]).min() > 100 and si_sdr(y, x).min() > 100
    assert S.stft_oracle(torch.zeros_like(x), x, hop=hop).abs().max() == 0


# --- the study of segments ---------------------------------------------------------------------------------------------

class Halves(torch.nn.Module):
    "Positive and negative half of every sample: non-negative, perfect, with a parameter to find the device by."
    def __init__(self):
        super().__init__()
        self.gain, self.seen = torch.nn.Parameter(torch.tensor(2.)), []
    def encode(self, x):
        self.seen.append(len(x))
        return self.gain*torch.stack([x, -x], 1).relu()
    def decode(self, a, n): return (a[:, 0] - a[:, 1])[..., :n]/self.gain


def test_every_loud_segment_is_scored_once():
    voice, rest = rand(10*1000 + 300)*.1, rand(10*1000 + 300, seed=1)*.1
    voice[2000:4000] = 0; voice[5000:6000] *= .0999/voice[5000:6000].norm(); voice[6000:7000] *= .1001/voice[6000:7000].norm()
    codec = Halves()
    t = S.segment_study(dict(halves=codec), [('a', voice, rest), ('b', rest, voice)], n=1000, batch=4)
    of = lambda s, name='halves': t[(t.system == name) & (t.song == s) & (t.metric == 'masked')].segment.tolist()
    assert of('a') == of('a', 'mixture') == [0, 1, 4, 6, 7, 8, 9, 10] and of('b') == list(range(11))
    assert codec.seen == [3*b for b in (4, 4, 4, 4, 3)]                    # one call for mixture, voice and rest
    assert list(t.columns) == ['song', 'segment', 'metric', 'value', 'system'] and not t.duplicated(['song', 'segment', 'metric', 'system']).any()
    last = t[(t.song == 'b') & (t.segment == 10) & (t.metric == 'masked') & (t.system == 'mixture')].value.item()
    x, b = torch.zeros(2, 1000); x[:300], b[:300] = rest[10000:], voice[10000:]
    assert last == pytest.approx(si_sdr((x + b)[None], x[None]).item(), abs=1e-4)


def test_masking_by_hand():
    voice, rest, codec = rand(3, 500), rand(3, 500, seed=1), Halves()
    mix = voice + rest
    keep = torch.where(mix > 0, voice.relu() > .5*rest.relu(), (-voice).relu() > .5*(-rest).relu())
    got = S.segment_scores(codec, voice, rest)
    assert torch.allclose(got['masked'], si_sdr(mix*keep, voice), atol=1e-3) and got['voice'].min() > 100
    assert (S.informed(codec, voice, rest) - mix*keep).abs().max() < 1e-5


def test_bad_songs_are_named():
    x = rand(1000)
    for v, r in ((x, x[:-1]), (x[None], x[None])):
        with pytest.raises(ValueError, match='tune: voice and accompaniment'): S.segment_study({}, [('tune', v, r)], n=100)
    with pytest.warns(UserWarning, match='no segment of tune'): t = S.segment_study(dict(stft=S.STFTCodec(64, 16)), [('tune', 0*x, x), ('song', 9*x, x)], n=100)
    assert set(t.song) == {'song'} and (t.system == 'stft').any()


# --- statistics --------------------------------------------------------------------------------------------------------

def table(values, system='s', metric='m'):
    return pd.DataFrame([(f'song {i}', j, metric, v, system) for i, vs in enumerate(values) for j, v in enumerate(vs)],
                        columns=['song', 'segment', 'metric', 'value', 'system'])


def test_medians_by_hand():
    got = S.summary(table([[1., 2., 3., 4., 5., 6., 7.], [10.], [20., math.nan]])).loc[('s', 'm')]
    assert got[['pooled', 'by_song', 'songs', 'segments']].tolist() == [5., 10., 3, 9]
    assert got.tenth == pytest.approx(np.quantile([1, 2, 3, 4, 5, 6, 7, 10, 20], .1))
    same = S.summary(table([[3.]*4]*6)).loc[('s', 'm')]
    assert (same[['pooled', 'lower', 'upper', 'song_lower', 'song_upper']] == 3).all()


def test_intervals_know_that_segments_of_a_song_are_alike():
    rng, wide, hits = np.random.default_rng(0), [], 0
    for seed in range(40):
        songs = rng.normal(size=25)
        t = table(songs[:, None] + .05*rng.normal(size=(25, 12)))
        got = S.summary(t, draws=100, seed=seed).loc[('s', 'm')]
        hits += got.song_lower <= 0 <= got.song_upper
        wide.append(got.upper - got.lower)
    assert hits >= 34 and .4 < np.median(wide) < 1.8                       # 95 % of 40 is 38; a median of 25 scatters by 0.25
    assert S.summary(t, seed=3).equals(S.summary(t, seed=3))


def test_paired_differences_take_out_how_hard_a_song_is():
    rng = np.random.default_rng(0)
    hard = 10*rng.normal(size=(8, 1)) + rng.normal(size=(8, 20))
    a, b = table(hard + 1 + .1*rng.normal(size=hard.shape), 'a'), table(hard, 'b')
    got = S.paired(pd.concat([a, b.iloc[10:]]), 'a', 'b', 'm')
    assert .9 < got['lower'] < got['difference'] < got['upper'] < 1.1 and got['p'] < 1e-10 and (got['songs'], got['segments']) == (8, 150)
    assert S.paired(pd.concat([a, b]), 'b', 'a', 'm')['difference'] < -.9


def test_violins():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    t = pd.concat([table(rand(3, 20).tolist(), 'many'), table([[2.], [2.]], 'same'), table([[math.inf, 1.]], 'one')])
    ax = S.show_scores(t, 'm', ylabel='x (dB)')
    assert [w.get_text() for w in ax.get_xticklabels()] == ['many', 'same', 'one'] and len(ax.collections) == 1
    assert [w.get_text() for w in ax.texts][1:] == ['2', '1']
    assert [w.get_text() for w in S.show_scores(t, 'm', ['one', 'absent', 'many']).get_xticklabels()] == ['one', 'many']
    plt.close('all')


# --- whole songs -------------------------------------------------------------------------------------------------------

def test_sdr_by_loops_with_silence():
    r, e = rand(2, 2, 3500).double(), rand(2, 2, 3500, seed=1).double()
    r[0, :, 1000:2000] = 0                                                 # a silent source silences the window for both
    e[1, 0, 2000:3000] = -e[1, 1, 2000:3000]                               # so does left against right
    got = S.frame_sdr(dict(a=r[0], b=r[1]), dict(a=e[0], b=e[1]), 1000)
    want = [10*math.log10(sum(x**2 for x in r[0, :, :1000].flatten().tolist())/sum(x**2 for x in (r - e)[0, :, :1000].flatten().tolist()))]
    assert got['a'][:1] == pytest.approx(want) and np.isnan(got['a'][1:]).all() and np.isnan(got['b']).tolist() == [False, True, True]
    short = S.frame_sdr(dict(a=r[0], b=r[1]), dict(a=e[0], b=e[1]), 4000)
    assert len(short['a']) == 1 and np.isinf(S.frame_sdr(dict(a=r[0], b=r[1]), dict(a=r[0], b=e[1]), 3500)['a'][0])


def test_scale_and_channels_of_whole_songs():
    v, r = rand(2, 4000), rand(2, 4000, seed=1)
    est = v + .1*r
    got = S.song_si_sdr(est, v, v + r)
    x, y = v.flatten().double(), est.flatten().double()
    target = (x @ y)/(x @ x)*x
    want = 10*math.log10(float(target @ target)/float((target - y) @ (target - y)))
    assert got['SI-SDR'] == pytest.approx(want, abs=1e-6) and S.song_si_sdr(-2*est, v, v + r)['SI-SDR'] == pytest.approx(want, abs=1e-6)
    assert got['SI-SDR gain'] == pytest.approx(want - S.song_si_sdr(v + r, v, r)['SI-SDR'], abs=1e-6)
    left = torch.stack([est[0], 0*est[1]])
    assert S.song_si_sdr(left, v, v + r)['SI-SDR'] < 1                      # the voice moved to one side is not found


def test_study_of_folders_and_functions(tmp_path, musdb_root):
    for name, v, r in read(musdb_root): S.write_estimates(tmp_path, name, dict(vocals=poor(v + r)), 44100)
    t = S.song_study(dict(files=tmp_path, function=poor), read(musdb_root), 44100)
    one, other = (t[t.system == s].reset_index(drop=True).drop(columns='system') for s in ('files', 'function'))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    assert set(t.metric) == {f'{k} {m}' for k in ('vocals', 'accompaniment') for m in ('SI-SDR', 'SI-SDR gain', 'SDR')}
    with pytest.warns(UserWarning, match="files, .*not scored. estimates of .* 44100 Hz, the song 48000"):
        assert set(S.song_study(dict(files=tmp_path), read(musdb_root), 48000).system) == {'mixture'}
    with pytest.warns(UserWarning, match='cut, .*all of one shape'): S.song_study(dict(cut=lambda m: dict(vocals=m[:, 1:], accompaniment=m)), read(musdb_root), 44100)


def test_estimates_are_whole_or_absent(tmp_path):
    x = rand(2, 100)
    with pytest.raises(ValueError, match='NaN'): S.write_estimates(tmp_path, 'a', dict(vocals=x, accompaniment=x*math.nan), 44100)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()] and not (tmp_path/'test'/'a').exists()
    S.write_estimates(tmp_path, 'a', dict(vocals=9*x), 44100)
    S.write_estimates(tmp_path, 'a', dict(vocals=5*x), 44100)
    assert torch.equal(S.read_estimates(tmp_path, 'a')[0]['vocals'], 5*x)
    save_audio(tmp_path/'test'/'a'/'bass.wav', x, 48000, subtype='FLOAT')
    with pytest.raises(ValueError, match='several rates'): S.read_estimates(tmp_path, 'a')
    for bad in ('', '..', 'a/b', '../a'):
        with pytest.raises(ValueError, match='name of its folder'): S.write_estimates(tmp_path, bad, dict(vocals=x), 44100)


# --- against the field's own tools -------------------------------------------------------------------------------------

def test_without_museval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(S.importlib.util, 'find_spec', lambda name: None)
    x = dict(vocals=rand(100), accompaniment=rand(100, seed=1))
    with pytest.raises(ImportError, match=r'disentangle_nb\[voice\]'): S.museval_scores(x, x, 100)


@needs_museval
def test_sdr_is_musevals():
    r, e = (dict(vocals=rand(2, 5300, seed=i), accompaniment=rand(2, 5300, seed=i + 1)) for i in (0, 2))
    e = {k: r[k] + .3*e[k] for k in r}
    r['vocals'][:, 1000:2000] = 0
    theirs, ours = S.museval_scores(r, e, 1000), S.frame_sdr(r, e, 1000)
    for k in r:
        assert list(theirs[k]) == ['SDR', 'ISR', 'SIR', 'SAR'] and np.allclose(theirs[k]['SDR'], ours[k], atol=1e-8, rtol=0, equal_nan=True)
    assert len(ours['vocals']) == 5 and np.isnan(ours['vocals'][1])


@needs_museval
def test_a_singular_system_is_solved_too(monkeypatch):
    def singular(*a): raise np.linalg.LinAlgError('Singular matrix')
    monkeypatch.setattr(np.linalg, 'solve', singular)
    monkeypatch.setattr(np.linalg, 'lstsq', lambda a, b: (np.zeros((len(a), b.shape[1])),))
    r = dict(vocals=rand(900), accompaniment=rand(900, seed=1))
    e = {k: x + .1*rand(900, seed=2) for k, x in r.items()}
    assert np.allclose(S.museval_scores(r, e, 900)['vocals']['SDR'], S.frame_sdr(r, e, 900)['vocals'], atol=1e-6)


@needs_museval
@needs_ffmpeg
@pytest.mark.skipif(not has('musdb'), reason='musdb is not installed')
def test_two_songs_through_musdb_and_museval(musdb_root, tmp_path):
    "Their reader, their evaluation of our files, their scores: ours are the same."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import musdb, museval
    db = musdb.DB(str(musdb_root), is_wav=True, subsets='test')
    assert [t.name for t in db] == [name for name, *_ in read(musdb_root)]
    for track, (name, v, r) in zip(db, read(musdb_root)):
        assert track.rate == 44100 and np.array_equal(track.targets['vocals'].audio.T, v.numpy())
        assert np.abs(track.targets['accompaniment'].audio.T - r.numpy()).max() < 1e-6   # mixture - vocals is bass + drums + other here
        voice = poor(torch.from_numpy(track.audio.T).float())
        S.write_estimates(tmp_path/'est', name, dict(vocals=voice, accompaniment=v + r - voice), 44100)
    museval.eval_mus_dir(dataset=db, estimates_dir=str(tmp_path/'est'), output_dir=str(tmp_path/'scores'))
    for name, v, r in read(musdb_root):
        ours = S.song_scores(S.read_estimates(tmp_path/'est', name)[0], v, r, 44100, full=True)
        for target in json.loads((tmp_path/'scores'/'test'/f'{name}.json').read_text())['targets']:
            for kind in ('SDR', 'ISR', 'SIR', 'SAR'):
                mine, theirs = ours[f"{target['name']} {kind}"], [f['metrics'][kind] for f in target['frames']]
                assert len(mine) == 2 and mine == pytest.approx(theirs, abs=2e-3 if kind != 'SDR' else 2e-5), (name, target['name'], kind)

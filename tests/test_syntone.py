"What tones must answer: the published grid to the bit that matters, no aliases, no leak between worlds, files without pickles."
import io, json, math, os, pickletools, subprocess, sys, tracemalloc, zipfile
import numpy as np, pytest, torch
from scipy import signal
from disentangle_nb.core import content_key, make_generator
from disentangle_nb.data.syntone import (WAVES, Factor, FactorWorld, Tones, WorldError, check_world, identifiable, naive_waves,
                                         published_times, read_tones, write_tones)

ORDER = ['timbre', 'frequency', 'amplitude']
FEW = dict(freqs=[220., 440., 880.], amps=[.25, 1.], dur=.25)
RICH = dict(FEW, attack=[.01, .05], decay=[.1, .4], vibrato_depth=[0., 50.], tilt=[-3., 3.], inharmonicity=[0., .001], noise=[-40., -20.])
worlds = {'default': {}, 'published': dict(compat=True), 'one wave': dict(timbres=('square',)), 'fixed phase': dict(phase=.25), 'equal rms': dict(equal_rms=True),
          'constant extras': dict(attack=.01, noise=-40.), 'rich': RICH}


def per_clip(w, f, a): # the definition, one clip at a time
    phase = 2 * np.pi * f * np.linspace(0, 1, 16000)
    return a * (np.sin, lambda p: signal.sawtooth(p, .5), signal.sawtooth, signal.square)[int(w)](phase)


@pytest.mark.parametrize('args', worlds.values(), ids=worlds)
def test_every_world_answers_the_same_questions(args): check_world(Tones(**args))


@pytest.mark.parametrize('args', [{}, RICH], ids=['default', 'rich'])
def test_parts_of_a_world_answer_them_too(args):
    train, test = Tones(**args).held_out('timbre', 'frequency', .3)
    for w in (train, test): assert len(w.grid()) == len(w) > 0
    check_world(train), check_world(Tones(**args).correlated('amplitude', 'frequency', .3))


def test_published_grid_order_labels_and_times():
    world = Tones(compat=True)
    rows = world.grid()
    assert len(world) == 32000 and world.n_samples == 16000
    f, a, t = rows.T
    assert torch.equal((f * 20 + a) * 4 + t, torch.arange(32000))
    v = world.values(rows, ORDER)
    assert np.allclose(np.unique(v[:, 1]), np.linspace(440, 8000, 400), atol=0) and np.allclose(np.unique(v[:, 2]), np.linspace(.1, 1, 20), atol=0)
    assert abs(v[80, 1] - v[0, 1] - 18.947368) < 1e-6 and abs(v[4, 2] - v[0, 2] - .047368) < 1e-6
    assert abs(published_times(16000, 16000)[1].item() * 15999 - 1) < 1e-12


def test_published_waves_are_the_reference_s():
    world = Tones(compat=True)
    rows = world.sample(48, make_generator(0))
    ref = np.stack([per_clip(*v) for v in world.values(rows, ORDER)])
    assert np.abs(world.render(rows, dtype=torch.float64).numpy() - ref).max() < 1e-11 # no sample on the other side of a jump
    assert np.abs(world.render(rows).numpy() - ref).max() < 1e-6
    shuffled = torch.randperm(48, generator=make_generator(1))
    assert torch.equal(world.render(rows[shuffled]), world.render(rows)[shuffled])
    wave = naive_waves(torch.tensor([440.]), published_times(16000, 16000))[0]
    assert torch.allclose(wave.square().mean(1).sqrt(), torch.tensor([.7071, .5774, .5774, 1.]).double(), atol=1e-3)


def test_exact_sample_times_and_no_aliases():
    world = Tones(freqs=[1000.3], amps=[1.], phase=0.)
    clips = world.render(world.grid())
    t = torch.arange(16000).double() / 16000
    assert (clips[0] - (2 * math.pi * 1000.3 * t).sin().float()).abs().max() < 1e-5
    window = torch.hann_window(16000)
    for w, step in ((1, 2), (2, 1), (3, 2)):
        power = torch.fft.rfft(clips[w] * window).abs().square()
        keep = torch.zeros(len(power), dtype=torch.bool)
        for h in range(1, 8, step): keep[round(1000.3 * h) - 40:round(1000.3 * h) + 41] = True
        assert 10 * math.log10(power[~keep].sum() / power[keep].sum()) < -70
        assert power[int(.45 * 16000) + 50:].sum() < 1e-7 * power.sum()


def test_waves_approach_their_definitions():
    world = Tones(freqs=[55.], amps=[1.], phase=0.)
    clips, m = world.render(world.grid()), (55 * torch.arange(16000).double() / 16000).frac()
    ideal = torch.stack([(2 * math.pi * m).sin(), 1 - (4 * m - 2).abs(), 2 * m - 1, torch.where(m < .5, 1., -1.).double()]).float()
    assert ((clips - ideal).square().mean(1) / ideal.square().mean(1)).max() < .012 # what is cut off of a jump: 1/h^2 beyond the 130th
    assert (clips - ideal).abs().median() < .01


def test_any_batch_any_company_same_clip():
    world = Tones(**dict(RICH, phase=0., noise=-300.))
    rows = world.sample(50, make_generator(3))
    whole = world.render(rows)
    for i in (0, 17, 49): assert torch.allclose(world.render(rows[i:i + 1])[0], whole[i], atol=2e-5)


def test_phase_is_nuisance():
    world = Tones(freqs=[312.], amps=[1.])
    a, b = [world.render(world.grid(), make_generator(s)) for s in (0, 1)]
    assert (a - b).abs().max() > .1
    spec = lambda x: torch.fft.rfft(x * torch.hann_window(16000)).abs()[:, 312::312] # every partial sits on a bin
    assert torch.allclose(spec(a), spec(b), rtol=1e-3, atol=.5)


def test_same_seed_same_hash():
    world = Tones(**RICH)
    rows = world.grid()[::7]
    key = lambda seed: content_key(torch.cat([x for _, x in world.stream(seed, rows)]))
    assert key(0) == key(0) != key(1)
    assert key(0) == content_key(torch.cat([x.clone() for _, x in world.stream(0, rows, reuse=True)]))


def test_a_million_combinations_are_drawn_not_listed():
    world = Tones(attack=np.linspace(.01, .1, 20), decay=np.linspace(.1, .5, 20), tilt=np.linspace(-6, 6, 20), dur=.05, freqs=np.geomspace(100, 1000, 50))
    assert math.prod(world.sizes) == 20**4 * 50 * 4
    rows = world.sample(20000, make_generator(0))
    for c, n in enumerate(world.sizes): # each level at its turn: chi-square far below its 1e-6 quantile
        count = torch.bincount(rows[:, c], minlength=n).double()
        assert ((count - 20000 / n).square() / (20000 / n)).sum() < n + 8 * math.sqrt(2 * n)


def test_worlds_that_share_nothing():
    world = Tones(freqs=np.geomspace(100, 1000, 24))
    for seed in range(5):
        train, test = world.held_out('timbre', 'frequency', .25, seed)
        cells = [{(t, f) for f, a, t in w.grid().tolist()} for w in (train, test)]
        assert not cells[0] & cells[1] and len(cells[0] | cells[1]) == 96 and len(cells[1]) == 24
        assert {t for t, _ in cells[0]} == set(range(4)) and {f for _, f in cells[0]} == set(range(24))
        a, b = train.pairs(2000, make_generator(seed))
        for rows in (train.sample(2000, make_generator(seed)), a, b): assert {(t, f) for f, a, t in rows.tolist()} <= cells[0]
    assert world.grid().shape == (24 * 80, 3) # the whole is as it was


def test_pairs_keep_what_they_share():
    a, b = Tones(**RICH).pairs(3000, make_generator(0))
    share = (a == b).double().sum(1)
    assert share.min() >= 1 and (a != b).any(1).double().mean() > .5
    one, other = Tones().pairs(3000, make_generator(0), redraw=1)
    assert ((one != other).sum(1) <= 1).all()


def test_weights_are_what_is_drawn():
    world = FactorWorld([Factor('a', 'ordinal', range(3)), Factor('b', 'ordinal', range(2)), Factor('c', 'nominal', 'xy')], 100, 1)
    w = torch.tensor([[1., 2.], [0., 3.], [4., 0.]])
    joint = world.weighted('a', 'b', w)
    assert len(joint) == 8 and len(joint.grid()) == 8
    rows = joint.sample(50000, make_generator(0))
    got = torch.zeros(3, 2).index_put_((rows[:, 0], rows[:, 1]), torch.ones(50000), accumulate=True) / 50000
    assert (got - w / 10).abs().max() < .01
    given = joint.sample(20000, make_generator(1), dict(b=0))
    assert abs((given[:, 0] == 2).double().mean() - .8) < .015 and not (given[:, 0] == 1).any()
    with pytest.raises(WorldError, match='held out'): joint.sample(1, fixed=dict(a=1, b=0))
    with pytest.raises(WorldError, match='is taken'): joint.weighted('b', 'c', torch.ones(2, 2))


bad = {'aliases': dict(freqs=[440., 8000.]), 'aliases as published': dict(freqs=[8000.1], compat=True), 'aliases with vibrato': dict(freqs=[7900.], vibrato_depth=50.),
       'unknown factor': dict(vibrato=[1., 2.]), 'unknown wave': dict(timbres=('noise',)), 'silence': dict(amps=[0.]), 'NaN': dict(freqs=[math.nan]),
       'infinite': dict(noise=[-math.inf, 0.]), 'negative': dict(attack=[-1., 1.]), 'empty': dict(freqs=[]), 'twice': dict(amps=[1., 1.]), 'no time': dict(dur=0.),
       'no rate': dict(sr=0), 'matrix': dict(freqs=[[1., 2.]]), 'extras as published': dict(compat=True, tilt=[1., 2.]), 'rate without depth': dict(vibrato_rate=[3., 4.])}

@pytest.mark.parametrize('args', bad.values(), ids=bad)
def test_bad_worlds_are_refused_in_words(args):
    with pytest.raises(WorldError, match=r'.{20}'): Tones(**args)


@pytest.mark.parametrize('rows', [torch.zeros(2, 2).long(), torch.tensor([[0, 0, 4]]), torch.tensor([[-1, 0, 0]]), torch.zeros(3).long()], ids=str)
def test_bad_choices_are_refused(rows):
    with pytest.raises(WorldError): Tones(**FEW).render(rows)


def test_nothing_at_all_renders_to_nothing():
    for w in (Tones(**FEW), Tones(**FEW, compat=True)): assert w.render(torch.zeros(0, 3).long()).shape == (0, w.n_samples)


def test_unidentifiable_pitches_are_told_and_published_ones_are_not():
    lo, hi = identifiable(16000, 1.)
    with pytest.warns(UserWarning, match='outside'): Tones(freqs=[hi * 1.01])
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Tones(), Tones(compat=True), Tones(freqs=[hi * 1.01], timbres=('sine',))


def test_file_round_trip(tmp_path):
    world = Tones(**RICH)
    keys = write_tones(tmp_path/'a.npz', world, seed=3)
    x, rows, again = read_tones(tmp_path/'a.npz')
    assert again.args == world.args and torch.equal(rows, world.grid()) and x.shape == keys['x'] and x.dtype == torch.float32
    assert torch.equal(x, torch.cat([c for _, c in world.stream(3)]))
    assert torch.equal(read_tones(tmp_path/'a.npz', first=5)[0], x[:5])
    write_tones(tmp_path/'b.npz', world, seed=3)
    with zipfile.ZipFile(tmp_path/'a.npz') as a, zipfile.ZipFile(tmp_path/'b.npz') as b: assert all(a.read(n) == b.read(n) for n in a.namelist())
    with np.load(tmp_path/'a.npz', allow_pickle=False) as f: assert all(f[k].dtype != object for k in f)


def test_published_file_layout(tmp_path):
    world = Tones(compat=True, freqs=[440., 1000.], amps=[.1, .5, 1.])
    write_tones(tmp_path/'p.npz', world)
    with np.load(tmp_path/'p.npz', allow_pickle=False) as f:
        assert sorted(f) == ['classes', 'metadata', 'x', 'y']
        assert (f['x'].shape, f['x'].dtype) == ((24, 16000), np.float64) and (f['y'].shape, f['y'].dtype) == ((24,), np.int64)
        assert f['classes'].dtype.str == '<U8' and f['classes'].tolist() == list(WAVES) and f['y'][:8].tolist() == [0, 1, 2, 3] * 2
        assert np.abs(f['x'] - np.stack([per_clip(*v) for v in world.values(world.grid(), ORDER)])).max() < 1e-11
    with zipfile.ZipFile(tmp_path/'p.npz') as z:
        assert all(i.compress_type == zipfile.ZIP_DEFLATED for i in z.infolist())
        raw = io.BytesIO(z.read('metadata.npy'))
        version = np.lib.format.read_magic(raw)
        shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
        assert (version, shape, dtype) == ((1, 0), (), np.dtype(object))
        words = [a for _, a, _ in pickletools.genops(raw.read()) if isinstance(a, str)] # looked at, not run
        assert [w for w in words if w in ('freqs', 'amps', 'waveforms')] == ['freqs', 'amps', 'waveforms']


def test_what_a_file_does_not_say_is_not_made_up(tmp_path):
    world = Tones(compat=True, freqs=[440., 1000.], amps=[.1, 1.])
    write_tones(tmp_path/'p.npz', world)
    assert read_tones(tmp_path/'p.npz')[1:] == (None, None)
    assert torch.equal(read_tones(tmp_path/'p.npz', world=world)[1], world.grid())
    other = Tones(compat=True, freqs=[440., 1010.], amps=[.1, 1.])
    assert read_tones(tmp_path/'p.npz', world=other)[1:] == (None, None) # its clips are other clips


def damaged(path, how):
    if how == 'truncated': path.write_bytes(path.read_bytes()[:-3000])
    elif how == 'text': path.write_text('not a zip')
    elif how == 'flipped':
        b = bytearray(path.read_bytes()); b[3000] ^= 255; path.write_bytes(bytes(b))
    else:
        arrays = dict(x=np.zeros((2, 5)), y=np.zeros(2, int))
        if how == 'objects': arrays['x'] = np.array([[1], 'a'], dtype=object)
        elif how == 'no x': del arrays['x']
        elif how == 'card': arrays |= dict(world=np.array('{"args": 3}'), indices=np.zeros((2, 3), int))
        elif how == 'other card': arrays |= dict(world=np.array(json.dumps(dict(args=dict(nonsense=[1, 2])))), indices=np.zeros((2, 3), int))
        elif how == 'flat': arrays['x'] = np.zeros(5)
        elif how == 'columns': arrays['x'] = np.asfortranarray(np.ones((2, 5)))
        np.savez(path, **arrays)


@pytest.mark.parametrize('how', ['truncated', 'text', 'flipped', 'objects', 'no x', 'card', 'other card', 'flat', 'columns'])
def test_damaged_files_are_refused_by_name(tmp_path, how):
    path = tmp_path/'t.npz'
    write_tones(path, Tones(**FEW))
    damaged(path, how)
    with pytest.raises(WorldError): read_tones(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'t.npz'
    write_tones(path, Tones(**FEW))
    before = path.read_bytes()
    def full(self, *a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Tones, 'render', full)
    with pytest.raises(OSError, match='disk full'): write_tones(path, Tones(**FEW), seed=1)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['t.npz']


def test_memory_does_not_grow_with_the_grid(tmp_path):
    peaks = []
    for n in (4, 40):
        world = Tones(freqs=np.geomspace(100, 2000, n), amps=np.geomspace(.1, 1, 20))
        tracemalloc.start()
        write_tones(tmp_path/'t.npz', world)
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2e6 # blocks are torch's; what Python holds must not grow either


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='peak memory is read from /proc')
def test_two_gigabytes_stream_through_less_than_half_of_one():
    code = ("from disentangle_nb.data.syntone import Tones\npeak = lambda: int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
            'w, n, before = Tones(compat=True), 0, peak()\n'
            'for r, x in w.stream(rows=w.grid()[::8], reuse=True): n += len(x)\n'
            'print(n, peak() - before)')  # a torch with CUDA weighs 300 MB more before anything is rendered
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    n, kb = map(int, done.stdout.split())
    assert n == 4000 and kb < 250 * 1024, kb


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_the_gpu_makes_the_same_tones():
    for args in ({}, RICH | dict(noise=-300.)):
        world = Tones(**args)
        rows = world.sample(300, make_generator(0))
        a, b = [world.render(rows, make_generator(1), d).cpu() for d in ('cpu', 'cuda')]
        assert (a - b).abs().max() < 1e-3


def test_tables_are_worlds_too():
    pd = pytest.importorskip('pandas')
    from disentangle_nb.data.worlds import TableWorld
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(instrument=rng.choice(list('abc'), 90), midi=rng.integers(50, 60, 90), velocity=rng.choice([40, 80], 90)))
    world = TableWorld(table, torch.arange(90.)[:, None].expand(90, 4), 100)
    seen = {tuple(r) for r in world.grid().tolist()}
    assert len(seen) == len(table.drop_duplicates()) and check_world(world) is world
    clips, rows = world.batch(500, make_generator(0), dict(velocity=1))
    told = table.iloc[clips[:, 0].long().numpy()]
    assert (told.velocity == 80).all() and (world.values(rows, ['pitch'])[:, 0] == told.midi).all()
    assert all(i == world['instrument'].levels[r] for i, r in zip(told.instrument, rows[:, 0]))
    train, test = world.held_out('instrument', 'pitch', .2)
    assert {tuple(r) for r in train.grid().tolist()} | {tuple(r) for r in test.grid().tolist()} == seen and len(train) + len(test) == len(seen)
    with pytest.raises(WorldError, match='no clip'): world.render(torch.tensor([[0, 0, 0], *next([list(c)] for c in np.ndindex(3, 10, 2) if c not in seen)]))


def test_mel_of_tones_is_librosa_s_and_has_no_level():
    librosa = pytest.importorskip('librosa')
    from disentangle_nb.features.tonemel import LevelMel, MaxMel, world_features
    world, published, fixed = Tones(compat=True), MaxMel(), LevelMel()
    rows = world.sample(24, make_generator(0))
    clips = world.render(rows)
    x = published.encode(clips)
    ref = np.stack([librosa.util.normalize(librosa.feature.melspectrogram(y=c, sr=16000)) for c in clips.numpy()])
    assert x.shape == (24, 128, 32) and np.abs(x.numpy() - ref).max() < 1e-5
    quiet, loud = [world.render(torch.cat([rows[:, :1], torch.full((24, 1), i), rows[:, 2:]], 1)) for i in (0, 19)]
    assert (published.encode(quiet) - published.encode(loud)).abs().max() < 1e-6
    a, b = [fixed.decibels(fixed.mel_power(c)) for c in (quiet, loud)]
    assert (b - a - 20)[a > -70].abs().max() < 1e-2  # deeper down single precision rounds by more
    for f in (published, fixed):
        assert torch.allclose(f.encode(clips[3]), f.encode(clips)[3], atol=1e-6) and type(f)(**f.args).args == f.args
        y = f.encode(clips)
        assert 0 <= y.min() and y.max() <= 1 and f.shape(16000) == tuple(y.shape[1:]) and f.encode(torch.zeros(2, 4000)).isfinite().all()
        assert f.decode(y[:1], 16000, n_iter=2).shape == (1, 16000)
    few = Tones(compat=True, freqs=[440., 900.])
    x, rows, which = world_features(few, published)
    assert len(x) == 8 and torch.allclose(x[which], published.encode(few.render(rows)), atol=1e-6)
    x, rows, which = world_features(Tones(**FEW), fixed, seed=2)
    assert torch.equal(x[which], torch.cat([fixed.encode(c) for _, c in Tones(**FEW).stream(2)]))


def test_tones_stay_exact_where_training_is_sloppy():
    world = Tones(phase=0.)
    rows = world.sample(20, make_generator(0))
    exact, before = world.render(rows), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(world.render(rows), exact)
        assert torch.get_float32_matmul_precision() == 'medium'
    finally: torch.set_float32_matmul_precision(before)

"The one door for audio: every case of the page, and what a page cannot show (locks, pipes, damage at random)."
import errno, os, struct, time, warnings
from pathlib import Path
import numpy as np, pytest, torch
from disentangle_nb import audio
from disentangle_nb.audio import AudioError, audio_files, door_outcomes, load_audio, resample, save_audio, scan_audio

names = [c[0] for c in [*audio._broken_cases(), *audio._odd_cases(), *audio._format_cases()]]


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory): return door_outcomes(tmp_path_factory.mktemp('cases')).set_index('case')


@pytest.mark.parametrize('case', names)
def test_outcome_is_as_stated(outcomes, case):
    row = outcomes.loc[case]
    assert row.holds, f'{case}: expected {row.expected}; got {row.outcome}'


def test_every_promised_case_is_there(outcomes):
    assert len(outcomes) == len(names) == len(set(names)) >= 42


@pytest.fixture
def note(tmp_path):
    x = torch.from_numpy(audio._tone().T[0]).clone()
    return save_audio(tmp_path/'note.wav', x, 22050), x


def test_locked_file(note, monkeypatch):
    def locked(*a, **kw): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('builtins.open', locked)
    with pytest.raises(AudioError, match='no permission to read it'): load_audio(note[0])


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path/'pipe.wav')
    for path in (tmp_path/'pipe.wav', '/dev/zero'):
        with pytest.raises(AudioError, match='not a regular file'): load_audio(path)


def test_names_that_are_not_unicode(tmp_path, note):
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/\xff\xfe.wav')
    try: Path(odd).write_bytes(note[0].read_bytes())
    except OSError: pytest.skip('this file system takes Unicode names only')
    assert torch.equal(load_audio(odd)[0], load_audio(note[0])[0])


def test_hour_is_read_in_part(tmp_path):
    import tracemalloc
    path, sr = tmp_path/'hour.wav', 22050
    path.write_bytes(struct.pack('<4sI4s4sIHHIIHH4sI', b'RIFF', 36 + 7200*sr, b'WAVE', b'fmt ', 16, 1, 1, sr, 2*sr, 2, 16,
                                 b'data', 7200*sr))
    with path.open('r+b') as f:
        f.seek(44 + 3600*sr); f.write(np.full(sr, 8192, '<i2').tobytes()); f.truncate(44 + 7200*sr)
    tracemalloc.start()
    started = time.perf_counter()
    wav, _ = load_audio(path, offset=1800, duration=1)
    took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (wav == .25).all() and len(wav) == sr and peak < 2e6 and took < 2


@pytest.mark.parametrize('suffix', ['wav', 'flac', 'aiff', 'ogg', 'mp3'])
def test_part_is_a_slice(tmp_path, suffix):
    path = save_audio(tmp_path/f'n.{suffix}', audio._tone(2).T, 22050)
    whole, sr = load_audio(path, mono=False)
    part, _ = load_audio(path, mono=False, offset=.2, duration=.1)
    assert part.shape == (2, 2205)
    torch.testing.assert_close(part, whole[:, 4410:6615], atol=2e-3 if suffix == 'mp3' else 1e-6, rtol=0)
    assert load_audio(path, offset=.4, duration=9)[0].shape == (11025 - 8820,)
    nan = float('nan')
    for bad in (dict(offset=-1), dict(offset=nan), dict(offset=.5), dict(duration=0), dict(duration=nan)):
        with pytest.raises(AudioError): load_audio(path, **bad)


@pytest.mark.parametrize('suffix', ['wav', 'flac', 'aiff', 'ogg', 'mp3'])
@pytest.mark.parametrize('channels', [1, 2])
def test_blocks_join_without_a_seam(tmp_path, suffix, channels):
    import soundfile as sf
    path = save_audio(tmp_path/f'n.{suffix}', audio._tone(channels, seconds=2).T, 22050)
    with audio._door(path) as f: joined = np.concatenate(list(audio._blocks(f, 0, f.frames, path, size=1000)))
    np.testing.assert_allclose(joined, sf.read(path, dtype='float32', always_2d=True)[0], atol=1e-6)


def test_header_that_promises_the_moon(tmp_path):
    path = save_audio(tmp_path/'n.flac', audio._tone().T, 22050)
    b = bytearray(path.read_bytes())
    b[21] |= 0x0f; b[22:26] = b'\xff'*4
    path.write_bytes(b)
    with pytest.raises(AudioError, match='cut short|not readable'): load_audio(path)


def test_stream_of_unknown_length(tmp_path, note):
    b = bytearray(note[0].read_bytes()); b[40:44] = b'\xff'*4; b[4:8] = b'\xff'*4
    note[0].write_bytes(b)
    assert len(load_audio(note[0])[0]) == 11025


@pytest.mark.parametrize('suffix', ['wav', 'flac', 'aiff', 'ogg', 'mp3'])
def test_random_damage(tmp_path, suffix):
    "Whatever bytes arrive: a finite clip or an `AudioError`."
    whole = save_audio(tmp_path/f'n.{suffix}', audio._tone().T, 22050).read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path/f'bad.{suffix}', 0
    for i in range(60):
        b = bytearray(whole)
        for at in rng.integers(0, len(b) if i % 2 else 120, rng.integers(1, 12)): b[at] = rng.integers(256)
        path.write_bytes(b[:rng.integers(1, len(b))] if i % 3 == 0 else b)
        try: wav, sr = load_audio(path, mono=False)
        except AudioError: refused += 1
        else: assert torch.isfinite(wav).all() and wav.shape[1] and sr > 0
    assert refused >= 10


def test_write_is_whole_or_absent(note, monkeypatch):
    before = note[0].read_bytes()
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='disk full while writing .*note.wav; the previous version is kept'):
        save_audio(note[0], torch.zeros(9), 22050)
    assert note[0].read_bytes() == before and len(list(note[0].parent.iterdir())) == 1


@pytest.mark.parametrize('subtype,bits', [('PCM_U8', 8), ('PCM_16', 16), ('PCM_24', 24), ('FLOAT', 0)])
def test_save_rounds_to_nearest(tmp_path, subtype, bits):
    x = torch.empty(2, 5000).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))*(1 - 2**-6)
    y, _ = load_audio(save_audio(tmp_path/'n.wav', x, 22050, subtype), mono=False)
    assert (x - y).abs().max() <= (.5001*2**(1 - bits) if bits else 0)


def test_save_never_clips(tmp_path):
    x = torch.linspace(-2, 1, 1000)
    with pytest.warns(UserWarning, match='peak 2.000 is beyond full scale; turned down by 6.02 dB'):
        save_audio(tmp_path/'n.wav', x, 22050)
    torch.testing.assert_close(load_audio(tmp_path/'n.wav')[0], x/2, atol=2e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(load_audio(save_audio(tmp_path/'f.wav', x, 22050, 'FLOAT'))[0], x)
        save_audio(tmp_path/'one.wav', torch.ones(10), 22050)


@pytest.mark.parametrize('name,x,sr,subtype,why', [
    ('a.xyz', torch.zeros(9), 22050, 'PCM_16', 'names no format'),
    ('a', torch.zeros(9), 22050, 'PCM_16', 'names no format'),
    ('a.flac', torch.zeros(9), 22050, 'FLOAT', 'has no FLOAT'),
    ('a.wav', torch.zeros(0), 22050, 'PCM_16', 'no samples'),
    ('a.wav', torch.zeros(1, 2, 3), 22050, 'PCM_16', 'got shape'),
    ('a.wav', torch.zeros(100, 2), 22050, 'PCM_16', 'transpose'),
    ('a.mp3', torch.zeros(9), 192000, 'PCM_16', 'cannot hold'),
    ('a.wav', torch.zeros(9), 0, 'PCM_16', 'cannot hold'),
    ('a.wav', torch.full((9,), float('inf')), 22050, 'FLOAT', 'NaN or infinite')])
def test_save_refuses(tmp_path, name, x, sr, subtype, why):
    with pytest.raises(AudioError, match=why): save_audio(tmp_path/name, x, sr, subtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('a,b', [(22050, 16000), (44100, 22050), (8000, 48000), (192000, 22050), (22050, 44100)])
def test_resample_keeps_sines(a, b):
    t, u = torch.arange(a)/a, torch.arange(b)/b
    wav, want = torch.sin(2*torch.pi*440*t), torch.sin(2*torch.pi*440*u)
    got = resample(wav, a, b)
    assert got.dtype == torch.float32 and len(got) == b
    cut = slice(b//10, -b//10)
    assert 10*torch.log10((got - want)[cut].square().mean()) < -80
    both = resample(torch.stack([wav, -wav]), a, b)
    assert torch.equal(both[0], got) and torch.equal(both[1], -got)


def test_resample_of_next_to_nothing():
    for n in (1, 2, 3, 7):
        for a, b in ((192000, 8000), (8000, 192000), (22050, 16000)):
            y = resample(torch.full((n,), .5), a, b)
            assert len(y) == max(1, round(n*b/a)) and torch.isfinite(y).all()
    with pytest.raises(ValueError, match='positive'): resample(torch.zeros(9), 0, 8000)


def test_door_and_scan_agree_with_lists(tmp_path, note):
    (tmp_path/'sub').mkdir(); (tmp_path/'sub'/'loop').symlink_to(tmp_path)
    (tmp_path/'.hidden.wav').write_text('x'); (tmp_path/'notes.txt').write_text('# mine\nnote.wav\ngone.wav\n')
    (tmp_path/'sub'/'b.m4a').write_bytes(b'x')
    assert [p.relative_to(tmp_path).as_posix() for p in audio_files(tmp_path)] == ['note.wav', 'sub/b.m4a']
    ok, bad = scan_audio(tmp_path/'notes.txt', max_bad=.5)
    assert ok == [note[0]] and bad.reason.tolist() == ['no such file']
    ok, bad = scan_audio([str(note[0]), tmp_path/'sub'/'b.m4a'], max_bad=.5)
    assert list(bad.columns) == ['path', 'reason'] and 'cannot be read here' in bad.reason[0]
    ok, bad = scan_audio(note[0])
    assert len(ok) == 1 and not len(bad) and list(bad.columns) == ['path', 'reason']


def test_scan_stops_above_the_share(tmp_path, note):
    files = [note[0]]*1 + [tmp_path/f'{i}.wav' for i in range(9)]
    for p in files[1:]: p.write_bytes(note[0].read_bytes())
    files[3].write_bytes(b'')
    assert len(scan_audio(tmp_path, max_bad=.1)[0]) == 9
    files[4].write_text('not sound')
    with pytest.raises(AudioError, match='2 of 10 files are bad, more than the 10% allowed. First: 2.wav: empty file') as e:
        scan_audio(tmp_path, max_bad=.1)
    assert len(e.value.bad) == 2
    for missing in (tmp_path/'nowhere', tmp_path/'nowhere.txt'):
        with pytest.raises(AudioError, match='no such file'): scan_audio(missing)
    with pytest.raises(AudioError, match='neither audio, a folder, nor a list'):
        (tmp_path/'list.bin').write_bytes(b'\xff\xfe\xff'); scan_audio(tmp_path/'list.bin')

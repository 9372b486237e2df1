"""The SoundFont player against exact answers: fonts written here, damaged files, recorded levels of another player."""
import math, os, struct
from pathlib import Path

import numpy as np
import pytest
import torch

from disentangle_nb.data.soundfont import SoundFont, SoundFontError, find_soundfont

os.environ.setdefault('OMP_NUM_THREADS', '1')
SR = 22050
GEN = dict(keys=43, velocities=44, instrument=41, sample=53, mode=54, root=58, pan=17, attenuation=48, coarse=51, fine=52, scale=56,
           cutoff=8, q=9, mod_cutoff=11, mod_pitch=7, mod_attack=26, mod_decay=28, mod_sustain=29, attack=34, hold=35, decay=36, sustain=37,
           release=38, key_decay=40, vibrato_pitch=6, vibrato_freq=24, start=0, lfo_volume=13, lfo_freq=22)


def chunk(name, body): return name + struct.pack('<I', len(body)) + body + b'\0' * (len(body) % 2)


def bags(zones):
    "Bag, modulator and generator tables of a list of instruments, each a list of zones."
    gens, mods, bag, heads = b'', b'', b'', []
    for zone_list in zones:
        heads.append(len(bag) // 4)
        for z in zone_list:
            z = dict(z)
            bag += struct.pack('<HH', len(gens) // 4, len(mods) // 10)
            mods += b''.join(struct.pack('<HHhHH', *m) for m in z.pop('mods', ()))
            last = {k: z.pop(k) for k in ('instrument', 'sample') if k in z}
            for k, v in (z | last).items():
                v = v[0] | v[1] << 8 if isinstance(v, tuple) else v
                gens += struct.pack('<Hh', GEN[k], v - 65536 if v > 32767 else v)
    heads.append(len(bag) // 4)
    bag += struct.pack('<HH', len(gens) // 4, len(mods) // 10)
    return heads, bag, mods + bytes(10), gens + bytes(4)


def font(path, instruments, samples, presets=None, banks=None):
    "Write an SF2 file: `instruments` lists of zones, `samples` dicts, `presets` lists of zones (one an instrument by default)."
    presets = presets or [[dict(instrument=i)] for i in range(len(instruments))]
    smpl, shdr = b'', b''
    for i, s in enumerate(samples):
        at, x = len(smpl) // 2, (np.asarray(s['x']) * 32767).round().astype('<i2')
        lo, hi = s.get('loop', (0, len(x)))
        smpl += x.tobytes() + bytes(92)
        shdr += struct.pack('<20s5IBbHH', f'wave {i}'.encode(), at, at + len(x), at + lo, at + hi, s.get('rate', SR), s.get('key', 60), s.get('cents', 0), 0, 1)
    ph, pbag, pmod, pgen = bags(presets)
    ih, ibag, imod, igen = bags(instruments)
    banks = banks or [(0, i) for i in range(len(presets))]
    phdr = b''.join(struct.pack('<20sHHHIII', f'preset {i}'.encode(), p, b, h, 0, 0, 0) for i, ((b, p), h) in enumerate(zip(banks + [(0, 0)], ph)))
    inst = b''.join(struct.pack('<20sH', f'inst {i}'.encode(), h) for i, h in enumerate(ih))
    tables = zip('phdr pbag pmod pgen inst ibag imod igen shdr'.split(), (phdr, pbag, pmod, pgen, inst, ibag, imod, igen, shdr + bytes(46)))
    pdta = chunk(b'LIST', b'pdta' + b''.join(chunk(k.encode(), v) for k, v in tables))
    info = chunk(b'LIST', b'INFO' + chunk(b'ifil', struct.pack('<HH', 2, 1)))
    body = b'sfbk' + info + chunk(b'LIST', b'sdta' + chunk(b'smpl', smpl)) + pdta
    Path(path).write_bytes(b'RIFF' + struct.pack('<I', len(body)) + body)
    return Path(path)


PERIOD = 84  # 262.5 Hz at 22050: near middle C
SINE = dict(x=.5 * np.sin(2 * np.pi * np.arange(20 * PERIOD) / PERIOD), loop=(10 * PERIOD, 20 * PERIOD))
F0 = SR / PERIOD


def tone(x, skip=2000):
    "Frequency (Hz) of the strongest partial and its amplitude, from the middle of a clip."
    x = np.asarray(x[skip:-200])
    w = np.hanning(len(x))
    p = np.abs(np.fft.rfft(x * w, 2**19))
    k = int(p.argmax())
    return k * SR / 2**19, 2 * p[k] / w.sum()


def one(tmp_path, sample=SINE, other=(), **gens):
    "A font with one instrument of one looped zone."
    return SoundFont(font(tmp_path/'x.sf2', [[dict(dict(mode=1) | gens, sample=0)]], [sample, *other]), velocity_cutoff=0)


def cents(f, ref): return 1200 * math.log2(f / ref)


@pytest.fixture(scope='module')
def gm():
    try: return SoundFont()
    except SoundFontError as e: pytest.skip(f'pretty_midi is not here: {e}')


# Pitch

@pytest.mark.parametrize('key', [24, 48, 60, 61, 72, 84, 100])
def test_pitch_is_exact_over_the_keyboard(tmp_path, key):
    f, a = tone(one(tmp_path).note(0, key, 127, dur=1.))
    assert abs(cents(f, F0 * 2 ** ((key - 60) / 12))) < 1
    assert abs(20 * math.log10(a / .5)) < .2


@pytest.mark.parametrize('gens, key, expected', [
    (dict(root=48), 60, 1200), (dict(coarse=-12), 60, -1200), (dict(fine=33), 60, 33), (dict(scale=50), 72, 600), (dict(scale=0), 90, 0)])
def test_tuning_generators(tmp_path, gens, key, expected):
    assert abs(cents(tone(one(tmp_path, **gens).note(0, key, 127, dur=1.))[0], F0) - expected) < 1


def test_sample_correction_rate_and_detune(tmp_path):
    sf = one(tmp_path, SINE | dict(cents=-20, rate=2 * SR))
    assert abs(cents(tone(sf.note(0, 60, 127, dur=1.))[0], F0) - 1180) < 1
    assert abs(cents(tone(sf.note(0, 60.3, 127, dur=1., detune=7))[0], F0) - 1217) < 1


def test_rates_agree(tmp_path):
    sf = one(tmp_path)
    a, b = sf.note(0, 60, 127, .5, sr=22050).numpy(), sf.note(0, 60, 127, .5, sr=44100).numpy()[::2]
    assert np.abs(a - b)[200:].max() < 3e-3


def test_nothing_folds_back(tmp_path):
    high = dict(x=.5 * np.sin(2 * np.pi * .3 * np.arange(4000)), loop=(1000, 3000))
    assert one(tmp_path, high).note(0, 72, 127, dur=.5)[500:].abs().max() < 1e-3
    assert abs(tone(one(tmp_path, high).note(0, 60, 127, dur=.5))[1] - .5) < .01


def test_vibrato_swings_as_told(tmp_path):
    x = one(tmp_path, vibrato_pitch=100, vibrato_freq=-600).note(0, 60, 127, dur=1.).numpy()
    from scipy.signal import hilbert
    f = np.diff(np.unwrap(np.angle(hilbert(x)))) * SR / 2 / np.pi
    f = np.convolve(f, np.ones(200) / 200, 'valid')[2000:-2000]
    assert 85 < cents(f.max(), F0) < 105 and -105 < cents(f.min(), F0) < -85


# Zones

def test_layers_of_settings(tmp_path):
    inst = [dict(fine=50, mode=1), dict(keys=(0, 59), sample=0), dict(keys=(60, 127), fine=10, sample=0)]
    presets = [[dict(fine=5), dict(fine=1, keys=(0, 90), instrument=0)], [dict(fine=5), dict(instrument=0)]]
    sf = SoundFont(font(tmp_path/'x.sf2', [inst], [SINE], presets))
    got = [round(cents(tone(sf.note(p, k, 127, dur=1.))[0], F0 * 2 ** ((k - 60) / 12))) for p, k in ((0, 50), (0, 70), (1, 50), (1, 70))]
    assert got == [51, 11, 55, 15]
    assert sf.zone_id(0, 91) == '' and sf.zone_id(1, 91) == '0:wave 0'
    assert sf.silent(0, [90, 91]) == [91]


def test_velocity_layers_and_ids(tmp_path):
    inst = [dict(velocities=(1, 63), sample=0, mode=1), dict(velocities=(64, 127), sample=1, mode=1), dict(keys=(70, 80), sample=2, mode=1)]
    sf = SoundFont(font(tmp_path/'x.sf2', [inst], [SINE] * 3))
    assert [sf.zone_id(0, 60, v) for v in (63, 64)] == ['0:wave 0', '1:wave 1']
    assert sf.zone_id(0, 75, 100) == '1:wave 1+2:wave 2'
    assert len(sf.zones(0)) == 3 and len(sf.zones(0, 60)) == 2 and sf.zones(0, 60, 10).recording.tolist() == ['0:wave 0']


def test_loop_modes(tmp_path):
    x = np.concatenate([SINE['x'], .5 * np.sin(4 * np.pi * np.arange(100 * PERIOD) / PERIOD)])
    once, always, held = (one(tmp_path, dict(x=x, loop=SINE['loop']), mode=m, release=3000) for m in (0, 1, 3))
    n = len(x)
    clip = once.note(0, 60, 127, dur=1., hold=1.)
    assert clip[n + 50:].abs().max() < 1e-3 and abs(tone(clip[3000:n - 200], 0)[0] - 2 * F0) < 1
    assert abs(tone(always.note(0, 60, 127, dur=1., hold=.3))[0] - F0) < 1
    a, b = held.note(0, 60, 127, dur=1., hold=.3), always.note(0, 60, 127, dur=1., hold=.3)
    up = round(.3 * SR)
    assert torch.equal(a[:up], b[:up])
    assert abs(tone(a[up + 20 * PERIOD:up + 90 * PERIOD], 0)[0] - 2 * F0) < 2
    assert (a[1:] - a[:-1]).abs().max() < .15


# Level and brightness

@pytest.mark.parametrize('gens, velocity, db', [
    (dict(), 127, 0), (dict(), 64, 40 * math.log10(64 / 127)), (dict(attenuation=100), 127, -4), (dict(pan=500), 127, -3.01), (dict(pan=-500), 127, -3.01)])
def test_levels(tmp_path, gens, velocity, db):
    assert abs(20 * math.log10(tone(one(tmp_path, **gens).note(0, 60, velocity, dur=1.))[1] / .5) - db) < .1


def test_volume_envelope(tmp_path):
    sf = one(tmp_path, attack=-3986, hold=-3986, decay=0, sustain=200, release=0)   # .1 s, .1 s, 1 s to -20 dB, 1 s
    x = sf.note(0, 60, 127, dur=1., hold=.6).numpy() / .5
    def level(s): return 20 * math.log10(np.abs(x[round(s * SR) - 42:round(s * SR) + 42]).max())
    assert abs(level(.05) + 6) < .5 and abs(level(.15)) < .1
    assert abs(level(.3) + 9.6) < .5 and abs(level(.55) + 19.2) < .3
    assert abs(level(.7) + 19.2 + 9.6) < .5


def test_decay_follows_the_key(tmp_path):
    sf = one(tmp_path, decay=0, sustain=1000, key_decay=50)
    def level(key): return float(sf.note(0, key, 127, dur=.6)[round(.45 * SR):].abs().max())
    assert level(48) > 4 * level(60) > 16 * level(72)


def test_filter_envelope_and_velocity(tmp_path):
    saw = dict(x=np.resize(np.linspace(-.5, .5, PERIOD), 20 * PERIOD), loop=SINE['loop'])
    def treble(x):
        p = np.abs(np.fft.rfft(np.asarray(x) * np.hanning(len(x)))) ** 2
        return 10 * np.log10(p[len(p) // 4:].sum() / p.sum())
    closed, opened = one(tmp_path, saw, cutoff=7000), one(tmp_path, saw, cutoff=7000, mod_cutoff=6000)
    a, b = (f.note(0, 60, 127, dur=.5)[2000:] for f in (closed, opened))
    assert treble(b) > treble(a) + 10
    falling = one(tmp_path, saw, cutoff=7000, mod_cutoff=6000, mod_decay=-1200, mod_sustain=1000).note(0, 60, 127, dur=1.)
    assert treble(falling[1000:5000]) > treble(falling[-4000:]) + 20
    path = tmp_path/'x.sf2'
    soft, loud = (SoundFont(path).note(0, 60, v, dur=.5)[2000:] for v in (20, 127))
    assert treble(loud) > treble(soft) + 3
    off = [[dict(mode=1, cutoff=7000, mods=[(0x102, 8, 0, 0xD02, 0)], sample=0)]]
    sf = SoundFont(font(path, off, [saw]))
    assert abs(treble(sf.note(0, 60, 20, dur=.5)[2000:]) - treble(sf.note(0, 60, 127, dur=.5)[2000:])) < .01


def test_stereo_pair_becomes_the_sum(tmp_path):
    inst = [dict(pan=-500, mode=1, sample=0), dict(pan=500, mode=1, sample=1)]
    sf = SoundFont(font(tmp_path/'x.sf2', [inst], [SINE, SINE]))
    assert abs(tone(sf.note(0, 60, 127, dur=1.))[1] - .5 * math.sqrt(2)) < .01


def test_tremolo(tmp_path):
    x = one(tmp_path, lfo_volume=100, lfo_freq=-900).note(0, 60, 127, dur=1.).numpy()
    peaks = np.abs(x[:len(x) // PERIOD * PERIOD]).reshape(-1, PERIOD).max(1)
    assert abs(20 * np.log10(peaks.max() / peaks.min()) - 20) < 2


# Doors

def test_same_bits_and_any_batch(gm):
    programs, keys, velocities = [40, 0, 71, 60], [60, 70, 55, 50], [40, 80, 120, 80]
    a = gm.notes(programs, keys, velocities, dur=.5)
    assert a.shape == (4, 11025) and a.dtype == torch.float32 and torch.isfinite(a).all()
    assert torch.equal(a, SoundFont().notes(programs, keys, velocities, dur=.5))
    for row, *asked in zip(a, programs, keys, velocities): assert torch.equal(row, SoundFont(keep=1).note(*asked, dur=.5))


def test_longer_clips_begin_like_shorter_ones(gm):
    for p in (0, 40, 73): assert torch.allclose(gm.note(p, 67, dur=1.)[:6000], gm.note(p, 67, dur=.4)[:6000], atol=1e-6)


@pytest.mark.parametrize('start', [0., .0001, .5, 1.23456])
def test_sequence_is_sample_accurate(gm, start):
    note = gm.sequence([(73, 0., .25, 72, 90)])
    placed = gm.sequence([(73, start, .25, 72, 90)])
    k = round(start * SR)
    assert placed[:k].abs().sum() == 0 and torch.equal(placed[k:], note)


def test_sequence_adds_up(gm):
    events = [(0, .1 * i, .3, 60 + i, 60 + i) for i in range(6)] + [(0, .2, .1, 38, 100, True)]
    whole = gm.sequence(events, dur=1.5)
    assert len(whole) == round(1.5 * SR)
    assert torch.allclose(whole, sum(gm.sequence([e], dur=1.5) for e in events), atol=1e-5)
    assert not torch.equal(gm.sequence([(0, 0, .3, 38, 100)], dur=.5), gm.sequence([(0, 0, .3, 38, 100, True)], dur=.5))
    assert len(gm.sequence([])) == 0


@pytest.mark.parametrize('call, said', [
    (lambda sf: sf.note(40, 60, dur=0), 'positive length'), (lambda sf: sf.note(40, 60, sr=0), '1000 Hz'),
    (lambda sf: sf.note(40, 128), 'keys are 0-127'), (lambda sf: sf.note(40, 60, 0), 'velocities 1-127'),
    (lambda sf: sf.note(40, 60, bank=77), 'no preset'), (lambda sf: sf.sequence([(40, 0, 1)]), 'is not (program')])
def test_wrong_questions(gm, call, said):
    with pytest.raises(SoundFontError) as e: call(gm)
    assert said in str(e.value)


# Damage

def refused(path, raw):
    path.write_bytes(bytes(raw))
    with pytest.raises(SoundFontError) as e: SoundFont(path)
    assert path.name in str(e.value) and len(str(e.value)) < 400
    return str(e.value)


@pytest.fixture
def good(tmp_path):
    inst = [dict(fine=50), dict(keys=(0, 59), sample=0), dict(keys=(60, 127), fine=10, sample=0)]
    return font(tmp_path/'good.sf2', [inst], [SINE]).read_bytes()


def test_truncation_anywhere(good, tmp_path):
    for n in [*range(0, 200, 7), *range(200, len(good) - 1, 97)]: refused(tmp_path/'cut.sf2', good[:n])


@pytest.mark.parametrize('table', 'phdr pbag pmod pgen inst ibag imod igen shdr smpl'.split())
def test_missing_and_odd_tables(good, tmp_path, table):
    at = good.index(table.encode())
    assert table in refused(tmp_path/'x.sf2', good[:at] + b'junk' + good[at + 4:])
    if table != 'smpl':
        n = struct.unpack('<I', good[at + 4:at + 8])[0]
        assert 'damaged' in refused(tmp_path/'x.sf2', good[:at + 4] + struct.pack('<I', n - 1) + good[at + 8:])


def test_other_files(tmp_path):
    assert 'not a SoundFont' in refused(tmp_path/'text.sf2', b'I am a letter.' * 50)
    assert 'not a SoundFont' in refused(tmp_path/'wave.sf2', b'RIFF' + struct.pack('<I', 36) + b'WAVEfmt ' + bytes(28))
    assert 'empty file' in refused(tmp_path/'empty.sf2', b'')
    with pytest.raises(SoundFontError, match='no such file'): SoundFont(tmp_path/'missing.sf2')
    with pytest.raises(SoundFontError, match='no such file'): SoundFont(tmp_path)


def test_pointers_out_of_range(good, tmp_path):
    def put(table, byte, fmt, value):
        at = good.index(table) + 8 + byte
        return good[:at] + struct.pack(fmt, value) + good[at + struct.calcsize(fmt):]
    for table, byte, fmt, value in ((b'phdr', 24, '<H', 9), (b'phdr', 38 + 24, '<H', 9), (b'inst', 42, '<H', 9), (b'ibag', 4, '<H', 999), (b'pgen', 2, '<H', 5),
                                    (b'igen', 10, '<H', 9), (b'shdr', 24, '<I', 2**31), (b'shdr', 20, '<I', 2**31), (b'shdr', 36, '<I', 0)):
        assert 'damaged' in refused(tmp_path/'x.sf2', put(table, byte, fmt, value)), (table, byte)


def test_a_thousand_scrambled_files(good, tmp_path):
    rng, path, opened = np.random.default_rng(0), tmp_path/'x.sf2', 0
    for _ in range(1000):
        raw = bytearray(good)
        tail = good.index(b'phdr') - 20
        for at in rng.integers(tail if rng.random() < .8 else 0, len(raw), rng.integers(1, 6)): raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            sf = SoundFont(path)
            for b, p in sf._index: assert torch.isfinite(sf.note(p, 60, 90, dur=.05, hold=.03, bank=b)).all()
            opened += 1
        except SoundFontError: pass
    assert 0 < opened < 1000


def test_finding(monkeypatch, tmp_path):
    import importlib.util
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SoundFontError, match=r'disentangle_nb\[soundfont\]'): find_soundfont()


# Another player

def test_levels_hold_against_fluidsynth(gm):
    recorded = Path(__file__).parent/'data'/'soundfont_reference.json'
    like = SoundFont(velocity_cutoff=0).compare(recorded)
    assert len(like) == 78 and like.rms.median() < 1 and like.rms.max() < 2.5
    ours = gm.compare(recorded, gain='note')
    assert ours.rms.median() < 4 and ours.rms.max() < 6


def test_pitch_holds_by_pyin(gm):
    import librosa
    notes = [(p, k) for p, lo, hi in ((65, 49, 80), (40, 55, 95), (73, 60, 96), (60, 34, 77), (71, 50, 94), (42, 36, 83), (57, 34, 74), (0, 21, 103),
                                      (70, 34, 75), (68, 58, 72), (56, 54, 86), (41, 48, 91)) for k in np.linspace(lo + 2, hi - 2, 4).round().astype(int).tolist()]
    off = []
    for p, k in notes:
        f = 440 * 2 ** ((k - 69) / 12)
        f0, *_ = librosa.pyin(gm.note(p, k, dur=.6).numpy()[2205:], sr=SR, fmin=f / 2.2, fmax=f * 2.2, frame_length=4096 if k < 48 else 2048, hop_length=512)
        off.append(cents(np.nanmedian(f0), f))
    assert np.mean(np.abs(off) <= 20) >= .98


def test_silence_is_known(gm): assert gm.silent(65, range(49, 81)) == [64] and gm.silent(0, range(21, 109, 8)) == []

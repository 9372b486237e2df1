"Lists, folders and layouts of recordings; melodies, performances and pieces: exact truth, splits that share nothing, seeds, bad input."
import hashlib, inspect, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from disentangle_nb.audio import load_audio, save_audio
from disentangle_nb.core import read_json, shared_audio
from disentangle_nb.data import recordings
from disentangle_nb.data.recordings import (FORMS, INSTRUMENTS, THEMES, RecordingError, Score, beat_times, fragment, halfway, in_turn, mark_splits, melodies,
                                            mirrored, moved, ornamented, perform, piece, program_of, read_recordings, read_theme, take, takes_key, theme, together,
                                            walk, with_noise, write_takes)
from disentangle_nb.data.soundfont import SoundFont, SoundFontError
from disentangle_nb.data.voice import MAJOR, MINOR, stream

BANDS = ['plucked', 'soundfont']
tone = .3*torch.sin(torch.arange(22050)*.06)


def font():
    try: return SoundFont()
    except SoundFontError as e: pytest.skip(str(e))


@pytest.fixture(params=BANDS)
def band(request):
    if request.param == 'soundfont': font()
    return request.param


def files(root, names, wav=tone):
    for n in names: save_audio(root/n, wav, 22050)


# Files

def test_a_list_may_hold_comments_blanks_and_spaces_and_is_relative_to_itself(tmp_path, monkeypatch):
    files(tmp_path/'music', ['a.wav', 'sub dir/b.wav', 'ü.flac'])
    (tmp_path/'music'/'list.txt').write_bytes('# all of it\r\n\r\n  a.wav  \r\nsub dir/b.wav\r\n\r\n  # more\r\nü.flac\r\na.wav'.encode('utf-8-sig'))
    monkeypatch.chdir(tmp_path)
    t = read_recordings('music/list.txt')
    assert t.name.tolist() == ['a', 'sub dir/b', 'ü'] and t.seconds.tolist() == [1.]*3 and set(t.split) == {''}
    assert all(Path(f).is_file() for f in t.file)


def test_a_folder_a_file_and_paths_are_lists_too(tmp_path):
    files(tmp_path, ['x/1.wav', 'y/1.wav'])
    assert read_recordings(tmp_path).name.tolist() == ['x/1', 'y/1']
    assert read_recordings(tmp_path/'x'/'1.wav').name.tolist() == ['1']
    assert read_recordings([tmp_path/'y'/'1.wav', tmp_path/'x'/'1.wav']).name.tolist() == ['y/1', 'x/1']
    assert read_recordings([tmp_path/'x'/'1.wav', tmp_path/'y'/'..'/'x'/'1.wav']).name.tolist() == ['1']


def test_no_two_names_are_alike(tmp_path):
    f = ['a/1.wav', 'a/1.flac', 'b/1.wav', 'a/1 .wav', 'c/d/1.wav', 'A/1.wav']
    names = mirrored([tmp_path/x for x in f])
    assert len({n.lower() for n in names}) == len(f) and names[2] == 'b/1' and names[4] == 'c/d/1'
    assert mirrored(['m/a.wav', 'm/a.flac', 'm/a.wav.flac']) == ['a.wav', 'a.flac', 'a.wav.flac'] and mirrored(['m/a.wav.flac', 'm/A.wav', 'm/a.wav']) == ['a.wav.flac', 'A.wav', 'a.wav~']
    assert not any(n.startswith(('/', '..')) for n in names)


def spoil(root):
    save_audio(root/'short.wav', tone[:4410], 22050); save_audio(root/'silent.wav', 0*tone, 22050)
    (root/'empty.wav').write_bytes(b''); (root/'text.wav').write_text('la la la'); (root/'folder.wav').mkdir()
    (root/'cut.wav').write_bytes((root/'0.wav').read_bytes()[:9000])
    return dict(short='lasts 0.20 s', silent='silent', empty='empty', text='not readable', folder='is a folder', cut='cut short', missing='no such file')


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    files(tmp_path, [f'{i}.wav' for i in range(9)])
    bad = spoil(tmp_path)
    (tmp_path/'list.txt').write_text('\n'.join([f'{i}.wav' for i in range(9)] + [f'{b}.wav' for b in bad]))
    with pytest.warns(UserWarning, match='7 of 16 files'): t = read_recordings(tmp_path/'list.txt', max_bad=.5)
    assert len(t) == 9 and {Path(k).stem for k in t.attrs['bad']} == {*bad}
    assert all(w in t.attrs['bad'][str(tmp_path/f'{k}.wav')] for k, w in bad.items())
    with pytest.raises(RecordingError, match='7 of 16 .*more than the 10% allowed'): read_recordings(tmp_path/'list.txt')


def test_a_list_that_is_none_is_refused(tmp_path):
    for name in ('nul.txt', 'nul.bin'): (tmp_path/name).write_bytes(b'a.wav\n'*5000 + b'a.wav\0b.wav')
    (tmp_path/'late.txt').write_bytes(b'# a\n'*20000 + b'a.wav\0b.wav')
    (tmp_path/'bytes.txt').write_bytes(bytes(range(128, 256)))
    (tmp_path/'empty.txt').write_text(''); (tmp_path/'comments.txt').write_text('# a\n\n# b'); (tmp_path/'hollow').mkdir()
    for name, words in {'lost.txt': 'no such file', 'nul.txt': 'no text has', 'nul.bin': 'no text has', 'late.txt': 'no such file', 'bytes.txt': 'neither audio', 'empty.txt': 'empty', 'comments.txt': 'names no recording',
                        'hollow': 'names no recording'}.items():
        with pytest.raises(RecordingError, match=f'{name}.*{words}'): read_recordings(tmp_path/name)


def test_a_list_need_not_be_read_to_the_end_at_once(tmp_path):
    files(tmp_path, ['0.wav'])
    (tmp_path/'list.txt').write_text('0.wav\nlost.wav')
    t = read_recordings(tmp_path/'list.txt', check=False)
    assert t.name.tolist() == ['0', 'lost'] and t.seconds.isna().all()


@pytest.mark.parametrize('sheet', ['csv', 'json'])
def test_maestro_keeps_its_splits(tmp_path, sheet):
    files(tmp_path, ['2004/a b.wav', '2006/c.wav', '2006/d.wav'])
    t = pd.DataFrame(dict(canonical_title=['x, y', 'z', 'w'], split=['train', 'validation', 'test'], audio_filename=['2004/a b.wav', '2006/c.wav', '2006/d.wav']))
    if sheet == 'csv': t.to_csv(tmp_path/'maestro-v3.0.0.csv', index=False)
    else: t.to_json(tmp_path/'maestro-v2.0.0.json', orient='records')
    got = read_recordings(tmp_path)
    assert got.split.tolist() == ['train', 'dev', 'test'] and got.name.tolist() == ['2004/a b', '2006/c', '2006/d'] and set(got.layout) == {'maestro'}
    assert mark_splits(got).split.tolist() == got.split.tolist()
    (tmp_path/'2006/d.wav').unlink()
    with pytest.raises(RecordingError, match='d.wav: no such file'): read_recordings(tmp_path)


def test_maestro_with_a_broken_sheet_is_named(tmp_path):
    (tmp_path/'maestro-v2.0.0.json').write_text('{"a": ')
    with pytest.raises(RecordingError, match='maestro-v2.0.0.json'): read_recordings(tmp_path)
    (tmp_path/'maestro-v2.0.0.json').write_text('[{"split": "train"}]')
    with pytest.raises(RecordingError, match='audio_filename'): read_recordings(tmp_path)


def test_maps_tests_on_the_recorded_pianos_and_shares_no_piece(tmp_path):
    files(tmp_path, ['AkPnBcht/MUS/MAPS_MUS-alb_se3_AkPnBcht.wav', 'SptkBGAm/MUS/MAPS_MUS-bor_ps6_SptkBGAm.wav', 'ENSTDkAm/MUS/MAPS_MUS-alb_se3_ENSTDkAm.wav',
                     'ENSTDkCl/MUS/MAPS_MUS-chpn-e01_ENSTDkCl.wav', 'AkPnBcht/ISOL/MAPS_ISOL_x_AkPnBcht.wav'])
    t = read_recordings(tmp_path)
    assert dict(zip(t.name.str.split('MAPS_MUS-').str[1], t.split)) == {'bor_ps6_SptkBGAm': 'train', 'alb_se3_ENSTDkAm': 'test', 'chpn-e01_ENSTDkCl': 'test'}


def test_splits_are_drawn_by_file_and_seed():
    t = pd.DataFrame(dict(name=[str(i) for i in range(40)], split=['']*38 + ['test', 'train']))
    a = mark_splits(t)
    assert a.split.value_counts().to_dict() == {'train': 31, 'test': 5, 'dev': 4} and mark_splits(t).equals(a) and not mark_splits(t, seed=1).equals(a)
    assert set(mark_splits(t[:2]).split) == {'train'}
    with pytest.raises(RecordingError, match='something to train on'): mark_splits(t, .5, .5)


# Scores

@pytest.mark.parametrize('name', THEMES)
def test_themes_are_melodies(name):
    split, usual, text = THEMES[name]
    s = read_theme(text, usual)
    assert split in INSTRUMENTS and len(s.midi) >= 12 and (np.diff(s.onset) > 0).all() and (s.length > 0).all()
    assert (s.onset[1:] >= s.onset[:-1] + s.length[:-1] - 1e-9).all() and np.abs(np.diff(s.midi)).max() <= 16
    assert 50 <= theme(name).midi.min() and theme(name).midi.max() <= 88


@pytest.mark.parametrize('seed', range(20))
def test_walks_keep_to_a_scale_and_a_range(seed):
    s = walk(stream(seed))
    assert 8 <= len(s.midi) <= 16 and 60 <= s.midi.min() and s.midi.max() <= 79 and np.abs(np.diff(s.midi)).max() <= 12
    pcs = set((s.midi % 12).tolist())
    assert any(pcs <= {(k + p) % 12 for p in mode} for k in range(12) for mode in (MAJOR, MINOR))
    exact = walk(stream(seed), 21.5)
    assert exact.length.sum() == pytest.approx(21.5) and (np.diff(exact.onset) > 0).all()


@pytest.mark.parametrize('voices', [2, 3])
def test_fragments_have_their_voices_below_the_melody(voices):
    for seed in range(10):
        tune = walk(stream(seed))
        s = fragment(stream(seed, 'under'), tune, voices)
        assert np.unique(s.voice).tolist() == [*range(voices)] and (np.diff(s.onset) >= 0).all()
        assert s.midi[s.voice == 0].tolist() == tune.midi.tolist() and 44 <= s.midi.min() and (s.onset + s.length).max() <= (tune.onset + tune.length).max() + 1e-9
    with pytest.raises(RecordingError, match='2 or 3'): fragment(stream(0), tune, 4)


def test_edits_change_what_they_say_and_nothing_else():
    s = fragment(stream(1), walk(stream(0)))
    assert (moved(s, 5).midi - s.midi == 5).all() and moved(s, 5).onset is s.onset
    late = moved(s, 3, halfway(s))
    assert ((late.midi - s.midi == 3) == (s.onset >= halfway(s))).all() and .3 < (late.midi != s.midi).mean() < .7
    rich = ornamented(s, stream(0), 1.)
    assert rich.length.sum() == pytest.approx(s.length.sum()) and set(s.onset) <= set(rich.onset)
    long = (s.length >= 1) & (s.voice == 0)
    assert len(rich.midi) == len(s.midi) + 2*long.sum()
    two = in_turn(s, s, gap=1.)
    assert two.onset[len(s.onset)] == pytest.approx((s.onset + s.length).max() + 1) and len(together(s, s).midi) == 2*len(s.midi)


# Performances

def test_the_clock_without_rubato_is_the_metronome_and_with_it_stays_within():
    b = np.arange(0, 64, .5)
    assert np.allclose(beat_times(b, 120.), b/2)
    for seed in range(5):
        t = beat_times(b, 120., .15, seed)
        speed = np.diff(b)/np.diff(t)/2
        assert (np.diff(t) > 0).all() and 0.84 < speed.min() < .99 and 1.01 < speed.max() < 1.16 and np.array_equal(t, beat_times(b, 120., .15, seed))
    with pytest.raises(RecordingError): beat_times(b, 0.)
    s = walk(stream(0))
    p = perform(s, 'harp', 90, rubato=.15, seed=3, band='plucked')
    assert np.allclose(p.onset, beat_times(s.onset, 90, .15, 3)) and np.abs(p.onset - s.onset/1.5).max() > .02


def test_notes_begin_where_they_are_said_to(band):
    score = Score(np.arange(8.), np.full(8, .5), np.full(8, 69), np.zeros(8, int))
    p = perform(score, 'piano' if band == 'soundfont' else 'harp', 90, rubato=.15, seed=2, band=band)
    level = p.wav.unfold(0, 220, 110).square().mean(1).sqrt()
    for a in p.onset[1:]:
        i = round(a*22050/110)
        assert level[i:i + 6].max() > 4*level[max(0, i - 6):max(1, i - 2)].mean() # a gap of half a beat before each


def test_the_pitches_are_the_scores_and_transposing_is_playing_elsewhere(band):
    from disentangle_nb.features.descriptors import track_f0
    s = read_theme('C4:2 E4:2 G4:2 C5:2')
    for k in (0, -5, 7):
        p = perform(s, 'flute' if band == 'soundfont' else 'harp', 100, transpose=k, band=band)
        f0, _ = track_f0(p.wav, 22050, fmin=100, fmax=1200, frame=2048, hop=256)
        heard = [float(f0[0, round((a + .5)*22050/256)]) for a in p.onset]
        cents = 1200*np.log2(np.array(heard)/(440*2**((s.midi + k - 69)/12)))
        assert np.abs(cents).max() < 40, cents # vibrato of the flute


def test_one_seed_gives_the_same_bits_in_another_process():
    bands = ['plucked', 'auto']
    def digests(): return [hashlib.sha256(take(3, 'test', 7, 4., band=b).wav.numpy().tobytes()).hexdigest() for b in bands]
    code = f'import hashlib\nfrom disentangle_nb.data.recordings import take\nbands = {bands}\n' + inspect.cleandoc(inspect.getsource(digests)) + '\nprint(*digests())'
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONHASHSEED='5')).stdout.split()
    assert digests() == there
    assert not torch.equal(take(4, 'test', 7, 8., band='plucked').wav, take(3, 'test', 7, 8., band='plucked').wav)


def test_noise_is_as_loud_as_asked():
    x = torch.sin(torch.arange(100_000)*.1)
    for db in (0, 20, 40): assert 10*torch.log10(x.square().mean()/(with_noise(x, db) - x).square().mean()).item() == pytest.approx(db, abs=.1)


def test_what_cannot_be_played_is_refused():
    s = read_theme('C4 D4')
    for kw, words in ((dict(instruments='kazoo'), 'there is no'), (dict(transpose=90), '0 to 127'), (dict(instruments=[]), 'no instrument'), (dict(bpm=-3), 'positive')):
        with pytest.raises(RecordingError, match=words): perform(s, **kw)
    with pytest.raises(SoundFontError): perform(s, band='no/such.sf2')
    for call, words in ((lambda: melodies('valid'), 'splits'), (lambda: piece(0, form='ABC'), 'forms'), (lambda: theme('yesterday'), 'no theme')):
        with pytest.raises(RecordingError, match=words): call()


# Splits

def test_splits_share_no_theme_no_melody_no_instrument_and_no_recording():
    assert len(THEMES) == len({t for *_, t in THEMES.values()}) and {s for s, *_ in THEMES.values()} == {*INSTRUMENTS}
    sets = {s: {tuple(m.midi[m.voice == 0]) for m in melodies(s, 60, 10).values()} for s in INSTRUMENTS}
    programs = {s: {*INSTRUMENTS[s].values()} for s in INSTRUMENTS}
    for a, b in (('train', 'dev'), ('train', 'test'), ('dev', 'test')): assert not sets[a] & sets[b] and not programs[a] & programs[b]
    assert all(len(s) > 60 for s in sets.values())


def test_no_recording_of_the_soundfont_is_in_two_splits():
    f = font()
    heard = {s: {z for p in t.values() for m in range(38, 95) for v in (65, 90, 100) for z in f.zone_id(p, m, v).split('+')} - {''} for s, t in INSTRUMENTS.items()}
    assert not heard['train'] & heard['test'] and not heard['train'] & heard['dev'] and not heard['dev'] & heard['test']
    for t in INSTRUMENTS.values():
        for name, p in t.items(): assert len({f.zone_id(p, m, 90) for m in range(38, 95)}) >= 3, name


def test_strings_differ_by_split():
    bright = {s: {recordings._string(p) % 5 for p in t.values()} for s, t in INSTRUMENTS.items()}
    assert bright == dict(train={0, 1, 2}, dev={3}, test={4}) and program_of('harp') == 46 == program_of(46)


# Takes

def test_takes_go_on_where_they_stopped_and_refuse_another_set(tmp_path, monkeypatch):
    kw = dict(hours=24/3600, dev=.5, test=.5, seconds=6., band='plucked')
    real, made = recordings.take, []
    def stops(number, split, *a):
        if len(made) == 3: raise KeyboardInterrupt
        made.append((split, number))
        return real(number, split, *a)
    monkeypatch.setattr(recordings, 'take', stops)
    with pytest.raises(KeyboardInterrupt): write_takes(tmp_path/'t', **kw)
    assert len([*(tmp_path/'t').rglob('*.flac')]) == 3 and not [p for p in (tmp_path/'t').rglob('*') if '.part' in p.name]
    monkeypatch.setattr(recordings, 'take', real)
    t = write_takes(tmp_path/'t', **kw)
    assert t.split.tolist() == ['train']*4 + ['dev']*2 + ['test']*2 and (t.seconds > 6).all() and t.name[0] == 'train/train-0-0000'
    assert torch.allclose(load_audio(t.file[5])[0], take(1, 'dev', 0, 6., band='plucked').wav, atol=2**-15)
    with pytest.raises(RecordingError, match='other settings'): write_takes(tmp_path/'t', **kw | dict(seconds=7.))
    before = takes_key(**kw)
    real, other = recordings.find_spec, tmp_path/'changed.py'
    other.write_text('')
    with monkeypatch.context() as m:
        m.setattr(recordings, 'find_spec', lambda name: SimpleNamespace(origin=other))
        assert takes_key(**kw) != before == recordings.content_key(read_json(tmp_path/'t'/'takes.json'))
        with pytest.raises(RecordingError, match='other code'): write_takes(tmp_path/'t', **kw)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='Choose a place'): write_takes(tmp_path/'file'/'x', **kw)


def test_takes_by_another_soundfont_have_another_key(tmp_path):
    copy = tmp_path/'copy.sf2'
    copy.write_bytes(font().path.read_bytes() + b'\0'*4)
    before = takes_key(band=str(font().path)), takes_key(band=str(copy))
    copy.write_bytes(copy.read_bytes() + b'\0'*4)
    assert len({*before, takes_key(band=str(copy))}) == 3 and takes_key(band='soundfont') == takes_key(band='auto') == takes_key()


# Pieces

@pytest.mark.parametrize('form', FORMS)
def test_planted_sections_are_there(form):
    for seed in range(9):
        p = piece(seed, form=form)
        assert ''.join(p.sections.label) == form and 60 <= p.sections.end.max()*60/p.bpm <= 90
        (occurrences,) = p.patterns()
        assert len(occurrences) == form.count('A')
        first, rows = np.array(occurrences[0]), p.sections[p.sections.label == 'A']
        for r, o in zip(rows.itertuples(), map(np.array, occurrences)):
            at = o[:, 0] - r.start
            assert (0 <= at).all() and (at < FORMS[form]).all()
            if r.change == 'ornament': assert len(o) > len(first); continue
            assert np.allclose(at, first[:, 0]) and set(o[:, 1] - first[:, 1]) == {r.semitones} and (r.semitones != 0) == (r.change == 'transposed')
            played = p.score.voice[(p.score.onset >= r.start) & (p.score.onset < r.end)]
            assert set(played) == ({2, 3} if r.change == 'timbre' else {0, 1})


def test_changes_come_in_thirds():
    changes = pd.concat([piece(s).sections for s in range(12)]).change.value_counts()
    assert changes[['transposed', 'timbre', 'ornament']].tolist() == [8, 8, 8]


def test_patterns_are_what_mir_eval_reads():
    mir_eval = pytest.importorskip('mir_eval')
    p = piece(0).patterns()
    assert mir_eval.pattern.three_layer_FPR(p, p)[0] == pytest.approx(1)


def test_a_piece_is_performed_with_its_instruments(band):
    p = piece(1)
    x = p.perform(band=band)
    assert len(x.onset) == len(p.score.midi) and 60 < len(x.wav)/22050 < 95 and x.wav.abs().max() == pytest.approx(.5, abs=.01)


def test_real_pieces_are_listed():
    if shared_audio() is None: pytest.skip('no real recordings here: set DISENTANGLE_AUDIO')
    t = read_recordings(shared_audio()/'stems')
    assert sorted(t.name) == ['hydrogen_a/accompaniment', 'hydrogen_a/vocals', 'potassium_a/accompaniment', 'potassium_a/vocals']

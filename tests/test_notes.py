"Contracts of note data: every source answers the same questions, splits share nothing, runs resume, nothing read can run code."
import json, os, pickle, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pytest, torch

from disentangle_nb.audio import AudioError, save_audio
from disentangle_nb.core import make_generator, shared_audio
from disentangle_nb.data import batches, notes
from disentangle_nb.data.batches import Augment, BatchLoader, label_mask, note_augment, note_data, note_dls, part, shift_rows
from disentangle_nb.data.notes import (COLUMNS, ORCHESTRA, RELEASE_CLASSES, RELEASE_DYNAMICS, TableError, folder_table, gmvae_release, load_clips,
                                       midi_of, nsynth_table, orchestra_table, pitch_name, read_table, release_features, release_range, shared,
                                       split_cells, split_pitches, split_random, split_reference, split_zones, tinysol_table)
from disentangle_nb.features.mel import LogMel
from release import NOTES, lay_out

pytest.importorskip('pretty_midi')
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='module')
def own_cache(tmp_path_factory):
    before, os.environ['DISENTANGLE_CACHE'] = os.environ.get('DISENTANGLE_CACHE'), str(tmp_path_factory.mktemp('cache'))
    yield
    os.environ.pop('DISENTANGLE_CACHE')
    if before is not None: os.environ['DISENTANGLE_CACHE'] = before


@pytest.fixture(scope='module')
def orchestra(): return orchestra_table()


@pytest.fixture(scope='module')
def trio(): return orchestra_table(['Violin', 'Flute', 'Oboe'], (60, 71), (40, 120))


@pytest.fixture(scope='module')
def data(trio): return note_data(split_cells(trio, held=.15), LogMel(n_mels=64), shifts=(-1, 1), label_portion=.5)


def tone(midi, sr=22050, dur=.7):
    t = torch.arange(int(sr*dur))/sr
    return .3*torch.sin(2*torch.pi*440*2**((midi - 69)/12)*t)*torch.exp(-3*t)


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i in ('Reed', 'String'):
        for m in (57, 60, 64, 69):
            save_audio(tmp_path/f'{i}_{m}.wav', tone(m), 22050)
            rows.append(f'{i}_{m}.wav,{i},{m}')
    (tmp_path/'metadata.csv').write_text('\n'.join(['file,instrument,midi_pitch', *rows]))
    return tmp_path


# sources

def test_orchestra_is_the_stated_one(orchestra):
    assert len(ORCHESTRA) == 12 and 'Viola' not in ORCHESTRA
    silent = orchestra.attrs['silent']
    assert all(n.startswith('Alto-Saxophone_064') for n in silent) and len(silent) == 3
    assert len(orchestra) + len(silent) == 3*sum(hi - lo + 1 for _, lo, hi in ORCHESTRA.values())
    for name, (program, lo, hi) in ORCHESTRA.items():
        own = orchestra[orchestra.instrument == name]
        assert (own.midi.min(), own.midi.max()) == (lo, hi) and set(own.program) == {program} and own.velocity.nunique() == 3
    assert list(orchestra)[:len(COLUMNS)] == list(COLUMNS)


def test_unknown_instrument_names_the_nearest():
    with pytest.raises(TableError, match="no instrument 'Cello'; did you mean"): orchestra_table(['Cello'])
    with pytest.raises(TableError, match='no notes left'): orchestra_table(['Flute'], (0, 10))


def test_rendered_clips_repeat_sound_and_are_not_silent(trio):
    a, b = load_clips(trio), load_clips(trio, cache=False)
    assert torch.equal(a, b) and a.dtype == torch.float32 and a.shape == (len(trio), 13230)
    assert (a.abs().amax(1) > 1e-3).all()
    alone = load_clips(trio.iloc[[17]].reset_index(drop=True), cache=False)
    assert torch.allclose(alone[0], a[17], atol=1e-5)  # the player may share work between neighbours


def test_louder_marks_are_louder(trio):
    level = load_clips(trio).square().mean(1).sqrt().numpy()
    by = trio.assign(level=level).pivot_table(index=['instrument', 'midi'], columns='velocity', values='level')
    assert (by[120] > by[40]).all()


def test_real_recordings_work_as_they_are():
    if shared_audio() is None: pytest.skip('no folder of recordings (set DISENTANGLE_AUDIO)')
    t = read_table(shared_audio())
    assert (len(t), t.instrument.nunique(), t.midi.nunique()) == (84, 6, 40)
    d = note_data(split_pitches(t), LogMel(n_mels=32))
    assert len(d) == 84 and torch.isfinite(d.x).all()
    for seed in range(50):
        s = split_pitches(t, seed=seed)
        assert not shared(s) and s[s.split == 'valid'].groupby('instrument').midi.nunique().eq(2).all()
        assert set(s[s.split == 'valid'].midi) <= set(s[s.split == 'train'].midi)


@pytest.mark.parametrize('header, row', [
    ('file,instrument,midi_pitch', 'Reed_57.wav,Reed,57'), ('midi,instrument,path', 'A3,Reed,Reed_57.wav'),
    (' file , instrument , midi_pitch ', ' Reed_57.wav , Reed , 57.0 '), ('\ufefffile,instrument,midi_pitch', './Reed_57.wav,Reed,a3'),
    ('file,instrument,midi_pitch,kind,dynamics', 'Reed_57.wav,Reed,57,note,ff\nsolo.wav,Reed,,solo,'),
    ('file,instrument,midi_pitch,source,midi_note', 'Reed_57.wav,Reed,57,"a, b",x')])
def test_folder_reads_what_people_write(folder, header, row):
    (folder/'metadata.csv').write_text(f'{header}\n{row}\n', encoding='utf-8')
    t = folder_table(folder)
    assert t[['name', 'instrument', 'midi', 'source']].values.tolist() == [['Reed_57.wav', 'Reed', 57, 'folder']]


@pytest.mark.parametrize('text, says', [
    ('', 'cannot be read as a table'), ('file,instrument,midi_pitch\n', 'no row for a note'),
    ('file,instrument,midi_pitch,kind\nReed_57.wav,Reed,57,solo', 'no row for a note'),
    ('file;instrument;midi_pitch\na;b;c', 'lacks the columns file, instrument, midi_pitch'),
    ('file,instrument\nReed_57.wav,Reed', 'lacks the column midi_pitch'),
    ('file,instrument,midi_pitch\nReed_57.wav,Reed,loud', "line 2: cannot read 'loud' as a pitch"),
    ('file,instrument,midi_pitch\nReed_57.wav,Reed,\n', "line 2: cannot read '' as a pitch"),
    ('file,instrument,midi_pitch\nReed_57.wav,Reed,60.5', 'whole MIDI number'), ('file,instrument,midi_pitch\nReed_57.wav,Reed,128', 'expected 0 to 127'),
    ('file,instrument,midi_pitch\nReed_57.wav,,57', 'line 2: the instrument is empty'),
    ('file,instrument,midi_pitch\nReed_57.wav,Reed,57\nReed_57.wav,String,57', 'more than once'),
    ('file,instrument,midi_pitch\nabsent.wav,Reed,57', 'not there: absent.wav'), ('file,instrument,midi_pitch\n,Reed,57', 'not there'),
    ('file,instrument,midi_pitch\n../x.wav,Reed,57', 'leads out of the folder'), ('file,instrument,midi_pitch\na/../../x.wav,Reed,57', 'leads out'),
    ('file,instrument,midi_pitch\n/etc/hostname,Reed,57', 'leads out of the folder'), ('file,instrument,midi_pitch\nC:\\x.wav,Reed,57', 'leads out'),
    ('file,instrument,midi_pitch\n..\\x.wav,Reed,57', 'leads out of the folder'), ('file,instrument,midi_pitch\n\\\\host\\x.wav,Reed,57', 'leads out')])
def test_folder_says_in_one_line_what_is_wrong(folder, text, says):
    (folder/'metadata.csv').write_text(text)
    with pytest.raises(TableError) as e: read_table(folder)
    message = str(e.value)
    assert says in message and 'metadata.csv' in message or 'more than once' in message
    assert '\n' not in message


def test_bad_encoding_and_no_metadata(folder, tmp_path_factory):
    (folder/'metadata.csv').write_bytes('file,instrument,midi_pitch\nReed_57.wav,Flöte,57'.encode('latin1'))
    with pytest.raises(TableError, match='expected UTF-8'): read_table(folder)
    (folder/'metadata.csv').unlink()
    with pytest.raises(TableError, match='8 audio files but no metadata.csv'): read_table(folder)
    with pytest.raises(TableError, match='neither audio files nor'): read_table(tmp_path_factory.mktemp('empty'))
    with pytest.raises(TableError, match='there is no folder'): read_table(folder/'nowhere')
    with pytest.raises(TableError, match='is a file'): read_table(folder/'Reed_57.wav')


TINYSOL_HEAD = ('Path,Fold,Family,Instrument (abbr.),Instrument (in full),Technique (abbr.),Technique (in full),Pitch,Pitch ID,Dynamics,Dynamics ID,'
                'Instance ID,String ID (if applicable),Needed digital retuning')


@pytest.mark.parametrize('audio, meta', [('', ''), ('audio', 'annotation'), ('TinySOL', ''), ('TinySOL2020', 'TinySOL2020')])
def test_tinysol_where_people_put_it(tmp_path, audio, meta):
    f = 'Brass/Bass_Tuba/ordinario/BTb-ord-A#1-ff-N-N.wav'
    (tmp_path/audio/f).parent.mkdir(parents=True); (tmp_path/meta).mkdir(exist_ok=True)
    save_audio(tmp_path/audio/f, tone(34, 44100), 44100)
    (tmp_path/meta/'TinySOL_metadata.csv').write_text(f'{TINYSOL_HEAD}\n{f},2,Brass,BTb,Bass Tuba,ord,ordinario,A#1,34,ff,4,0,,FALSE\n')
    t = read_table(tmp_path)
    assert t[['instrument', 'midi', 'dynamics', 'fold', 'source']].values.tolist() == [['Bass-Tuba', 34, 'ff', 2, 'tinysol']]
    assert load_clips(t).abs().max() > .1
    (tmp_path/audio/f).unlink()
    with pytest.raises(TableError, match='not there'): tinysol_table(tmp_path)


def test_nsynth_parts_families_and_damage(tmp_path):
    for name, keys in {'nsynth-train': ('bass_electronic_018-022-100', 'flute_acoustic_002-077-050'), 'nsynth-test': ('flute_acoustic_009-077-025',)}.items():
        (tmp_path/name/'audio').mkdir(parents=True)
        examples = {}
        for k in keys:
            ins, pitch, vel = k.split('-')
            family, made, _ = ins.split('_')
            examples[k] = dict(note=1, note_str=k, instrument=3, instrument_str=ins, pitch=int(pitch), velocity=int(vel), sample_rate=16000, qualities=[0]*10,
                               qualities_str=[], instrument_family=4, instrument_family_str=family, instrument_source=0, instrument_source_str=made)
            save_audio(tmp_path/name/'audio'/f'{k}.wav', tone(int(pitch), 16000), 16000)
        (tmp_path/name/'examples.json').write_text(json.dumps(examples))
    t = read_table(tmp_path)
    assert sorted(t.part) == ['test', 'train'] and set(t.midi) == {77} and t.instrument.nunique() == 2
    assert len(nsynth_table(tmp_path, sources=None)) == 3 and set(nsynth_table(tmp_path, by='instrument_family_str').instrument) == {'flute'}
    assert load_clips(t, sr=16000).shape == (2, 9600)
    examples['../../x'] = examples[k]
    (tmp_path/'nsynth-test'/'examples.json').write_text(json.dumps(examples))
    with pytest.raises(TableError, match='leads out'): nsynth_table(tmp_path)
    (tmp_path/'nsynth-test'/'examples.json').write_text('{"a": {"pitch": 60}}')
    with pytest.raises(TableError, match="not as NSynth's is"): nsynth_table(tmp_path)


# the release of the GMVAE features, in its true layout

@pytest.fixture(scope='module')
def release(tmp_path_factory): return lay_out(tmp_path_factory.mktemp('release'))


def test_release_matches_the_published_counts(release):
    t = gmvae_release(release)
    assert len(t) == 1885 and t.midi.nunique() == 82 and t.prefix.nunique() == 21
    assert (t.split == 'train').sum() == 1708 and (t.split == 'valid').sum() == 177
    valid = t[t.split == 'valid'].groupby('class_ref').size().tolist()
    assert t.groupby('class_ref').size().tolist() == [128, 214, 63, 194, 246, 138, 147, 99, 251, 180, 118, 107]
    assert valid == [12, 20, 6, 18, 24, 13, 14, 9, 23, 17, 11, 10]
    ref = {pitch_name(m): r for m, r in zip(t.midi, t.pitch_ref)}
    assert {k: ref[k] for k in ('A#0', 'A#6', 'A0', 'G6', 'D#6', 'D6', 'F#4', 'F5', 'C4', 'E4', 'G4', 'F#7')} == {
        'A#0': 0, 'A#6': 6, 'A0': 7, 'G6': 81, 'D#6': 40, 'D6': 47, 'F#4': 59, 'F5': 67, 'C4': 31, 'E4': 52, 'G4': 79, 'F#7': 62}
    assert list(t.key) == sorted(t.key) and set(RELEASE_DYNAMICS) == set(t.dynamics)
    assert read_table(release).equals(t) and gmvae_release(release/'data').equals(t) and gmvae_release(release/'data'/'spec-norm').equals(t)


def test_release_label_portions(release):
    t = gmvae_release(release)
    train = (t.split == 'train').to_numpy()
    masks = {p: label_mask(t.instrument, train, p, reference=True) for p in (0, .25, .5, .75, 1)}
    assert [int((m & train).sum()) for m in masks.values()] == [0, 420, 846, 1274, 1708]
    assert t.class_ref[masks[.25] & train].value_counts().sort_index().tolist() == [28, 48, 14, 43, 55, 31, 33, 22, 56, 40, 26, 24]
    assert all(m[~train].all() for m in masks.values())


def test_release_refuses_what_is_not_the_release(release, tmp_path):
    (tmp_path/'data'/'spec-norm').mkdir(parents=True)
    for f in list((release/'data'/'spec-norm').glob('[!.]*.pth'))[:-1]: (tmp_path/'data'/'spec-norm'/f.name).touch()
    with pytest.raises(TableError, match='1884 notes'): gmvae_release(tmp_path)
    (tmp_path/'data'/'spec-norm'/'Harp-ord-C4-mf-N-normalize.pth').touch()
    with pytest.raises(TableError, match='unknown prefixes Harp; known are EH_nA'): gmvae_release(tmp_path)
    (tmp_path/'data'/'spec-norm'/'notes.pth').touch()
    with pytest.raises(TableError, match='not named like a file of the release'): gmvae_release(tmp_path)
    t = gmvae_release(release)
    with pytest.raises(TableError, match='differs from valid_idx.npy in 2 rows'):
        good = np.load(release/'data'/'valid_idx.npy')
        split_reference(t, [*good[1:], next(i for i in range(1885) if i not in set(good))])


def test_release_tensors_are_checked_and_never_run(tmp_path):
    (tmp_path/'spec-norm').mkdir()
    names = [f'{p}-ord-{pitch_name(m)}-{d}-N-normalize.pth' for p in NOTES for m in range(60, 65) for d in ('ff', 'pp')]
    for n in names: torch.save(torch.rand(1, 256, 43)*2 - 1, tmp_path/'spec-norm'/n)
    t = gmvae_release(tmp_path, whole=False)
    assert release_features(t).shape == (210, 256, 43)
    d = note_data(t)
    assert d.vocabs == dict(timbre=list(RELEASE_CLASSES), pitch=[60, 61, 62, 63, 64]) and d.timbre.tolist() == t.class_ref.tolist()
    with pytest.raises(ValueError, match='without their feature'): note_augment(d)
    note_augment(d, feature=LogMel(), gain_db=3)
    with pytest.raises(TableError, match='features, not sound'): load_clips(t)

    f, flag = tmp_path/'spec-norm'/names[3], tmp_path/'ran'
    class Evil:
        def __reduce__(self): return os.system, (f'touch {flag}',)
    for bad, says in [(pickle.dumps(Evil()), 'not unpickled'), (b'', 'not unpickled'), (torch.zeros(256, 43), 'expected'), (torch.zeros(1, 256, 42), 'expected'),
                      ([1, 2], 'expected'), (torch.full((1, 256, 43), torch.nan), 'not finite'), (torch.full((1, 256, 43), -36.), 'spec-norm stay near')]:
        f.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, f)
        with pytest.raises(TableError, match=says) as e: release_features(t)
        assert names[3] in str(e.value)
    torch.save(Evil(), f)
    with pytest.raises(TableError, match='not unpickled'): release_features(t)
    assert not flag.exists()
    torch.save(torch.zeros(1, 256, 21), f)
    with pytest.raises(TableError, match='two releases'): release_features(t)
    for n in names: torch.save(torch.zeros(1, 256, 21), tmp_path/'spec-norm'/n)
    with pytest.warns(UserWarning, match='21 frames'): assert release_features(t).shape[-1] == 21


def test_release_range_uses_training_notes(tmp_path):
    (tmp_path/'spec').mkdir()
    for i, (p, m) in enumerate((p, m) for p in NOTES for m in range(60, 70)): torch.save(torch.full((1, 256, 43), i - 36.), tmp_path/'spec'/f'{p}-ord-{pitch_name(m)}-mf-N.pth')
    t = gmvae_release(tmp_path, norm=False, whole=False)
    x = release_features(t[t.split == 'train'])
    assert release_range(tmp_path) == (x.min().item(), x.max().item()) and x.max() - x.min() < 210


# splits

SPLITS = {'random': (split_random, ['name']), 'cells': (split_cells, ['instrument', 'midi']), 'zones': (split_zones, ['zone']),
          'zones, cells': (split_zones, ['instrument', 'midi']), 'pitches': (split_pitches, ['instrument', 'midi'])}


@pytest.mark.parametrize('kind', SPLITS)
def test_splits_share_nothing(orchestra, kind):
    split, columns = SPLITS[kind]
    drawn = set()
    for seed in range(40):
        s = split(orchestra, seed=seed)
        assert shared(s, columns) == []
        train, valid = s[s.split == 'train'], s[s.split == 'valid']
        assert len(train) + len(valid) == len(orchestra) and set(valid.instrument) <= set(train.instrument)
        if kind != 'random': assert set(valid.midi) <= set(train.midi) or kind == 'pitches'
        assert (.15 if kind == 'pitches' else .05) < len(valid)/len(s) < (.25 if kind == 'pitches' else .16)
        drawn.add(tuple(np.flatnonzero(s.split == 'valid')))
    assert len(drawn) == 40
    assert split(orchestra, seed=3).equals(split(orchestra, seed=3))


def test_cells_hold_all_dynamics_and_spread_over_instruments(orchestra):
    for seed in range(20):
        s = split_cells(orchestra, seed=seed)
        assert s.groupby(['instrument', 'midi']).split.nunique().eq(1).all()
        cells = s.drop_duplicates(['instrument', 'midi'])
        assert abs((cells.split == 'valid').mean() - .1) < .01
        assert cells[cells.split == 'valid'].instrument.nunique() >= 11


def test_zone_split_ties_notes_that_share_one_of_several_samples():
    t = notes.note_table([dict(name=str(i), instrument='A' if i < 6 else 'B', midi=60 + i % 6, zone=z)
                          for i, z in enumerate(['1:a+2:b', '2:b', '3:c', '4:d', '5:e', '6:f', '1:a', '7:g', '3:c', '8:h', '9:i', '10:j'])])
    g = notes.zone_groups(t)
    assert g[0] == g[1] == g[6] and g[2] == g[8] and len(set(g)) == 9
    with pytest.raises(TableError, match='no sample zones'): split_zones(t.assign(zone=''))


def test_reference_split_on_any_table(orchestra):
    s = split_reference(orchestra)
    n, v = orchestra.groupby('instrument').size(), s[s.split == 'valid'].groupby('instrument').size()
    assert (v == (.1*n).astype(int)).all()


def test_tiny_tables_cannot_be_split():
    t = notes.note_table([dict(name='a', instrument='Flute', midi=60), dict(name='b', instrument='Oboe', midi=61)])
    with pytest.raises(TableError, match='none of 2 groups'): split_cells(t)
    with pytest.raises(TableError, match='both parts need notes'): split_pitches(t)


def test_label_portions_are_nested_and_fair(orchestra):
    train = (split_cells(orchestra).split == 'train').to_numpy()
    for seed in range(5):
        before = np.zeros(len(train), bool) | ~train
        for p in (0, .01, .1, .25, .5, .75, 1):
            m = label_mask(orchestra.instrument, train, p, seed)
            assert (m | ~before).all() and m[~train].all()
            if p: assert (orchestra.instrument[m & train].value_counts() >= 1).sum() == 12
            assert abs((m & train).sum() - p*train.sum()) <= 12
            before = m
    assert not (label_mask(orchestra.instrument, train, 0) & train).any()
    with pytest.raises(ValueError, match='0 to 1'): label_mask(orchestra.instrument, train, 25)


# sound and its cache

def cache_files(kind): return sorted(Path(os.environ['DISENTANGLE_CACHE'], kind).glob('*.safetensors'))


def test_cache_is_keyed_by_content_and_parameters(folder):
    t, before = folder_table(folder), len(cache_files('clips'))
    a = load_clips(t)
    assert len(cache_files('clips')) == before + 1 and torch.equal(load_clips(t), a) and len(cache_files('clips')) == before + 1
    load_clips(t, dur=.3); load_clips(t, sr=16000)
    assert len(cache_files('clips')) == before + 3
    save_audio(folder/'Reed_57.wav', tone(58), 22050)  # same name, other sound
    b = load_clips(t)
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1:], b[1:])


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:len(b)//2], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: b + b'x',
                                    lambda b: pickle.dumps([1]), lambda b: b'\xff'*8 + b[8:]])
def test_damaged_cache_is_noticed_and_rebuilt(folder, damage):
    t = folder_table(folder)
    before = set(cache_files('clips'))
    good = load_clips(t, dur=.2)
    f = (set(cache_files('clips')) - before or before).pop() if len(set(cache_files('clips')) - before) == 1 else max(cache_files('clips'), key=lambda p: p.stat().st_mtime)
    f.write_bytes(damage(f.read_bytes()))
    with pytest.warns(UserWarning, match='is damaged'): assert torch.equal(load_clips(t, dur=.2), good)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(load_clips(t, dur=.2), good)


def test_cache_that_cannot_be_written_costs_time_only(folder, tmp_path_factory, monkeypatch):
    t, blocked = folder_table(folder), tmp_path_factory.mktemp('blocked')
    good = load_clips(t, cache=False)
    def full(path, *a, **k): raise OSError(28, 'No space left on device', str(path))
    monkeypatch.setattr(notes, 'atomic_path', full)
    monkeypatch.setenv('DISENTANGLE_CACHE', str(blocked))
    with pytest.warns(UserWarning, match='nothing was cached'): assert torch.equal(load_clips(t), good)
    assert not list(blocked.rglob('*.safetensors'))


def test_bad_files_are_named_and_may_be_left_out(folder):
    t = folder_table(folder)
    (folder/'Reed_57.wav').write_bytes(b'RIFF')
    save_audio(folder/'Reed_60.wav', torch.zeros(9000), 22050)
    with pytest.raises(AudioError, match='2 of 8 notes cannot be used: Reed_57.wav.*Reed_60.wav: silent'): load_clips(t)
    with pytest.raises(AudioError, match='larger max_bad than 0.1'): note_data(split_pitches(t), LogMel(n_mels=16))
    with pytest.warns(UserWarning, match='left out'): d = note_data(split_pitches(t), LogMel(n_mels=16), max_bad=.3)
    assert len(d) == len(d.table) == 6 and 'Reed_57.wav' not in set(d.table.name)
    assert [d.vocabs['timbre'][i] for i in d.timbre] == d.table.instrument.tolist()


def test_short_notes_end_in_silence_and_levels_are_kept_unless_asked(folder):
    save_audio(folder/'Reed_57.wav', .01*tone(57, dur=.1), 22050)
    t = folder_table(folder)
    wav = load_clips(t)
    assert wav[0, 2205:].abs().max() == 0 and wav[0].abs().max() < .01 < wav[1].abs().max()
    level = load_clips(t, rms_db=-20).square().mean(1).sqrt()
    assert torch.allclose(level, torch.full((8,), .1), atol=1e-4)


# tensors and batches

def test_note_data_rows_belong_together(data):
    assert [data.vocabs['timbre'][i] for i in data.timbre] == data.table.instrument.tolist()
    assert [data.vocabs['pitch'][i] for i in data.pitch] == data.table.midi.tolist()
    assert data.x.shape == (len(data.table), 64, 43) and data.x.dtype == torch.float32
    own = data.table['shift'] == 0
    assert set(data.table['shift']) == {-1, 0, 1} and (data.table.split[~own] == 'train').all()
    assert data.labelled[~torch.tensor(own.tolist())].tolist() == data.labelled[data.table.origin[~own].to_numpy()].tolist()
    valid = part(data, 'valid')
    assert valid.labelled.all() and len(valid) == (data.split == 'valid').sum() and len(part(data, [0, 5])) == 2


def test_shift_copies_sound_at_their_label(data, trio):
    from disentangle_nb.features.descriptors import note_f0
    d = note_data(split_cells(trio[trio.velocity == 120], held=.15), LogMel(n_mels=16), shifts=(-1, 1), keep_wav=True)
    f0 = note_f0(d.wav[:, 2000:], 22050)
    cents = 1200*torch.log2(f0/(440*2**((torch.tensor(d.table.midi.to_numpy(copy=True)) - 69)/12)))
    assert (cents.abs() < 40).float().mean() > .95


def test_copies_never_enter_a_held_out_cell(orchestra):
    for seed in range(20):
        s = shift_rows(split_cells(orchestra, seed=seed), (-3, -1, 1, 2))
        assert shared(s) == [] and set(s.midi) == set(orchestra.midi)
        assert (s[s['shift'] != 0].split == 'train').all()
    with pytest.raises(ValueError, match='whole semitones'): shift_rows(split_cells(orchestra), (.5,))


def test_features_do_not_depend_on_neighbours(trio):
    t = split_cells(trio)
    a, b = note_data(t, LogMel(n_mels=32), cache=False).x, note_data(t.iloc[5:9], LogMel(n_mels=32), cache=False).x
    assert torch.allclose(a[5:9][b > -.3], b[b > -.3], atol=1e-3)


def test_a_feature_with_other_arguments_is_another_cache(trio):
    t = split_cells(trio)
    a = note_data(t, LogMel(n_mels=32)).x
    b = note_data(t, LogMel(n_mels=32, hi=5.)).x
    c = note_data(t, LogMel(n_mels=32), fit_range=True)
    assert not torch.equal(a, b) and torch.equal(a, note_data(t, LogMel(n_mels=32)).x)
    assert c.x[c.mask('train')].max() <= 1 + 1e-5 and c.x[c.mask('train')].max() > .99


def test_alien_notes_and_wrong_arguments(trio, data):
    t = split_cells(trio)
    with pytest.raises(TableError, match='instrument Flute is not in the vocabulary'): note_data(t, LogMel(n_mels=16), vocabs=dict(timbre=['Violin', 'Oboe'], pitch=list(range(60, 72))))
    with pytest.raises(TableError, match='pitch 60, 61'): note_data(t, LogMel(n_mels=16), vocabs=dict(timbre=['Violin', 'Flute', 'Oboe'], pitch=list(range(62, 72))))
    with pytest.raises(ValueError, match='22050 Hz'): note_data(t, LogMel(n_mels=16), sr=16000)
    with pytest.raises(ValueError, match='give a feature'): note_data(t)
    with pytest.raises(ValueError, match='expected 43'): note_data(t, LogMel(n_mels=16), dur=.2)
    with pytest.raises(ValueError, match='no note is marked `valid`'): note_dls(note_data(trio, LogMel(n_mels=16)))


@pytest.mark.parametrize('n, bs, drop_last, sizes', [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (9, 4, False, [4, 5]), (8, 4, False, [4, 4]), (1, 4, False, [1]),
                                                     (3, 1, False, [1, 1, 1]), (5, 8, False, [5]), (9, 4, True, [4, 4])])
def test_batches_cover_everything_once(n, bs, drop_last, sizes):
    dl = BatchLoader([torch.arange(n), torch.arange(n)*2], bs, shuffle=True, seed=1, drop_last=drop_last)
    got = list(dl)
    assert [len(a) for a, _ in got] == sizes and len(dl) == len(sizes) and all((b == 2*a).all() for a, b in got)
    seen = torch.cat([a for a, _ in got]).tolist()
    assert len(set(seen)) == len(seen) and (drop_last or sorted(seen) == list(range(n)))


def test_order_depends_on_seed_and_epoch_only():
    t = [torch.arange(100.)]
    a, b, c = (BatchLoader(t, 32, shuffle=True, seed=s) for s in (0, 0, 1))
    first = [torch.cat([x for x, in a]) for _ in range(3)]
    torch.manual_seed(99); np.random.seed(1); b.one_batch(); b.epoch = 2
    assert torch.equal(torch.cat([x for x, in b]), first[2]) and not torch.equal(torch.cat([x for x, in c]), first[0])
    assert a.epoch == 3 and b.epoch == 3
    for x, in a: break  # a broken-off epoch does not count
    assert a.epoch == 3


def fit(data, epochs, start=None, state=None):
    from fastai.learner import Learner
    from fastai.callback.progress import ProgressCallback  # noqa: F401  (adds no_bar)
    augment = note_augment(data, max_shift=1, gain_db=6, tilt_db=3, eq_db=3, noise_db=(-100, -60), detune=.1)
    dls = note_dls(data, bs=32, seed=4, augment=augment)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64*43, 3))
    if state: model.load_state_dict(state); dls.train.epoch = start
    learn = Learner(dls, model, lambda out, timbre, pitch, labelled: torch.nn.functional.cross_entropy(out, timbre), opt_func=lambda p, lr, **k: sgd(p, lr))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return {k: v.clone() for k, v in model.state_dict().items()}, learn


def sgd(params, lr):
    from fastai.optimizer import SGD
    return SGD(params, lr=lr, mom=0., wd=0.)


def test_learner_resumes_to_the_same_weights(data):
    whole, learn = fit(data, 4)
    half, _ = fit(data, 2)
    rest, _ = fit(data, 2, start=2, state=half)
    assert all(torch.equal(whole[k], rest[k]) for k in whole) and not torch.equal(whole['1.weight'], half['1.weight'])
    preds, *targets = learn.get_preds(ds_idx=1)
    assert len(preds) == (data.split == 'valid').sum() and torch.equal(targets[0][0] if isinstance(targets[0], (tuple, list)) else targets[0], part(data, 'valid').timbre)


def test_validation_is_never_augmented_and_dls_look_right(data):
    dls = note_dls(data, bs=16, augment=note_augment(data, gain_db=20))
    x = torch.cat([b[0] for b in dls.valid])
    assert torch.equal(x, part(data, 'valid').x) and dls.n_inp == 1 and dls.device == torch.device('cpu')
    assert not torch.equal(dls.train.one_batch()[0], dls.train.new(augment=None).one_batch()[0])
    assert len(dls.train_ds) == (data.split == 'train').sum() and len(dls.train_ds[0]) == 4
    assert 'BatchLoader' in repr(dls.train)


def test_augment_off_is_identity_and_seeded(data):
    b = BatchLoader((data.x, data.timbre, data.pitch, data.labelled), 50).one_batch()
    assert all(torch.equal(u, v) for u, v in zip(note_augment(data)(b, make_generator(0)), b))
    a = note_augment(data, max_shift=2, p_shift=1., gain_db=6, tilt_db=3, eq_db=3, noise_db=(-110, -60), detune=.2)
    one, two, other = a(b, make_generator(0)), a(b, make_generator(0)), a(b, make_generator(1))
    assert all(torch.equal(u, v) for u, v in zip(one, two)) and not torch.equal(one[0], other[0])
    assert torch.isfinite(one[0]).all() and one[0].shape == b[0].shape and torch.equal(one[1], b[1]) and torch.equal(one[3], b[3])
    with pytest.raises(ValueError, match='softest, loudest'): note_augment(data, noise_db=(-10, -60))


def test_augment_shifts_label_and_spectrum_together(data):
    a = note_augment(data, max_shift=2, p_shift=1.)
    train = part(data, 'train')
    valid = part(data, 'valid')
    held, moved = set(zip(valid.timbre.tolist(), valid.pitch.tolist())), set()
    for seed in range(20):
        x, timbre, pitch, _ = a((train.x, train.timbre, train.pitch, train.labelled), make_generator(seed))
        k = pitch - train.pitch
        moved |= set(k.tolist())
        assert not held & set(zip(timbre.tolist(), pitch.tolist()))
        assert torch.equal(x[k == 0], train.x[k == 0]) and torch.allclose(x, batches.shift_bands(train.x, k.float(), a.centres), atol=1e-6)
    assert moved == {-2, -1, 0, 1, 2}


def test_shift_of_bands_against_the_function_it_moves():
    centres = batches.band_centres(LogMel())
    def bump(f, at): return torch.exp(-(f/at).log2().square()/(2*.15**2))
    at, k = torch.tensor([220., 440., 1000., 3000.]), torch.tensor([-2., .3, 5., 12.])
    x = bump(centres, at[:, None])[..., None].expand(-1, -1, 3)
    wanted = bump(centres, (at*2**(k/12))[:, None])
    got = batches.shift_bands(x, k, centres)
    assert (got[..., 1] - wanted).abs().max() < .05 and torch.equal(batches.shift_bands(x, torch.zeros(4), centres), x)
    assert torch.equal(got[2:3], batches.shift_bands(x[2:3], k[2:3], centres))


def test_gain_and_tilt_mean_what_they_say():
    centres = torch.tensor([250., 500., 1000., 2000.])
    x = torch.zeros(1000, 4, 2)
    batch = (x, torch.zeros(1000, dtype=torch.long), torch.zeros(1000, dtype=torch.long), torch.ones(1000, dtype=torch.bool))
    db = lambda y: y*(9.7666 + 36.0437)/2*10/np.log(10)
    gain = db(Augment(-36.0437, 9.7666, centres, gain_db=6)(batch, make_generator(0))[0])
    assert torch.allclose(gain.amax((1, 2)), gain.amin((1, 2)), atol=1e-4) and 5.9 < gain.max() <= 6 and -6 <= gain.min() < -5.9
    tilt = db(Augment(-36.0437, 9.7666, centres, tilt_db=3)(batch, make_generator(0))[0])[..., 0]
    assert torch.allclose(tilt[:, 2], torch.zeros(1000), atol=1e-5) and torch.allclose(tilt[:, 0], -2*tilt[:, 3], atol=1e-4) and 2.9 < tilt[:, 3].max() <= 3
    eq = db(Augment(-36.0437, 9.7666, torch.linspace(50, 9000, 64), eq_db=3)((torch.zeros(1000, 64, 1), *batch[1:]), make_generator(0))[0])
    assert 2 < eq.std() < 4
    silent = (torch.full_like(x, -1.), *batch[1:])
    assert torch.equal(Augment(-36.0437, 9.7666, centres, gain_db=60, tilt_db=9)(silent, make_generator(0))[0], silent[0])
    noise = db(Augment(-36.0437, 9.7666, centres, noise_db=(-60, -60))(silent, make_generator(0))[0]) - db(torch.ones(1))
    assert abs(10*torch.log10((10**(noise/10)).mean()) + 60) < .5


def test_a_training_step_runs_no_python_per_note():
    x = torch.zeros(2000, 256, 43)
    dl = BatchLoader((x, torch.zeros(2000), torch.zeros(2000), torch.zeros(2000)), 128, shuffle=True)
    calls = []
    def count(frame, event, arg): calls.append(1) if event in ('call', 'c_call') else None
    sys.setprofile(count)
    try: n = sum(1 for _ in dl)
    finally: sys.setprofile(None)
    assert len(calls) < 40*n, f'{len(calls)} calls for {n} batches of 128'


def test_import_is_light():
    code = ("import sys, disentangle_nb.data.batches as b; heavy = [m for m in ('fastai', 'librosa', 'sklearn', 'matplotlib', 'soxr') if m in sys.modules]; "
            "print(','.join(heavy))")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() in ('', 'soxr')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_batches_and_augmentation_on_a_gpu(data):
    augment = note_augment(data, max_shift=1, gain_db=6, noise_db=(-100, -60))
    cpu, gpu = (note_dls(data, bs=32, seed=2, device=d, augment=augment) for d in ('cpu', 'cuda'))
    for a, b in zip(cpu.train, gpu.train):
        assert b[0].device.type == 'cuda' and torch.equal(a[2], b[2].cpu()) and torch.isfinite(b[0]).all()


def test_pitch_names():
    assert [midi_of(pitch_name(m)) for m in range(128)] == list(range(128))
    assert batches.band_centres(LogMel()).shape == (256,)

"The commands as their users meet them: processes, exit statuses, one line a mistake, and nothing half-written."
import configparser, importlib, json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from disentangle_nb import cli
from disentangle_nb.audio import load_audio, resample, save_audio
from disentangle_nb.core import shared_audio
from disentangle_nb.features.track import track_pitch
from disentangle_nb.models.system import Disentangler
from release import lay_out

root = Path(__file__).resolve().parents[1]
PARTIALS = dict(Diapason=[1, .5, .3, .2], Gedackt=[1, 0, .4, 0, .2], Trompette=[.6, .8, 1, .8, .6, .4])
TINY = ['--profile', 'quick', *(w for s in ('epochs=3', 'bs=16', 'n_mels=64', 'shifts=1') for w in ('--set', s))]


def tone(midi, partials, sr=16000, dur=.7):
    t = np.arange(int(sr*dur))/sr
    wave = sum(a*np.sin(2*np.pi*440*2**((midi - 69)/12)*(i + 1)*t) for i, a in enumerate(partials))
    return torch.tensor(.3*wave*np.minimum(1, t/.02)*np.exp(-t)).float()


def collection(folder, midi=range(57, 67), partials=PARTIALS):
    "A folder of notes with its metadata.csv; pitches for all, or for each."
    rows = ['file,instrument,midi_pitch']
    for name, p in partials.items():
        for m in midi[name] if isinstance(midi, dict) else midi:
            save_audio(folder/f'{name}-{m}.wav', tone(m, p), 16000)
            rows.append(f'{name}-{m}.wav,{name},{m}')
    (folder/'metadata.csv').write_text('\n'.join(rows))
    return folder


def process(name, *args, cwd, **kw):
    return subprocess.Popen([sys.executable, '-c', f'from disentangle_nb.cli import {name}; raise SystemExit({name}())', *map(str, args)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)], **kw)  # a suite begun in the background ignores them, and so would this


def finish(p, timeout=300):
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, err


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    "Nothing of this user's cache is read or written; processes inherit it."
    old = dict(os.environ)
    os.environ.update(DISENTANGLE_CACHE=str(tmp_path_factory.mktemp('cache')), OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', PYTHONPATH=str(root), IN_TEST='1')
    yield
    os.environ.clear(); os.environ.update(old)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a collection of notes and a finished run of them, trained by a process."
    at = tmp_path_factory.mktemp('place')
    collection(at/'organ')
    status, out, err = finish(process('train', 'gmvae', '--data', 'organ', '--out', 'run', *TINY, cwd=at))
    assert status == 0, err
    assert 'wrote run' in out and 'timbre code -> instrument' in out and 'epoch 3/3' in err
    (at/'letters').mkdir(); (at/'letters/to-mother.txt').write_text('Dear mother,')
    (at/'empty').mkdir()
    return at


def listing(at): return {str(p.relative_to(at)): p.stat().st_mtime_ns for p in at.rglob('*') if p.is_file()} | {str(p.relative_to(at)): 0 for p in at.rglob('*') if p.is_dir()}


def refused(capsys, at, command, args, *says):
    "The command ends with status 2, one line that says these things, and the folder is as before."
    before, here = listing(at), os.getcwd()
    os.chdir(at)
    try: status = getattr(cli, command)([str(a) for a in args])
    finally: os.chdir(here)
    lines = [l for l in capsys.readouterr().err.splitlines() if re.match(r'disentangle_\w+: ', l)]
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"disentangle_{dict(evaluate='eval').get(command, command)}: error: "), lines[0]
    for word in says: assert word in lines[0], (word, lines[0])
    assert listing(at) == before


def test_every_console_script_leads_somewhere():
    config = configparser.ConfigParser()
    config.read(root/'settings.ini')
    scripts = dict(s.split('=') for s in config['DEFAULT']['console_scripts'].split())
    assert {'disentangle_train', 'disentangle_eval', 'disentangle_transfer', 'disentangle_separate', 'disentangle_convert', 'disentangle_explore', 'disentangle_syntone', 'disentangle_demo'} <= set(scripts)
    for target in scripts.values():
        module, _, name = target.partition(':')
        assert callable(getattr(importlib.import_module(module), name)), target


@pytest.mark.parametrize('command, words', [('train', ('--set KEY=VALUE', 'preset=tv, linear', 'move_multi if not given', 'method=vae', 'hour on two cores', 'default: cpu', 'metadata.csv', 'in seconds')), ('evaluate', ('RUN', '--json FILE')),
                                            ('transfer', ('semitones', 'from 0 to 1', 'default: 1.0', 'same|length')), ('explore', ('explore.html', 'JupyterLab')), ('separate', ('accompaniment.wav', 'default: 20.0', 'in seconds', 'ffmpeg')), ('demo', ('default: out/demo',))])
def test_help_states_units_and_defaults(capsys, command, words):
    with pytest.raises(SystemExit) as e: getattr(cli, command)(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and 'default: None' not in text
    assert all(any(v in text for v in w.split('|')) for w in words)


@pytest.mark.parametrize('name', [k for k, d in cli.STUDIES.items() if d.rows])
def test_help_lists_the_rows_that_a_study_has(name):
    (key, usual, rows), study = cli.STUDIES[name].rows, cli.STUDIES[name].module()
    assert rows.split() == [*(study.PRESETS if key == 'preset' else study.METHODS)]
    args = cli.train_parser().parse_args([name])
    assert getattr(cli.STUDIES[name].card(args), key) == usual


def test_help_imports_no_study():
    code = "import sys, contextlib; from disentangle_nb import cli\nwith contextlib.suppress(SystemExit): cli.train(['--help'])\nprint([m for m in sys.modules if m.startswith('disentangle_nb.studies')])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_a_run_holds_what_it_should(place):
    run = place/'run'
    assert {p.name for p in run.iterdir()} == {'card.json', 'weights.safetensors', 'run.json', 'result.json', 'log.csv'}
    result = json.loads((run/'result.json').read_text())
    assert result['card']['epochs'] == 3 and result['run']['settings'] == result['card'] and result['run']['provenance']['versions']['torch']
    assert set(result['probes']) >= {'timbre->timbre', 'timbre->pitch', 'baseline->timbre'} and result['skipped']
    log = (run/'log.csv').read_text().splitlines()
    assert len(log) == 4 and 'valid_recon' in log[0]
    assert Disentangler.load(run, 'cpu').vocabs['timbre'] == list(PARTIALS)


def test_killed_and_interrupted_training_ends_with_the_same_weights(place, capsys):
    def begin(out, *more): return process('train', 'gmvae', '--data', 'organ', '--out', out, '--every', '0', *TINY, '--set', 'epochs=40', *more, cwd=place)
    def stop(p, how, after):
        deadline = time.time() + 300
        seen = lambda: [q for q in (place/'killed/checkpoints').glob('checkpoint-*.safetensors') if int(q.stem[-6:]) >= after]  # old ones are removed, so one number may be missed
        while p.poll() is None and time.time() < deadline and not seen(): time.sleep(.02)
        time.sleep(random.random()*.1)
        p.send_signal(how)
        return finish(p)
    assert stop(begin('killed'), signal.SIGKILL, 1)[0] == -signal.SIGKILL
    assert not (place/'killed/card.json').exists()
    again = ['gmvae', '--data', 'organ', '--out', 'killed', *TINY, '--set', 'epochs=40']
    refused(capsys, place, 'train', again, '--resume')
    refused(capsys, place, 'train', [*again, '--resume', '--set', 'lr=.001'], 'lr was 0.002, is 0.001')
    status, _, err = stop(begin('killed', '--resume'), signal.SIGINT, 10)
    assert status == 130 and err.rstrip().endswith('interrupted') and 'Traceback' not in err, err
    for out, how in (('killed', ['--resume']), ('whole', [])):
        status, _, err = finish(begin(out, *how))
        assert status == 0, err
        assert not (place/out/'checkpoints').exists()
    assert (place/'killed/weights.safetensors').read_bytes() == (place/'whole/weights.safetensors').read_bytes()
    assert (place/'killed/log.csv').read_text() == (place/'whole/log.csv').read_text()


@pytest.mark.parametrize('args, says', [
    (['symphony'], ["no study 'symphony'", 'gmvae']),
    (['gmvea'], ["did you mean 'gmvae'?"]),
    (['interval'], ["did you mean 'intervals'?"]),
    (['intervals', '--data', 'absent.txt'], ['absent.txt']),
    (['intervals', '--set', 'reach=500'], ['reach lies from 0 to 119']),
    (['intervals', '--recipe', 'few_labels'], ['without labels']),
    (['gmvae', '--data', 'orgel'], ['there is no folder orgel']),
    (['gmvae', '--data', 'letters'], ['neither audio files nor a metadata.csv']),
    (['gmvae', '--data', 'organ/Diapason-57.wav'], ['is a file']),
    (['gmvae', '--set', 'epoch=3'], ["did you mean 'epochs'?"]),
    (['gmvae', '--set', 'epochs=many'], ['epochs should be int', "'many'"]),
    (['gmvae', '--set', 'epochs'], ['name=value']),
    (['gmvae', '--set', 'epochs=0'], ['more than 0']),
    (['gmvae', '--set', 'bs=1'], ['at least 2']),
    (['gmvae', '--set', 'held=1.5'], ['share from 0 to 1']),
    (['gmvae', '--set', 'weights.beauty=1'], ['weights.beauty', 'no such weight']),
    (['gmvae', '--set', 'split=cell'], ["no 'cell'", 'pitches']),
    (['gmvae', '--set', 'weights={"beauty": 1.0}'], ['no such weight', 'recon']),
    (['gmvae', '--set', 'latent=15'], ['latent=15', 'even']),
    (['gmvae', '--profile', 'tiny'], ['invalid choice', 'quick']),
    (['gmvae', '--seed', '-1'], ['--seed -1']),
    (['gmvae', '--seed', 'x'], ['invalid int value']),
    (['gmvae', '--device', 'abacus'], ['abacus', 'auto, cpu']),
    (['gmvae', '--device', 'cuda:99'], ['cuda:99']),
    (['gmvae', '--out', 'letters'], ['other files']),
    (['gmvae', '--out', 'organ/metadata.csv'], ['is a file']),
    (['gmvae', '--out', 'organ/metadata.csv/run'], ['cannot write']),
    (['gmvae', '--data', 'organ', '--out', 'run', *TINY], ['finished run']),
    (['gmvae', '--data', 'organ', '--out', 'run', *TINY, '--set', 'lr=.1', '--resume'], ['lr was 0.002, is 0.1']),
    (['gmvae', '--colour', 'red'], ['unrecognized arguments']),
    ([], ['required: STUDY'])])
def test_train_refuses(capsys, place, args, says): refused(capsys, place, 'train', args, *says)


@pytest.mark.parametrize('spoil, says', [
    (lambda d: (d/'Diapason-60.wav').unlink(), ['Diapason-60.wav', 'not there']),
    (lambda d: (d/'metadata.csv').unlink(), ['audio files but no metadata.csv']),
    (lambda d: (d/'metadata.csv').write_text('file,pitch\na.wav,60'), ['lacks the column instrument']),
    (lambda d: (d/'metadata.csv').write_text((d/'metadata.csv').read_text().replace(',60', ',high')), ['line', 'high']),
    (lambda d: [p.write_bytes(b'') for p in d.glob('Diapason*.wav')], ['bad'])])
def test_train_refuses_a_damaged_collection(capsys, place, tmp_path, spoil, says):
    shutil.copytree(place/'organ', tmp_path/'organ')
    spoil(tmp_path/'organ')
    refused(capsys, tmp_path, 'train', ['gmvae', '--data', 'organ', *TINY], *says)


def test_the_orchestra_without_its_soundfont(capsys, place, monkeypatch):
    from disentangle_nb.data import notes
    find = importlib.util.find_spec
    notes._font.cache_clear()
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'pretty_midi' else find(n, *a))
    refused(capsys, place, 'train', ['gmvae', *TINY, '--out', 'other'], "pip install 'disentangle_nb[soundfont]'")


def test_a_loss_that_is_not_a_number_is_told(capsys, place, tmp_path):
    status = cli.train(['gmvae', '--data', str(place/'organ'), '--out', str(tmp_path/'run'), *TINY, '--set', 'lr=1e30'])
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and 'the loss became' in line and 'step' in line and 'checkpoint' in line
    assert not (tmp_path/'run/card.json').exists()


def test_a_bug_keeps_its_traceback(place, monkeypatch):
    monkeypatch.setattr(cli, 'load_notes', lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): cli.evaluate([str(place/'run')])


def test_eval_repeats_the_numbers_of_the_run(place, tmp_path, capsys):
    assert cli.evaluate([str(place/'run'), '--json', str(tmp_path/'numbers.json')]) == 0
    again, first = (json.loads(p.read_text()) for p in (tmp_path/'numbers.json', place/'run/result.json'))
    assert all(v == first['probes'][k] for k, v in again['probes'].items() if not k.startswith('dimensions'))  # those are sums of float32
    assert str(tmp_path/'numbers.json') in capsys.readouterr().out


def spoilt_run(place, at, how):
    shutil.copytree(place/'run', at/'run')
    w, c = at/'run/weights.safetensors', at/'run/card.json'
    if how == 'cut short': w.write_bytes(w.read_bytes()[:1000])
    if how == 'a pickle': w.write_bytes(b'\x80\x04K\x01.')
    if how == 'no weights': w.unlink()
    if how == 'no card': c.unlink()
    if how == 'garbled card': c.write_text('{"format": ')
    if how == 'foreign card': c.write_text('{"name": "something else"}')
    if how == 'from the future': c.write_text(c.read_text().replace('"version": 1', '"version": 99', 1))


@pytest.mark.parametrize('command', ['evaluate', 'transfer'])
@pytest.mark.parametrize('how, says', [('cut short', 'damaged'), ('a pickle', 'pickle'), ('no weights', 'missing'), ('no card', 'unfinished'), ('garbled card', 'JSON'),
                                       ('foreign card', 'not the card of a system'), ('from the future', 'version 99')])
def test_a_spoilt_run_is_refused(capsys, place, tmp_path, command, how, says):
    spoilt_run(place, tmp_path, how)
    refused(capsys, tmp_path, command, ['run', *([place/'organ/Diapason-60.wav', '--to', 'Gedackt'] if command == 'transfer' else [])], says)


def test_eval_refuses_what_the_system_cannot_name(capsys, place, tmp_path):
    shutil.copytree(place/'run', tmp_path/'run')
    collection(tmp_path/'misspelt', range(58, 64), {'Diapasson': [1], 'Gedackt': [1, 0, 1]})
    collection(tmp_path/'high', range(80, 84), {'Gedackt': [1, 0, 1]})
    refused(capsys, tmp_path, 'evaluate', ['run', '--data', 'misspelt'], 'Diapasson', 'did you mean Diapason?', '--known-only')
    refused(capsys, tmp_path, 'evaluate', ['run', '--data', 'high'], 'pitch 80', '57 to 66')
    refused(capsys, tmp_path, 'evaluate', ['run', '--data', 'nowhere'], 'there is no folder')
    refused(capsys, tmp_path, 'evaluate', ['run', '--json', 'high/metadata.csv/x.json'], 'cannot write')


@pytest.mark.parametrize('args, says', [
    (['run', 'organ/Gedackt-60.wav'], ['--to', '--pitch']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'trompete'], ['did you mean Trompette?']),
    (['run', 'organ/Gedackt-60.wav', '--pitch', '40'], ['+40 semitones', '57 to 66']),
    (['run', 'organ/Gedackt-65.wav', '--pitch', '9'], ['trained on 57 to 66']),
    (['run', 'organ/Gedackt-60.wav', '--pitch', '.5'], ['invalid int value']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'Diapason', '--alpha', '3'], ['from 0']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'Diapason', '--out', 'organ/Gedackt-60.wav'], ['overwritten']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'Diapason', '--out', 'organ/metadata.csv/x.wav'], ['cannot write']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'Diapason', '--out', 'x.docx'], ['names no format']),
    (['run', 'organ/Gedackt-60.wav', '--to', 'Diapason', '--device', 'cuda:77'], ['cuda:77']),
    (['run', 'absent.wav', '--to', 'Diapason'], ['absent.wav: no such file']),
    (['run', 'organ', '--to', 'Diapason'], ['is a folder']),
    (['run', 'letters/to-mother.txt', '--to', 'Diapason'], ['not readable as audio']),
    (['nowhere', 'organ/Gedackt-60.wav', '--to', 'Diapason'], ['no saved system']),
    (['letters', 'organ/Gedackt-60.wav', '--to', 'Diapason'], ['not a saved system'])])
def test_transfer_refuses(capsys, place, args, says): refused(capsys, place, 'transfer', args, *says)


def test_transfer_as_a_process(place):
    save_audio(place/'été 1.wav', torch.stack([tone(60, [1, .5], 44100, 1.3)]*2), 44100)
    status, out, err = finish(process('transfer', 'run', 'été 1.wav', '--to', 'Trompette', '--pitch', '2', cwd=place))
    assert status == 0, err
    written = place/'out/été 1-Trompette-+2.wav'
    assert f'wrote {written.relative_to(place)}' in out
    wav, sr = load_audio(written, mono=False)
    assert sr == 44100 and wav.shape == (1, int(44100*1.3))


def sung(path):
    "Pitches that a file has, as MIDI numbers."
    track = track_pitch(resample(*load_audio(path), 22050))
    return track.midi[track.voiced]


def melody(path, *notes, dur=.7):
    "A track of notes, one after the other, each as long."
    at = lambda t: 440*2**((notes[min(int(t/dur*len(notes)), len(notes) - 1)] - 69)/12)
    path.write_text('time,frequency\n' + ''.join(f'{t:.2f},{at(t):.3f}\n' for t in np.arange(0, dur + .005, .01)))


def test_a_hiss_is_given_the_melody_of_a_track(tmp_path, capsys):
    save_audio(tmp_path/'hiss.wav', .1*torch.randn(11200, generator=torch.Generator().manual_seed(0)), 16000)
    melody(tmp_path/'melody.csv', 67, 72)
    assert cli.transfer(['move-small', tmp_path/'hiss.wav', '--to', 'Violin', '--f0', tmp_path/'melody.csv', '--out', tmp_path/'out.wav']) == 0
    told = capsys.readouterr()
    assert told.out == f"wrote {tmp_path/'out.wav'}\n" and 'warning' not in told.err
    (wav, sr), midi = load_audio(tmp_path/'out.wav'), sung(tmp_path/'out.wav')
    assert (sr, len(wav)) == (16000, 11200) and len(midi) > 25  # of 31 points
    assert abs(midi[:10].median() - 67) < .5 and abs(midi[-10:].median() - 72) < .5  # within half a semitone


def test_who_plays_can_be_said(tmp_path, capsys):
    save_audio(tmp_path/'in.wav', tone(69, PARTIALS['Trompette']), 16000)
    said = {}
    for name in ('Trumpet', 'Clarinet-Bb'):
        assert cli.transfer(['move-small', tmp_path/'in.wav', '--to', 'Violin', '--from', name, '--out', tmp_path/f'{name}.wav']) == 0
        said[name] = load_audio(tmp_path/f'{name}.wav')[0]
        assert abs(sung(tmp_path/f'{name}.wav').median() - 69) < .5
    assert (said['Trumpet'] - said['Clarinet-Bb']).abs().max() > .01
    assert not capsys.readouterr().err


def test_a_low_note_is_folded_into_the_range(tmp_path, capsys):
    save_audio(tmp_path/'low.wav', tone(45, PARTIALS['Trompette']), 16000)
    assert cli.transfer(['move-small', tmp_path/'low.wav', '--to', 'Violin', '--fold', '--out', tmp_path/'out.wav']) == 0
    assert 'A2' in (err := capsys.readouterr().err) and 'moved into it by octaves' in err
    midi = sung(tmp_path/'out.wav')
    assert len(midi) > 25 and (midi > 54.5).all() and (midi < 79.5).all() and abs(midi.median() - 57) < .5  # G3 to G5; from A2 it is one octave


@pytest.mark.parametrize('run, args, says', [('move-small', ['--from', 'Tuba'], ['Tuba', 'Alto-Saxophone, Clarinet-Bb, Trumpet, Violin']), ('move-small', ['--f0', 'none.csv'], ['none.csv', "can't be read"]),
                                             ('move-small', ['--f0', 'ms.csv'], ['milliseconds']), ('notes-small', ['--from', 'Violin'], ['by itself']), ('notes-small', ['--fold'], ['by itself'])])
def test_transfer_refuses_what_it_cannot_be_told(capsys, tmp_path, run, args, says):
    save_audio(tmp_path/'in.wav', tone(69, [1, .5]), 16000)
    (tmp_path/'ms.csv').write_text('0,440\n350,440\n700,440\n')
    refused(capsys, tmp_path, 'transfer', [run, 'in.wav', '--to', 'Violin', *args], *says)


@pytest.mark.parametrize('notes, says', [(dict(Diapason=range(66, 78)), 'two instruments'), (dict(Diapason=range(66, 72), Gedackt=range(72, 78)), 'shared'),
                                         (dict(Diapason=range(40, 44), Gedackt=range(40, 44)), 'no note')])
def test_move_refuses_notes_without_pairs_before_it_trains(capsys, tmp_path, notes, says):
    collection(tmp_path/'organ', notes, {name: PARTIALS[name] for name in notes})
    refused(capsys, tmp_path, 'train', ['move', '--profile', 'quick', '--data', 'organ', '--out', 'run'], says)


def test_real_recordings_keep_their_length(place, tmp_path):
    real = shared_audio()
    if real is None: pytest.skip('no real recordings here: set DISENTANGLE_AUDIO')
    for src in [next((real/'notes/Flute').glob('*.flac')), next((real/'solos').glob('*.flac'))]:
        assert cli.transfer([place/'run', src, '--to', 'Gedackt', '--out', tmp_path/'out.wav']) == 0
        (was, sr), (now, rate) = load_audio(src), load_audio(tmp_path/'out.wav')
        assert rate == sr and now.shape == was.shape and now.abs().max() > 0


def test_real_recordings_train_and_evaluate(tmp_path, capsys):
    real = shared_audio()
    if real is None: pytest.skip('no real recordings here: set DISENTANGLE_AUDIO')
    run = tmp_path/'run'
    assert cli.train(['gmvae', '--data', real, '--out', run, *TINY]) == 0
    assert cli.evaluate([run, '--data', real, '--json', tmp_path/'n.json']) == 0
    assert 'logistic regression' in capsys.readouterr().out and json.loads((tmp_path/'n.json').read_text())['probes']
    card = json.loads((run/'run.json').read_text())['settings']
    assert card['split'] == 'auto' and card['held'] == .25


def test_small_collections_get_settings_of_their_own(place):
    args = cli.train_parser().parse_args(['gmvae', '--data', str(place/'organ'), '--set', 'channels=17'])
    notes = lambda n: pd.DataFrame(dict(source=['folder']*n))
    card = cli.make_card(args, notes(30))
    two = cli.make_card(cli.train_parser().parse_args(['gmvae', '--set', 'weights.recon=2']))
    assert two.weights['recon'] == 2 and two.weights['adversary'] == 20
    assert card.channels == 17 and card.eq_db == cli.SMALL['eq_db'] and card.shifts == cli.SMALL['shifts']
    assert cli.make_card(args, notes(5000)).eq_db != cli.SMALL['eq_db']


@pytest.mark.parametrize('recipe', ['faithful', 'ours'])
def test_the_release_goes_through_the_whole_protocol_but_sound(tmp_path, capsys, recipe):
    data = lay_out(tmp_path/'release', sounding=True)
    assert cli.train(['gmvae', '--data', data, '--recipe', recipe, '--out', tmp_path/'run', '--profile', 'quick', '--set', 'epochs=2']) == 0
    system = Disentangler.load(tmp_path/'run')
    assert (len(system.vocabs['timbre']), len(system.vocabs['pitch'])) == (12, 82) and abs(system.feature.hi.item() - 8) < 4
    from disentangle_nb.studies.gmvae import GMVAECard, evaluate_study, study_data, study_judges
    card = GMVAECard.from_dict(system.card['settings'])
    notes = study_data(card)
    assert (notes.split == 'valid').sum() == 177 and notes.x.min() >= -1.01 and notes.x.max() <= 1.01
    found = evaluate_study(system, notes, study_judges(card, epochs=2))
    assert found['probes']['baseline->pitch']['acc'] > .8 and 'baseline64->pitch' not in found['probes']
    assert 'components' in found and 'transfer' in found and 'pitch_edit' not in found and 'swap' not in found
    assert 'best logistic regression' in capsys.readouterr().out


@pytest.mark.parametrize('setting, says', [('n_bins=120', 'multiple of 25'), ('columns=1', 'columns is 2 or more'), ('epochs=0', 'epochs is more than 0'), ('dur=.1', 'at least one slice'),
                                           ('low=90', 'low before high'), ('slope=2', 'slope'), ('weights={"wind": 1}', 'no such weight: wind'), ('division=7', 'five divisions')])
def test_move_refuses_settings_before_it_renders(capsys, tmp_path, setting, says):
    refused(capsys, tmp_path, 'train', ['move', '--profile', 'quick', '--set', setting, '--out', 'run'], says)

"The file of tones as its users meet it: the published command line, both layouts, one line a mistake, and nothing half-written."
import json, os, shutil, signal, subprocess, sys, time, warnings
from types import SimpleNamespace

import numpy as np, pytest, torch
from scipy import signal as scipy_signal

from disentangle_nb import cli
from disentangle_nb.data.syntone import WAVES, Tones, read_tones
from test_cli import finish, process, refused

SMALL = ['--num_freqs', '3', '--num_amps', '2', '--duration', '.25']
LARGE = ['--compat', '--num_freqs', '100', '--num_amps', '20']  # a gigabyte to compress: most of a minute


def write(at, *args):
    "Run the command in a folder, in this process."
    here = os.getcwd()
    os.chdir(at)
    try: return cli.syntone(args)
    finally: os.chdir(here)


def test_help_lists_the_published_flags_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as e: cli.syntone(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and 'default: None' not in text
    for flag in ('--sample_rate HZ in Hz (default: 16000)', '--freq_start HZ lowest frequency, in Hz (default: 440.0)', '(default: 0.15 of the sample rate',
                 '--num_freqs N number of frequencies (default: 400)', 'lowest amplitude, linear (default: 0.1)', 'highest amplitude, linear (default: 1.0)',
                 '--num_amps N number of amplitudes (default: 20)', '(default: ./Dataset/dataset_32K.npz)', 'with --compat half the sample rate'): assert flag in text, flag


def test_published_defaults_are_kept():
    def asked(*argv): return cli.tone_levels(cli.syntone_parser().parse_args(cli.spelled(argv)))
    world = Tones(*asked('--compat'), compat=True)
    assert world.args == Tones(compat=True).args and len(world) == 32000
    freqs, amps = asked()
    assert np.array_equal(freqs, np.linspace(440, 2400, 400)) and np.array_equal(amps, np.linspace(.1, 1, 20))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Tones(freqs, amps)  # every waveform can be told apart
    assert np.allclose(np.diff(np.log(asked('--log_freqs')[0])), np.log(2400/440)/399)
    assert asked('--num_freqs', '1', '--freq_start', '3000')[0].tolist() == [3000.]


def test_default_file_is_what_tones_render(tmp_path):
    status, out, err = finish(process('syntone', *SMALL, '--seed', '7', '--file-path', 'new/folder/tones', cwd=tmp_path))
    assert status == 0 and out.startswith('wrote new/folder/tones.npz: x [24, 4000] and y, classes, freqs'), err
    assert 'from 440 to 2400 Hz' in err and '24 clips' in err and len(err.splitlines()) == 1
    x, rows, world = read_tones(tmp_path/'new/folder/tones.npz')
    assert world.args == Tones(np.linspace(440, 2400, 3), np.linspace(.1, 1, 2), dur=.25).args and torch.equal(rows, world.grid())
    assert torch.equal(x, torch.cat([c for _, c in world.stream(7)]))
    assert [p.name for p in (tmp_path/'new/folder').iterdir()] == ['tones.npz']


def test_more_factors_both_spellings_and_lists_that_begin_with_a_minus(tmp_path, capsys):
    args = ['--vibrato_depth=0,20', '--noise', '-40', '--tilt', '-6,0', '--log-freqs', '--compress', '--sample-rate', '8000', '--freq-end', '1000']
    assert write(tmp_path, *SMALL, *args, '--file_path=my-tones.npz') == 0
    world = read_tones(tmp_path/'my-tones.npz')[2]
    levels = dict(vibrato_depth=[0., 20.], tilt=[-6., 0.], noise=[-40.], freqs=np.geomspace(440, 1000, 3).tolist())
    assert {k: world.args[k] for k in levels} == levels and world.sr == 8000 and len(world) == 2*2*3*2*4
    assert (tmp_path/'my-tones.npz').stat().st_size < len(world)*2000*4


def test_the_published_command_line_and_layout(tmp_path, capsys):
    args = '--freq_start 400 --freq_end 8000 --num_freqs 5 --num_amps 3 --file_path ./Dataset/my_dataset.npz --compat'.split()
    assert write(tmp_path, *args) == 0
    f, a = np.linspace(400, 8000, 5), np.linspace(.1, 1, 3)
    waves = (np.sin, lambda p: scipy_signal.sawtooth(p, .5), scipy_signal.sawtooth, scipy_signal.square)
    ref = np.array([[[y*w(2*np.pi*x*np.linspace(0, 1, 16000)) for w in waves] for y in a] for x in f]).reshape(60, 16000)
    with np.load(tmp_path/'Dataset/my_dataset.npz') as z:
        assert z.files == ['x', 'y', 'classes', 'metadata']
        assert z['x'].dtype == np.float64 and np.abs(z['x'] - ref).max() < 1e-11
        assert z['y'].dtype == np.int64 and z['y'].tolist() == [0, 1, 2, 3]*15 and z['classes'].tolist() == list(WAVES) and z['classes'].dtype == '<U8'
    reader = ("import json, numpy as np; m = np.load('Dataset/my_dataset.npz', allow_pickle=True)['metadata'].tolist()\n"
              "print(json.dumps({k: [v.dtype.str, v.tolist()] for k, v in m.items()}))")  # as programs of others read it; we only write it
    facts = json.loads(subprocess.run([sys.executable, '-c', reader], cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert facts == dict(freqs=['<f8', f.repeat(12).tolist()], amps=['<f8', np.tile(a.repeat(4), 5).tolist()], waveforms=['<U8', list(WAVES)*15])
    assert list(facts) == ['freqs', 'amps', 'waveforms']


@pytest.mark.parametrize('args', [[], ['--log_freqs', '--sample_rate', '8000'], ['--freq_end', '2000.5', '--amp_start', '.3']])
def test_the_line_that_reads_the_file_reads_it(tmp_path, capsys, args):
    for compat in ([], ['--compat']):
        assert write(tmp_path, *SMALL, *args, *compat, '--file_path', 'tones.npz') == 0
        line, found = capsys.readouterr().out.splitlines()[-1].partition(': ')[2], {}
        here = os.getcwd()
        os.chdir(tmp_path)
        try: exec(line, found)
        finally: os.chdir(here)
        world = found['world']
        assert world.compat == bool(compat) and torch.equal(found['choices'], world.grid()) and len(world) == 24
        clips = torch.cat([c for _, c in world.stream(0, dtype=torch.float64 if compat else torch.float32)])
        assert torch.equal(found['x'], clips.float())


def test_waveforms_that_cannot_be_told_apart_cost_one_line(tmp_path, capsys):
    assert write(tmp_path, *SMALL, '--freq_end', '7000', '--file_path', 'tones.npz') == 0
    warned = [l for l in capsys.readouterr().err.splitlines() if 'warning' in l]
    assert len(warned) == 1 and warned[0].startswith('disentangle_syntone: warning: 67% of the frequencies lie outside')


@pytest.mark.parametrize('args, says', [
    (['--freq_end', '8000'], ['--freq_end 8000', 'would alias', '--compat', '2400 Hz']),
    (['--freq_end', '0'], ['--freq_end 0', 'above --freq_start 440']),
    (['--freq_end', '0', '--compat'], ['--freq_end 0']),
    (['--freq_end', '0', '--num_freqs', '1'], ['--freq_end 0']),
    (['--freq_end', 'nan'], ['--freq_end nan']),
    (['--freq_end', '9000', '--compat'], ['would alias']),
    (['--freq_start', '3000'], ['--freq_end 2400 (as none was given)']),
    (['--freq_start', '9000', '--num_freqs', '1'], ['would alias']),
    (['--freq_end', '7990', '--vibrato_depth', '50'], ['would alias']),
    (['--amp_start', '0'], ['--amp_start 0', 'above 0']),
    (['--amp_end', '.05'], ['--amp_end 0.05']),
    (['--num_amps', '0'], ['--num_amps 0']),
    (['--num_freqs', 'many'], ['--num_freqs', 'invalid int']),
    (['--num_freqs', '99999999999'], ['too many']),
    (['--sample_rate', '0'], ['--sample_rate 0']),
    (['--duration', 'nan'], ['--duration nan']),
    (['--duration', '1e9'], ['--duration 1e+09']),
    (['--tilt', 'steep'], ['--tilt', "'steep'"]),
    (['--noise', '-20,inf'], ['finite']),
    (['--attack', '-1,0'], ['zero or more']),
    (['--vibrato_rate', '5'], ['vibrato_depth']),
    (['--compat', '--noise', '-20'], ['has no noise']),
    (['--seed', '-1'], ['--seed -1']),
    (['--device', 'abacus'], ["'abacus'"]),
    (['--colour', 'red'], ['--colour']),
    (['--file_path', 'letters'], ['is a folder']),
    (['--file_path', ''], ['is a folder']),
    (['--file_path', 'letters/mother.npz'], ['no file of tones', 'not replaced']),
    (['--file_path', 'letters/other.npz'], ['no file of tones']),
    (['--file_path', 'letters/mother.npz/x.npz'], ['there is no folder']),
])
def test_mistakes_cost_one_line_and_leave_nothing(tmp_path, capsys, args, says):
    (tmp_path/'letters').mkdir()
    (tmp_path/'letters/mother.npz').write_text('Dear mother,')
    np.savez(tmp_path/'letters/other.npz', x=np.zeros(3))
    refused(capsys, tmp_path, 'syntone', args, *says)


def test_a_disk_too_small_is_found_out_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(total=4e9, used=3e9, free=1e9))
    refused(capsys, tmp_path, 'syntone', [], 'needs about 2.05 GB', 'there are 1 GB free')
    refused(capsys, tmp_path, 'syntone', ['--compat'], 'needs about 2.95 GB')
    assert write(tmp_path, *SMALL) == 0 and (tmp_path/'Dataset/dataset_32K.npz').exists()


def test_a_disk_that_fills_keeps_the_old_file(tmp_path, capsys, monkeypatch):
    assert write(tmp_path, *SMALL, '--file_path', 'tones.npz') == 0
    capsys.readouterr()
    def full(self, *a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Tones, 'render', full)
    old = (tmp_path/'tones.npz').read_bytes()
    assert write(tmp_path, *SMALL, '--file_path', 'tones.npz') == 2
    errors = [l for l in capsys.readouterr().err.splitlines() if 'error' in l]
    assert len(errors) == 1 and 'disk full while writing tones.npz; the previous version is kept' in errors[0]
    assert (tmp_path/'tones.npz').read_bytes() == old and os.listdir(tmp_path) == ['tones.npz']


def test_tones_are_replaced_whole(tmp_path, capsys):
    for seed in '12': assert write(tmp_path, *SMALL, '--seed', seed, '--file_path', 'tones.npz') == 0
    x, _, world = read_tones(tmp_path/'tones.npz')
    assert torch.equal(x, torch.cat([c for _, c in world.stream(2)])) and os.listdir(tmp_path) == ['tones.npz']


@pytest.mark.skipif(os.name != 'posix', reason='signals')
@pytest.mark.parametrize('how', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGKILL'])
def test_killed_half_way(tmp_path, capsys, how):
    assert write(tmp_path, *SMALL, '--file_path', 'tones.npz') == 0
    old, deadline = (tmp_path/'tones.npz').read_bytes(), time.time() + 120
    p = process('syntone', *LARGE, '--file_path', 'tones.npz', cwd=tmp_path)
    while not any(q.stat().st_size > 2**20 for q in tmp_path.glob('.*.part.npz')):
        assert p.poll() is None and time.time() < deadline
        time.sleep(.02)
    p.send_signal(getattr(signal, how))
    status, out, err = finish(p)
    assert status == dict(SIGINT=130, SIGTERM=143, SIGHUP=129, SIGKILL=-9)[how] and not out and 'Traceback' not in err, err
    assert (tmp_path/'tones.npz').read_bytes() == old
    parts = [q.name for q in tmp_path.iterdir() if q.name != 'tones.npz']
    assert len(parts) == (how == 'SIGKILL') and all(p.startswith('.tones-') for p in parts), parts
    assert write(tmp_path, *SMALL, '--file_path', 'tones.npz') == 0  # nothing is in the way
    assert all(f'warning: {p} (' in capsys.readouterr().err for p in parts)

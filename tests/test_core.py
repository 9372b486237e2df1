"Foundations: what a notebook cannot show, such as killed processes, full disks and fresh imports."
import errno, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from disentangle_nb import core
from disentangle_nb.core import atomic_path, cache_dir, content_key, make_generator, read_json, write_json


def full(*a, **kw): raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('where', ['write', 'fsync', 'replace', 'library'])
@pytest.mark.parametrize('exists', [True, False])
def test_disk_full_keeps_previous(tmp_path, monkeypatch, where, exists):
    path = tmp_path/'weights.bin'
    if exists: path.write_text('previous')
    if where in ('fsync', 'replace'): monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError) as e:
        with atomic_path(path) as p:
            p.write_text('half')
            if where == 'write': full()
            if where == 'library': raise RuntimeError('I/O error: No space left on device (os error 28)')
    assert e.value.errno == errno.ENOSPC and str(path) in str(e.value)
    assert ('previous version is kept' if exists else 'nothing was written') in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == (['weights.bin'] if exists else [])
    if exists: assert path.read_text() == 'previous'


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full here')
def test_disk_really_full(tmp_path):
    with pytest.raises(OSError, match='disk full while writing'):
        with atomic_path(tmp_path/'x'): open('/dev/full', 'wb').write(bytes(2**16))


def test_kill_while_writing(tmp_path):
    path = tmp_path/'card.json'
    write_json(path, {'run': 1})
    code = f"""
import time
from disentangle_nb.core import atomic_path
with atomic_path({str(path)!r}) as p:
    f = p.open('w'); f.write('x'*100000); f.flush(); print('half', flush=True); time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'half\n'
    child.send_signal(signal.SIGKILL); child.wait()
    assert read_json(path) == {'run': 1}
    assert [p.name for p in tmp_path.glob('[!.]*')] == ['card.json']


def test_many_writers_one_whole_file(tmp_path):
    path = tmp_path/'scores.json'
    def write(i):
        for _ in range(10): write_json(path, [i]*1000)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    seen = []
    while any(t.is_alive() for t in threads):
        if path.exists(): seen.append(read_json(path))
    assert seen and all(len(set(s)) == 1 and len(s) == 1000 for s in seen)
    assert [p.name for p in tmp_path.iterdir()] == ['scores.json']


def test_folder_survives_failed_second_rename(tmp_path, monkeypatch):
    path, real, calls = tmp_path/'system', os.replace, []
    with atomic_path(path, dir=True) as p: (p/'a').write_text('1')
    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2: full()
        return real(a, b)
    monkeypatch.setattr(os, 'replace', second_fails)
    with pytest.raises(OSError, match='previous version is kept'):
        with atomic_path(path, dir=True) as p: (p/'a').write_text('2')
    assert (path/'a').read_text() == '1' and len(list(tmp_path.iterdir())) == 1


def test_unwritable_place_is_named(tmp_path):
    (tmp_path/'file').write_text('x')
    for path in (tmp_path/'file'/'run.json', tmp_path/'file'/'deep'/'run.json'):
        with pytest.raises(OSError, match='cannot write .*run.json'): write_json(path, {})
    (tmp_path/'folder').mkdir()
    with pytest.raises(OSError, match='cannot write .*folder'): write_json(tmp_path/'folder', {})
    with pytest.raises(FileExistsError, match='is a file'):
        with atomic_path(tmp_path/'file', dir=True): pass


def test_symlink_keeps_pointing(tmp_path):
    (tmp_path/'real').mkdir(); write_json(tmp_path/'real'/'a.json', 1)
    (tmp_path/'a.json').symlink_to(tmp_path/'real'/'a.json')
    write_json(tmp_path/'a.json', 2)
    assert (tmp_path/'a.json').is_symlink() and read_json(tmp_path/'real'/'a.json') == 2


class Noise(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return i, torch.rand(()), np.random.rand()


@pytest.mark.parametrize('workers', [0, 2])
def test_loader_with_workers_repeats(workers):
    def draw():
        core.seed_everything(3)
        stream = make_generator(3, 'order')
        dl = torch.utils.data.DataLoader(Noise(), 4, shuffle=True, num_workers=workers, generator=stream)
        return [torch.stack([x.double() for x in b]) for b in dl]
    a = draw(); torch.rand(100); b = draw()
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_streams_are_the_same_on_every_machine():
    assert torch.randint(10**6, (3,), generator=make_generator(0, 'order', 1)).tolist() == [803043, 554434, 920623]
    assert content_key('mel', dict(sr=22050), np.arange(4, dtype='<f4'), b'x', None, 1.5, True) == 'd887d7fcc5a9e04c'


def test_keys_tell_contents_apart(tmp_path):
    f = tmp_path/'a.wav'; f.write_bytes(b'1'); one = content_key(f)
    f.write_bytes(b'2'); two = content_key(f)
    copy = tmp_path/'b.wav'; copy.write_bytes(b'2')
    assert one != two == content_key(copy)
    import pandas as pd
    tensors = [torch.zeros(1, dtype=d) for d in (torch.float32, torch.int64, torch.bfloat16)]
    tables = [pd.DataFrame({'a': [i]}) for i in (0, 1)]
    things = [0, 0., False, None, '0', b'0', [0], [[0]], {'0': 0}, np.zeros((1, 1)), *tensors, *tables]
    keys = [content_key(x) for x in things]
    assert len(set(keys)) == len(keys)
    with pytest.raises(TypeError, match='no key for'): content_key(object())


def test_cards_nest_and_inherit(tmp_path):
    from dataclasses import dataclass, field
    from typing import Literal, Optional
    @dataclass(frozen=True)
    class Model(core.RunCard):
        size: int = 8
        act: Literal['relu', 'selu'] = 'relu'
    @dataclass(frozen=True)
    class Study(core.RunCard):
        data: str
        model: Model = field(default_factory=Model)
        rate: Optional[float] = None
        shape: tuple[int, float] = (1, 2.)
    card = Study('x').override(['model.size=3', 'model.act=selu', 'rate=1', 'shape=[3, 4]', 'data=a=b'])
    assert (card.model, card.rate, card.shape, card.data) == (Model(3, 'selu'), 1., (3, 4.), 'a=b')
    assert Study.load(card.save(tmp_path/'c.json')) == card
    assert json.loads(card.to_json()) == card.to_dict()
    for bad, why in [({}, 'needs a value for data'), ({'data': 1}, 'data should be str'), ([], 'read from a dict'),
                     ({'data': 'x', 'model': {'sise': 1}}, "did you mean 'size'"),
                     ({'data': 'x', 'model': {'act': 'tanh'}}, 'act should be'),
                     ({'data': 'x', 'shape': [1]}, 'shape should hold 2')]:
        with pytest.raises(core.CardError, match=why): Study.from_dict(bad)
    with pytest.raises(core.CardError, match='cannot read'): card.override(['model.size=big'])


def test_provenance_names_no_place(monkeypatch):
    monkeypatch.setattr('platform.node', lambda: 'my-secret-machine')
    text = json.dumps(core.provenance())
    assert not any(word in text for word in (str(Path.home()) + os.sep, os.getcwd(), 'my-secret-machine'))


def test_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv('DISENTANGLE_CACHE', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_dir('a') == tmp_path/'disentangle_nb'/'a'


@pytest.mark.parametrize('module', ['core', 'audio', 'data.download'])
def test_foundations_import_little(module):
    heavy = set('fastai librosa sklearn matplotlib pandas soundfile requests pooch IPython'.split())
    code = f"import sys, disentangle_nb.{module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


def test_package_imports_in_a_blink():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, '-c', 'pass'], check=True)
        bare = time.perf_counter() - started
        subprocess.run([sys.executable, '-c', 'import disentangle_nb'], check=True)
        times.append(time.perf_counter() - started - 2*bare)
    assert min(times) < .3, times

"Downloads against a server of our own, and archives from an enemy."
import errno, hashlib, io, os, stat, subprocess, sys, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from disentangle_nb.core import read_json
from disentangle_nb.data import download
from disentangle_nb.data.download import DATASETS, ArchiveError, DataSet, DownloadError, fetch, unpack

payload = os.urandom(300_000)


class Server(BaseHTTPRequestHandler):
    def log_message(self, *a): pass

    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers.get('Range')))
        if s.status: status, s.status = s.status[0], s.status[1:]
        else: status = 200
        data = s.files.get(self.path)
        if data is None: status = 404
        if status != 200: return self.send_error(status)
        start = int(self.headers['Range'][6:-1]) if s.ranges and self.headers.get('Range') else 0
        if start > len(data): return self.send_error(416)
        self.send_response(206 if start else 200)
        if s.length: self.send_header('Content-Length', str(len(data) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.end_headers()
        self.wfile.write(data[start:start + (s.drop.pop(0) if s.drop else len(data))])


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    s.files, s.asked, s.drop, s.status, s.ranges, s.length = {'/demo/a.bin': payload}, [], [], [], True, True
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield s
    s.shutdown(); s.server_close()


@pytest.fixture
def demo(monkeypatch):
    def put(known=True, file='a.bin', data=payload, **kw):
        if known is True: known = 'sha256:' + hashlib.sha256(data).hexdigest()
        monkeypatch.setitem(DATASETS, 'demo', DataSet('demo', 'http://127.0.0.1:9/', {file: known}, 'free', **kw))
    put()
    monkeypatch.delenv('DISENTANGLE_BASE_URL', raising=False)
    return put


def get(server, cache, **kw): return fetch('demo', base_url=server.url, cache=cache, progress=False, wait=.01, **kw)


def test_right_hash(server, demo, tmp_path):
    folder = get(server, tmp_path)
    assert (folder/'a.bin').read_bytes() == payload and sorted(os.listdir(folder)) == ['SOURCE.json', 'a.bin']
    card = read_json(folder/'SOURCE.json')
    assert card['licence'] == 'free' and card['checksums']['a.bin'] == DATASETS['demo'].files['a.bin']


def test_base_url_from_the_environment(server, demo, tmp_path, monkeypatch):
    monkeypatch.setenv('DISENTANGLE_BASE_URL', server.url + '/')
    monkeypatch.setenv('DISENTANGLE_CACHE', str(tmp_path))
    assert fetch('demo', progress=False) == tmp_path/'datasets'/'demo'
    assert server.asked == [('/demo/a.bin', None)]


@pytest.mark.parametrize('known', ['md5:' + '0'*32, 'sha256:' + '0'*64])
def test_wrong_hash_leaves_nothing(server, demo, tmp_path, known):
    demo(known)
    with pytest.raises(DownloadError, match='not the expected file .*nothing was kept'): get(server, tmp_path)
    assert os.listdir(tmp_path/'demo') == [] and len(server.asked) == 1


def test_missing_file_is_not_asked_for_twice(server, demo, tmp_path):
    server.files.clear()
    with pytest.raises(DownloadError, match='404.*base_url=.*put a.bin into'): get(server, tmp_path)
    assert os.listdir(tmp_path/'demo') == [] and len(server.asked) == 1


@pytest.mark.parametrize('ranges', [True, False])
def test_line_that_dies_in_the_middle(server, demo, tmp_path, ranges):
    server.drop, server.ranges = [100_000, 150_000], ranges
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload
    starts = [r for _, r in server.asked]
    assert starts[0] is None and len(starts) == 3 and all(r and r.startswith('bytes=') for r in starts[1:])


def test_goes_on_in_another_process(server, demo, tmp_path):
    server.drop = [70_000, 0, 0, 0]
    with pytest.raises(DownloadError, match='Run again to go on where it stopped'): get(server, tmp_path)
    assert os.listdir(tmp_path/'demo') == ['a.bin.part']
    server.asked.clear()
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload
    assert server.asked == [('/demo/a.bin', 'bytes=65536-')]


def test_stale_part_is_thrown_away(server, demo, tmp_path):
    (tmp_path/'demo').mkdir(); (tmp_path/'demo'/'a.bin.part').write_bytes(b'old'*1000)
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload
    (tmp_path/'demo'/'a.bin').unlink(); (tmp_path/'demo'/'a.bin.part').write_bytes(bytes(400_000))
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload


def test_server_has_a_bad_moment(server, demo, tmp_path):
    server.status = [503, 429]
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload
    server.status = [500]*9; (tmp_path/'demo'/'a.bin').unlink()
    with pytest.raises(DownloadError, match='cannot be reached'): get(server, tmp_path)


def test_cached_and_offline(server, demo, tmp_path):
    folder = get(server, tmp_path)
    server.shutdown(); server.server_close()
    assert get(server, tmp_path) == folder and len(server.asked) == 1
    (folder/'a.bin').write_bytes(b'spoilt')
    with pytest.raises(DownloadError, match='cannot be reached'): get(server, tmp_path)


def test_spoilt_copy_is_fetched_again(server, demo, tmp_path):
    folder = get(server, tmp_path)
    (folder/'a.bin').write_bytes(b'spoilt')
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload


def test_unknown_checksum_is_remembered(server, demo, tmp_path):
    demo(None)
    folder = get(server, tmp_path)
    assert read_json(folder/'SOURCE.json')['checksums']['a.bin'] == 'sha256:' + hashlib.sha256(payload).hexdigest()
    (folder/'a.bin').unlink(); server.files['/demo/a.bin'] = b'another version'
    with pytest.raises(DownloadError, match='not the expected file'): get(server, tmp_path)


def test_truncation_is_noticed_without_a_checksum(server, demo, tmp_path):
    demo(None); server.drop = [1000]*9
    server.ranges = False
    with pytest.raises(DownloadError): get(server, tmp_path)
    assert not (tmp_path/'demo'/'a.bin').exists()


def test_without_content_length(server, demo, tmp_path):
    server.length = False
    assert (get(server, tmp_path)/'a.bin').read_bytes() == payload


def test_archive_is_unpacked_once(server, demo, tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w') as z:
        z.writestr('demo-1.0/x/n.txt', 'note')
        z.writestr('__MACOSX/demo-1.0/._x', 'junk')
    server.files['/demo/d.zip'] = data.getvalue()
    demo(file='d.zip', data=data.getvalue())
    folder = get(server, tmp_path)
    assert (folder/'d'/'x'/'n.txt').read_text() == 'note'
    (folder/'d.zip').unlink()
    assert get(server, tmp_path) == folder and len(server.asked) == 1


def packed(files, name):
    data = io.BytesIO()
    if name.endswith('.zip'):
        with zipfile.ZipFile(data, 'w') as z:
            for k, v in files.items(): z.writestr(k, v)
    else:
        with tarfile.open(fileobj=data, mode='w:gz') as t:
            for k, v in files.items():
                m = tarfile.TarInfo(k); m.size = len(v)
                t.addfile(m, io.BytesIO(v))
    return data.getvalue()


@pytest.mark.parametrize('top', ['', 'TinySOL/', 'TinySOL2020/'])
def test_fetched_tinysol_is_a_table(server, tmp_path, monkeypatch, top):
    import torch
    from disentangle_nb.audio import save_audio
    from disentangle_nb.data.notes import read_table
    note = save_audio(tmp_path/'n.wav', torch.sin(torch.arange(9000)*.1)/2, 44100).read_bytes()
    names = [f'Brass/Bass_Tuba/ordinario/BTb-ord-{p}-ff.wav' for p in ('C2', 'D2')]
    head = 'Path,Fold,Family,Instrument (abbr.),Instrument (in full),Technique (abbr.),Technique (in full),Pitch,Pitch ID,' \
           'Dynamics,Dynamics ID,Instance ID,String ID (if applicable),Needed digital retuning\n'
    rows = [f'{n},0,Brass,BTb,Bass Tuba,ord,ordinario,X,{36 + 2*i},ff,4,0,,False\n' for i, n in enumerate(names)]
    server.files = {'/tinysol/TinySOL.tar.gz': packed({top + n: note for n in names}, 'x.tar.gz'),
                    '/tinysol/TinySOL_metadata.csv': (head + ''.join(rows)).encode()}
    monkeypatch.setitem(DATASETS, 'tinysol', DataSet('', '', {'TinySOL.tar.gz': None, 'TinySOL_metadata.csv': None}, ''))
    table = read_table(fetch('tinysol', base_url=server.url, cache=tmp_path/'cache', progress=False))
    assert table.instrument.tolist() == ['Bass-Tuba']*2 and table.midi.tolist() == [36, 38]


def test_damaged_archive_is_told(server, demo, tmp_path):
    server.files['/demo/d.zip'] = b'no zip at all'
    demo(None, file='d.zip')
    with pytest.raises(ArchiveError, match='d.zip is damaged or no archive'): get(server, tmp_path)
    assert not (tmp_path/'demo'/'d').exists()


def test_disk_full_keeps_what_arrived(server, demo, tmp_path, monkeypatch):
    def full(self, url, part): part.write_bytes(b'x'); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(download.Resume, 'pull', full)
    with pytest.raises(DownloadError, match='disk full'): get(server, tmp_path)
    assert os.listdir(tmp_path/'demo') == ['a.bin.part']


@pytest.mark.parametrize('name', ['musdb18', 'maps'])
def test_sets_on_request(name, tmp_path, monkeypatch):
    monkeypatch.delenv('DISENTANGLE_BASE_URL', raising=False)
    with pytest.raises(DownloadError, match='given on request only.*put it into'): fetch(name, cache=tmp_path)
    if name == 'maps': return
    with zipfile.ZipFile(tmp_path/name/'musdb18.zip', 'w') as z: z.writestr('train/a.txt', 'stem')
    assert (fetch(name, cache=tmp_path)/'musdb18'/'train'/'a.txt').read_text() == 'stem'


def test_unknown_names():
    with pytest.raises(DownloadError, match="did you mean 'nsynth'"): fetch('NSynth')
    with pytest.raises(DownloadError, match='there are: gmvae'): fetch('zzzzz')


def test_importing_asks_nobody():
    code = '''
import sys
def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'urllib.Request'): raise RuntimeError(event)
sys.addaudithook(refuse)
import disentangle_nb.data.download as d
d.datasets_table()'''
    subprocess.run([sys.executable, '-c', code], check=True)


def tar(path, members, mode='w:gz'):
    with tarfile.open(path, mode) as t:
        for name, data, kw in members:
            m = tarfile.TarInfo(name); m.size = len(data)
            for k, v in kw.items(): setattr(m, k, v)
            t.addfile(m, io.BytesIO(data))
    return path


def zipped(path, members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data, mode in members:
            i = zipfile.ZipInfo(name); i.external_attr = mode << 16; i.compress_type = zipfile.ZIP_DEFLATED
            z.writestr(i, data)
    return path


link, hard, one = dict(type=tarfile.SYMTYPE), dict(type=tarfile.LNKTYPE), b'x'
evil_tars = {
    'dots': ([('../evil', one, {})], 'outside'),
    'deep dots': ([('a/b/../../../evil', one, {})], 'outside'),
    'absolute': ([('/evil_of_the_test', one, {})], 'outside'),
    'drive': ([('C:evil', one, {})], 'outside'),
    'backslashes': ([('..\\evil', one, {})], 'outside'),
    'link out': ([('l', b'', link | dict(linkname='../..'))], 'outside'),
    'absolute link': ([('l', b'', link | dict(linkname='/etc/passwd'))], 'outside'),
    'write through link': ([('l', b'', link | dict(linkname='.')), ('l/../../evil', one, {})], 'outside'),
    'hard link out': ([('l', b'', hard | dict(linkname='/etc/passwd'))], 'outside'),
    'link to folder': ([('l', b'', link | dict(linkname='.'))], 'not a file'),
    'link to nothing': ([('l', b'', link | dict(linkname='gone'))], 'not a file'),
    'character device': ([('d', b'', dict(type=tarfile.CHRTYPE))], 'neither'),
    'block device': ([('d', b'', dict(type=tarfile.BLKTYPE))], 'neither'),
    'pipe': ([('d', b'', dict(type=tarfile.FIFOTYPE))], 'neither'),
    'twice': ([('a', one, {}), ('a', one, {})], 'there twice'),
    'file and folder': ([('a', one, {}), ('a/b', one, {})], 'both a file and a folder'),
    'bomb': ([('zeros', bytes(3_000_000), {})], 'unpacks to more than'),
    'many files': ([(f'{i}', b'', {}) for i in range(200)], 'more than 100 files'),
    'bomb of links': ([('a', bytes(400_000), {})] + [(f'l{i}', b'', link | dict(linkname='a')) for i in range(9)],
                      'unpacks to more than')}


@pytest.mark.parametrize('name', evil_tars)
def test_evil_tar(tmp_path, name):
    members, why = evil_tars[name]
    archive = tar(tmp_path/'e.tar.gz', [('fine.txt', one, {}), *members])
    with pytest.raises(ArchiveError, match=why):
        unpack(archive, tmp_path/'out'/'here', max_bytes=2_000_000, max_files=100)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['e.tar.gz', 'out'] and not Path('/evil_of_the_test').exists()


evil_zips = {
    'dots': ([('../evil', one, 0)], 'outside'),
    'absolute': ([('/evil_of_the_test', one, 0)], 'outside'),
    'link out': ([('l', b'../../x', stat.S_IFLNK | 0o777)], 'outside'),
    'long link': ([('l', b'a/'*5000, stat.S_IFLNK | 0o777)], 'no sensible target'),
    'device': ([('d', one, stat.S_IFCHR | 0o666)], 'neither'),
    'bomb': ([('zeros', bytes(3_000_000), 0)], 'unpacks to more than')}


@pytest.mark.parametrize('name', evil_zips)
def test_evil_zip(tmp_path, name):
    members, why = evil_zips[name]
    archive = zipped(tmp_path/'e.zip', [('fine.txt', one, 0), *members])
    with pytest.raises(ArchiveError, match=why): unpack(archive, tmp_path/'out'/'here', max_bytes=2_000_000)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['e.zip', 'out'] and not Path('/evil_of_the_test').exists()


def test_zip_that_lies_about_sizes(tmp_path):
    archive = zipped(tmp_path/'e.zip', [('zeros', bytes(3_000_000), 0)])
    b = archive.read_bytes().replace((3_000_000).to_bytes(4, 'little'), (10).to_bytes(4, 'little'))
    archive.write_bytes(b)
    with pytest.raises(ArchiveError): unpack(archive, tmp_path/'out', max_bytes=2_000_000)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_good_tars(tmp_path, mode):
    archive = tar(tmp_path/'g.tar', [('s', b'', dict(type=tarfile.DIRTYPE)), ('s/a', payload, dict(mode=0)),
                                     ('b', b'', hard | dict(linkname='s/a')), ('./c d é', one, {})], mode)
    out = unpack(archive, tmp_path/'out')
    assert (out/'s'/'a').read_bytes() == (out/'b').read_bytes() == payload and (out/'c d é').read_bytes() == one


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
@pytest.mark.parametrize('share', [.05, .5, .9, .999])
def test_cut_tars(tmp_path, mode, share):
    archive = tar(tmp_path/'g.tar', [(f'{i}', payload[:50_000], {}) for i in range(6)], mode)
    whole = archive.read_bytes()
    size = int(share*len(whole.rstrip(b'\0') if mode == 'w' else whole))
    archive.write_bytes(whole[:size])
    with pytest.raises(ArchiveError, match='nothing was unpacked'): unpack(archive, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_cut_between_members(tmp_path):
    archive = tar(tmp_path/'g.tar', [('a', bytes(512), {}), ('b', bytes(512), {})], 'w')
    archive.write_bytes(archive.read_bytes()[:1024])
    with pytest.raises(ArchiveError, match='end mark'): unpack(archive, tmp_path/'out')


def test_flipped_bit(tmp_path):
    archive = tar(tmp_path/'g.tar.gz', [('a', payload, {})])
    b = bytearray(archive.read_bytes()); b[len(b)//2] ^= 1; archive.write_bytes(b)
    with pytest.raises(ArchiveError): unpack(archive, tmp_path/'out')
    archive = zipped(tmp_path/'g.zip', [('a', payload, 0)])
    b = bytearray(archive.read_bytes()); b[len(b)//2] ^= 1; archive.write_bytes(b)
    with pytest.raises(ArchiveError): unpack(archive, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_never_over_what_is_there(tmp_path):
    archive = zipped(tmp_path/'g.zip', [('a', one, 0)])
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'diary').write_text('dear')
    with pytest.raises(FileExistsError, match='not an empty folder'): unpack(archive, tmp_path/'mine')
    (tmp_path/'file').write_text('x')
    with pytest.raises(FileExistsError, match='not an empty folder'): unpack(archive, tmp_path/'file')
    assert os.listdir(tmp_path/'mine') == ['diary']

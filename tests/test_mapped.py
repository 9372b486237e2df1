"More features than memory: training from mapped files under a limit, and the same numbers as from memory."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback

from disentangle_nb.audio import save_audio
from disentangle_nb.core import seed_everything
from disentangle_nb.data.frames import draw_pieces
from disentangle_nb.features.blocks import frames_key
from disentangle_nb.models.gated import GatedAutoencoder
from disentangle_nb.studies.intervals import feature_of, intervals_card
from disentangle_nb.training.gated import MappedBlocks, fit_gated, gated_dls, gated_learner, has_room
from disentangle_nb.training.resume import Checkpoint

PIECES = draw_pieces(3000, seed=1), [draw_pieces(400, seed=2), draw_pieces(50, seed=3), draw_pieces(300, seed=4)]


def small(resident, cbs=None, epochs=3):
    seed_everything(0)
    dls = gated_dls(*PIECES, bs=4, size=64, seed=5, resident=resident)
    learn = gated_learner(dls, GatedAutoencoder(n_factors=16, n_mapping=(8, 4), gain=(6, 4)), cbs=cbs, bars=False)
    fit_gated(learn, epochs, 3e-3)
    return learn


def same(a, b):
    return (all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
            and torch.stack(list(a.recorder.losses)).equal(torch.stack(list(b.recorder.losses))) and a.parts.history == b.parts.history)


def test_a_run_is_the_same_to_the_bit_wherever_its_blocks_are(tmp_path):
    held, read, default = map(small, (True, False, None))
    assert same(held, read) and same(held, default)
    assert not isinstance(held.dls.train, MappedBlocks) and isinstance(default.dls.train, MappedBlocks)   # on a CPU nothing is copied
    with pytest.raises(KeyboardInterrupt): small(True, cbs=[Checkpoint(tmp_path), Stop()])
    assert same(held, small(False, cbs=[Checkpoint(tmp_path, resume=True)]))                              # begun from memory, ended from files


class Stop(Callback):
    order = 100
    def after_step(self):
        if self.train_iter == 20: raise KeyboardInterrupt


@pytest.mark.parametrize('bs', [4, 7])
def test_mapped_batches_are_those_from_memory(bs):
    held, read = (gated_dls(*PIECES, bs=bs, size=64, seed=5, resident=r) for r in (True, False))
    for a, b in zip((held.train, held.valid), (read.train, read.valid), strict=True):
        assert (a.n, len(a), a.shuffle) == (b.n, len(b), b.shuffle)
        for _ in range(2):
            for x, y in zip(a, b, strict=True): assert len(x) == len(y) == 2 and all(torch.equal(u, v) for u, v in zip(x, y))
    for share in ((0, 2), (1, 2)):                                            # of two processes
        for x, y in zip(held.train.new(share=share), read.train.new(share=share), strict=True): assert all(torch.equal(u, v) for u, v in zip(x, y))
    with pytest.raises(ValueError, match='longest'): gated_dls([PIECES[0][:60]], PIECES[1], size=64)


def test_a_gpu_holds_what_fits_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (1000, 10_000))
    assert has_room('cuda', 499) and not has_room('cuda', 500)
    assert not has_room('cpu', 1) and not has_room(torch.device('cpu'), 1)


# --- more than memory ----------------------------------------------------------------------------------------------------

ROOM = 150  # MB of its own beyond what a process has when it has mapped the files and made a step; pages of the files aren't its own

CHILD = '''
import json, resource, sys, torch
from functools import partial
from disentangle_nb.studies import intervals as study
def held(key): return next(int(l.split()[1])*1024/1e6 for l in open('/proc/self/status') if l.startswith(key))
torch.set_num_threads(1)
def epoch(learn):
    with learn.no_bar(): learn.fit(1)
    return torch.stack(list(learn.recorder.losses)).tolist()
card = study.intervals_card(data=sys.argv[1], n_factors=8, n_mapping=(8, 4), size=1024, bs=4)
data = study.study_data(card)
few = study.FrameSet(['a', 'b'], ['train', 'dev'], [data.frames[0][:1033]]*2, data.feature)
epoch(study.study_learner(card, few))
out, mapped, at_first = dict(mb=sum(x.nbytes for x in data.pieces('train'))/1e6), study.gated_dls, held('RssAnon:')
resource.setrlimit(resource.RLIMIT_DATA, (round(1e6*(held('VmData:') + int(sys.argv[2]))),)*2)
study.gated_dls = partial(mapped, resident=True)
try: study.study_learner(card, data); out['refused'] = ''
except (RuntimeError, MemoryError) as e: out['refused'] = str(e)
study.gated_dls = mapped
out['losses'] = epoch(study.study_learner(card, data))
print(json.dumps(out | dict(grown=held('RssAnon:') - at_first)))
'''


def write_frames(path, n, seed, piece=8192):
    "Noise as unit frames, written piece by piece."
    x = np.random.default_rng(seed).random((piece, 120), np.float32)
    x -= x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(path, 'w+', np.float32, (n, 120))
    for i in range(0, n, piece): out[i:i + piece] = np.roll(x, i//piece, 1)[:n - i]
    out.flush()


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the limit is on memory as Linux counts it')
def test_more_features_than_memory_train_from_mapped_files(tmp_path):
    files, store, feature = [tmp_path/f'{i}.wav' for i in range(8)], tmp_path/'cache'/'frames', feature_of(intervals_card())
    store.mkdir(parents=True)
    try:
        for i, f in enumerate(files):
            save_audio(f, torch.rand(2000, generator=torch.Generator().manual_seed(i)), 22050)
            write_frames(store/f'{frames_key(f, feature)}.npy', 104_000, i)
        (tmp_path/'list.txt').write_text('\n'.join(f.name for f in files))
        env = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_'))}
        done = subprocess.run([sys.executable, '-c', CHILD, str(tmp_path/'list.txt'), str(ROOM)], capture_output=True, text=True,
                              env=env | dict(DISENTANGLE_CACHE=str(tmp_path/'cache'), OMP_NUM_THREADS='1'))
    finally:
        for f in store.iterdir(): f.unlink()
    assert not done.returncode, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert got['mb'] > 1.9*ROOM and 'memory' in got['refused']                # so much can't be loaded under this limit…
    assert len(got['losses']) == 152 and got['grown'] < ROOM                  # …and every block of it trains
    assert np.isfinite(got['losses']).all() and np.mean(got['losses'][-5:]) < np.mean(got['losses'][:5])

"Constant-Q and blocks of frames: the definition, librosa, odd input, pieces and wholes, caches that notice, and the reference's four data bugs."
import math, os, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from disentangle_nb.audio import AudioError, load_audio, save_audio, stream_audio
from disentangle_nb.core import shared_audio
from disentangle_nb.data.recordings import RecordingError, read_recordings
from disentangle_nb.features.blocks import BlockLoader, block_starts, cached_frames, context_pairs, frame_set, frames_key
from disentangle_nb.features.cqt import CQT, cqt_direct, frame_levels, unit_frames

feature = CQT()
REAL = ['pieces/brahms_hungarian_dance_5_strings.flac', 'stems/hydrogen_a/vocals.flac', 'stems/potassium_a/accompaniment.flac',
        'notes/Clarinet-Bb/Clarinet-Bb_058_As3_ff_iowa.flac', 'notes/Violoncello/Violoncello_064_E4_nd_fluidr3.flac']


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def tone(hz, n=22050, sr=22050): return .5*torch.sin(2*math.pi*hz*torch.arange(n, dtype=torch.float64)/sr).float()
def at(m, pairs): return torch.stack([m[k, n] for n, k in pairs])
def apart(a, b): return ((a - b).norm()/b.norm()).item()


@pytest.mark.parametrize('kw', [dict(), dict(hop=1984), dict(hop=441, sr=44100), dict(bins_per_octave=12, n_bins=60, hop=333), dict(n_bins=36, fmin=220.)], ids=str)
def test_coefficients_are_the_definition(kw):
    f = CQT(**kw)
    x = noise(4*f.sr)
    pairs = [(n, k) for n in (0, 1, f.shape(len(x))[1]//2, f.shape(len(x))[1] - 1) for k in range(0, f.n_bins, 5)]
    truth = cqt_direct(x, pairs, f.hop, f.sr, f.bins_per_octave, f.fmin)
    assert apart(at(f.coefficients(x), pairs), truth) < 2e-4          # measured 4e-5 to 6e-5: the lobes that are left out
    assert apart(at(f.double().coefficients(x.double()), pairs), truth) < 2e-4


def test_the_definition_in_closed_form():
    "A sine in the middle of a bin: half its amplitude times the root of N; a quarter tone away half of that (Hann's second sample)."
    f = float(feature.freqs[60])
    N = feature.Q*22050/f
    c = cqt_direct(tone(f), [(25, 60), (25, 61)]).abs()
    assert c[0].item() == pytest.approx(.25*math.sqrt(N), rel=1e-3)
    assert c[1].item()/c[0].item() == pytest.approx(.5, abs=.02)


@pytest.mark.parametrize('file', REAL)
def test_librosa_on_real_audio(file):
    import librosa
    if shared_audio() is None: pytest.skip('no real recordings here')
    x = load_audio(shared_audio()/file, sr=22050, duration=20)[0]
    theirs = np.abs(librosa.cqt(x.numpy(), sr=22050, hop_length=448, fmin=65.4, n_bins=120, bins_per_octave=24))
    ours = feature.magnitude(x)
    assert ours.shape == theirs.shape == feature.shape(len(x))
    assert np.corrcoef(ours.numpy().ravel(), theirs.ravel())[0, 1] > .995
    pairs = [(n, k) for n in range(20, ours.shape[1] - 20, max(1, ours.shape[1]//7)) for k in range(0, 120, 7)]
    if len(pairs) > 40: assert apart(at(ours, pairs), cqt_direct(x, pairs).abs()) < min(1e-3, apart(at(torch.from_numpy(theirs), pairs), cqt_direct(x, pairs).abs()))


def test_the_same_scale_as_librosa_on_noise():
    import librosa
    x = noise(22050*3)
    theirs = torch.from_numpy(np.abs(librosa.cqt(x.numpy(), sr=22050, hop_length=1984, fmin=65.4, n_bins=120, bins_per_octave=24)))
    assert apart(CQT(hop=1984).magnitude(x)[:, 5:-5], theirs[:, 5:-5]) < .02


@pytest.mark.parametrize('n', [1, 2, 447, 448, 449, 5000, 22051])
def test_any_length_gives_a_frame_for_every_hop_begun(n):
    x = feature.encode(noise(2, n))
    assert x.shape == (2, *feature.shape(n)) == (2, 120, 1 + n//448) and x.isfinite().all()
    assert feature.decode(x, n_samples=n, n_iter=1).shape == (2, n)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match='0 samples'): feature.encode(torch.zeros(1, 0))
    with pytest.raises(ValueError, match='no samples'): next(feature.stream([]))


def test_silence_is_zero_and_stays_silent():
    assert (feature.encode(torch.zeros(30000)) == 0).all()
    half = torch.cat([noise(60000), torch.zeros(90000)])
    x = feature.encode(half)
    first = 60000//448 + feature.margin
    assert (x[:, first:] == 0).all() and (x[:, :130].norm(dim=0) > .99).all() # not the rounding of a block, blown up
    assert (feature.decode(torch.zeros(120, 20), n_iter=2) == 0).all()


def test_an_offset_is_nearly_unheard():
    x = feature.magnitude(tone(440.) + .5)[:, 16:34]                  # away from the steps at both ends
    assert apart(x, feature.magnitude(tone(440.))[:, 16:34]) < 1e-2


def test_one_clip_equals_itself_in_a_batch_and_a_channel_by_itself():
    x = noise(5, 30000)
    assert (feature.magnitude(x)[3] - feature.magnitude(x[3])).abs().max() < 1e-4*feature.magnitude(x).max()
    stereo = feature.encode(x[:4].view(2, 2, -1))
    assert stereo.shape == (2, 2, 120, 67) and (stereo[1, 0] - feature.encode(x[2])).abs().max() < 1e-4


def test_an_impulse_is_heard_in_every_bin_where_it_is():
    x = torch.zeros(44800)
    x[448*50] = 1
    assert (feature.magnitude(x).argmax(1) == 50).all()


def test_gradients_pass():
    x = noise(1, 4480).requires_grad_()
    f = CQT(n_bins=24, fmin=400.)
    f.encode(x).square()[..., 2:5].sum().backward()
    f.magnitude(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    tiny = CQT(n_bins=6, bins_per_octave=3, fmin=1000., hop=100, sr=16000).double()
    assert torch.autograd.gradcheck(lambda v: torch.view_as_real(tiny.coefficients(v)), noise(1, 300).double().requires_grad_())


def test_frames_have_mean_zero_and_length_one():
    m = feature.magnitude(noise(30000))
    x = unit_frames(m)
    assert x.mean(0).abs().max() < 1e-6 and (x.norm(dim=0) - 1).abs().max() < 1e-5
    assert x.square().mean().item() == pytest.approx(1/120, rel=1e-4)
    assert torch.allclose(x*frame_levels(m) + m.mean(0), m, atol=1e-3)
    assert (unit_frames(torch.zeros(120, 3)) == 0).all() and torch.isfinite(unit_frames(torch.full((120, 2), 7.))).all()


def test_the_gate_goes_by_the_loudest_frame_of_each_clip():
    loud, soft = tone(440.), torch.cat([tone(440.)[:11025], 1e-4*tone(440.)[:11025]])
    x = CQT(gate_db=-60).encode(torch.stack([1e-4*loud, soft]))
    assert (x[0].norm(dim=0) > .9).all() and (x[1][:, 42:].norm(dim=0) == 0).all() and (x[1][:, :10].norm(dim=0) > .9).all()


@pytest.mark.parametrize('hop', [448, 1984])
def test_pieces_give_the_frames_of_the_whole_to_the_bit(hop):
    f = CQT(hop=hop)
    x, g = noise(22050*95), torch.Generator().manual_seed(1)
    for n in (300, 22050*10, f.hop*(f.T - 2*f.margin)*3 + 1, len(x)):
        cuts = []
        while sum(cuts) < n: cuts.append(min(n - sum(cuts), int(torch.randint(1, 200_000, (1,), generator=g))))
        assert torch.equal(torch.cat([*f.stream(x[:n].split(cuts))], -1), f.magnitude(x[:n]))


def test_blocks_leave_no_seam():
    x, step = noise(22050*50), feature.T - 2*feature.margin           # where a block hands over to the next
    pairs = [(n, k) for n in range(step - 3, step + 3) for k in (0, 1, 2, 40, 119)]
    assert apart(at(feature.magnitude(x), pairs), cqt_direct(x, pairs).abs()) < 2e-4


def test_bad_settings_say_what_to_do():
    for kw, words in ((dict(n_bins=200), 'fewer bins'), (dict(fmin=0.), 'positive'), (dict(hop=-1), 'positive'), (dict(sr=4000), 'higher rate')):
        with pytest.raises(ValueError, match=words): CQT(**kw)


def test_arguments_rebuild_it():
    f = CQT(hop=1984, gate_db=-50.)
    assert torch.equal(CQT(**f.args).encode(noise(30000)), f.encode(noise(30000))) and not f.state_dict()


@pytest.mark.parametrize('hop', [448, 1984])
def test_sound_made_from_frames_has_these_frames(hop):
    f = CQT(hop=hop)
    x = sum(tone(h, 44100) for h in (220., 330., 550., 880.))*torch.hann_window(44100)
    m = f.magnitude(x)
    y = f.decode(f.encode(x), len(x), level=frame_levels(m))
    inner = slice(3, m.shape[1] - 3)
    assert (f.encode(y)*f.encode(x)).sum(0)[inner].mean() > .98       # measured .99
    assert (f.magnitude(y).norm()/m.norm()).item() == pytest.approx(1, abs=.1)


def test_an_hour_keeps_to_its_budget():
    x = noise(2**19)
    sum(m.shape[1] for m in feature.stream([x]*2))
    start = time.process_time()
    n = sum(m.shape[1] for m in feature.stream([x]*12))
    assert (time.process_time() - start)/(n*448/22050)*3600 < 15      # s of a processor; measured 2 to 3


# The reference's bugs, each with the check that it would have failed

def test_bug_1_long_files_are_cut_into_their_full_blocks():
    assert [len(block_starts(n)) for n in (500, 1032, 1033, 3000)] == [0, 0, 1, 2]
    assert [len(block_starts(n, pad=True)) for n in (500, 3000)] == [1, 3]
    loader = BlockLoader([noise(3000, 120), noise(500, 120), noise(2100, 120, seed=1)])
    assert loader.n == 4 and next(iter(loader))[0].shape == (4, 1033, 120)


def test_bug_2_a_file_of_another_rate_has_the_same_pitch(tmp_path):
    for sr in (22050, 44100, 48000): save_audio(tmp_path/f'{sr}.wav', tone(440., 3*sr, sr), sr)
    frames = {sr: cached_frames(tmp_path/f'{sr}.wav', feature, tmp_path/'c') for sr in (22050, 44100, 48000)}
    assert {sr: int(x[70].argmax()) for sr, x in frames.items()} == dict.fromkeys(frames, 66)
    assert len({len(x) for x in frames.values()}) == 1


def test_bug_3_features_carry_the_name_of_their_file(tmp_path):
    hz = {'b/one': 220., 'a/one': 330., 'a/two': 660., 'c': 1000.}
    for i, (name, h) in enumerate(hz.items()): save_audio(tmp_path/f'{name}.wav', tone(h, 22050*(i + 1)), 22050)
    (tmp_path/'list.txt').write_text('\n'.join(f'{n}.wav' for n in hz))
    s = frame_set(tmp_path/'list.txt', feature, tmp_path/'cache')
    assert s.names == [*hz]
    for name, x, i in zip(s.names, s.frames, range(4)):
        assert len(x) == feature.shape(22050*(i + 1))[1] and abs(float(feature.freqs[x[25].argmax()])/hz[name] - 1) < .03


def test_bug_4_a_cache_notices_list_file_and_parameters(tmp_path):
    files = [tmp_path/f'{i}.wav' for i in range(3)]
    for i, f in enumerate(files): save_audio(f, tone(220.*(i + 1)), 22050)
    keys = [frames_key(files[0], CQT(**kw)) for kw in (dict(), dict(hop=1984), dict(fmin=66.), dict(n_bins=96), dict(gate_db=-60.))]
    assert len({*keys, frames_key(files[1], feature)}) == 6
    assert frame_set(files[:2], feature, tmp_path/'c').names == ['0', '1'] and frame_set(files[1:], feature, tmp_path/'c').names == ['1', '2']
    before = cached_frames(files[0], feature, tmp_path/'c').clone()
    save_audio(files[0], tone(880.), 22050)
    assert not torch.equal(cached_frames(files[0], feature, tmp_path/'c'), before)
    os.rename(files[1], tmp_path/'moved.wav')                         # by content, so a file may move
    n = len([*(tmp_path/'c').iterdir()])
    cached_frames(tmp_path/'moved.wav', feature, tmp_path/'c')
    assert len([*(tmp_path/'c').iterdir()]) == n


def test_what_is_cached_is_what_is_encoded_gate_included(tmp_path):
    x = torch.cat([noise(40000), 1e-4*noise(40000)])*.2
    save_audio(tmp_path/'x.wav', x, 22050, 'FLOAT')
    for f in (feature, CQT(gate_db=-40), CQT(hop=1984)):
        assert torch.allclose(cached_frames(tmp_path/'x.wav', f, tmp_path/'c').T, f.encode(load_audio(tmp_path/'x.wav')[0]), atol=1e-5)
    stored = [*(tmp_path/'c').glob('*.npy')]
    assert len(stored) == 3 and all(np.load(p, mmap_mode='r', allow_pickle=False).dtype == np.float32 for p in stored)


KILLED = '''
import sys, torch
from pathlib import Path
from disentangle_nb.features.blocks import cached_frames
from disentangle_nb.features.cqt import CQT
real = CQT.stream
def slow(self, pieces):
    for m in real(self, pieces): yield m; print('half way', flush=True); import time; time.sleep(60)
CQT.stream = slow
cached_frames(Path(sys.argv[1]), CQT(), Path(sys.argv[2]))
'''


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path):
    save_audio(tmp_path/'x.wav', noise(22050*80)*.1, 22050)
    p = subprocess.Popen([sys.executable, '-c', KILLED, tmp_path/'x.wav', tmp_path/'c'], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'half way\n'
    p.send_signal(signal.SIGKILL); p.wait()
    assert [q for q in (tmp_path/'c').glob('*.npy') if not q.name.startswith('.')] == []
    (part,) = (tmp_path/'c').iterdir()
    os.utime(part, (0, 0))
    x = cached_frames(tmp_path/'x.wav', feature, tmp_path/'c')
    assert len(x) == feature.shape(22050*80)[1] and not part.exists()


def test_damaged_features_are_made_again(tmp_path):
    save_audio(tmp_path/'x.wav', tone(440.), 22050)
    good = cached_frames(tmp_path/'x.wav', feature, tmp_path/'c').clone()
    path = next((tmp_path/'c').glob('*.npy'))
    for broken in (b'', b'hello', path.read_bytes()[:200], path.read_bytes()[:-9]):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match='damaged'): assert torch.equal(cached_frames(tmp_path/'x.wav', feature, tmp_path/'c'), good)


def test_bad_files_are_named_and_left_out_up_to_a_share(tmp_path):
    for i in range(9): save_audio(tmp_path/f'{i}.wav', tone(220. + i), 22050)
    save_audio(tmp_path/'silent.wav', torch.zeros(22050), 22050)
    (tmp_path/'list.txt').write_text('\n'.join([*(f'{i}.wav' for i in range(9)), 'silent.wav']))
    with pytest.warns(UserWarning, match='silent.wav: silent'): s = frame_set(tmp_path/'list.txt', feature, tmp_path/'c')
    assert len(s) == 9 and [*s.bad] == [str(tmp_path/'silent.wav')]
    with (tmp_path/'list.txt').open('a') as f: f.write('\nlost.wav')
    with pytest.raises(RecordingError, match='lost.wav: no such file.*more than the 10%'): frame_set(tmp_path/'list.txt', feature, tmp_path/'c')
    with pytest.raises(AudioError, match='no such file'): cached_frames(tmp_path/'lost.wav', feature, tmp_path/'c')
    with pytest.raises(RecordingError, match='7 of 7.*4.wav.*; and 2 more. None is left'): frame_set([tmp_path/f'lost/{i}.wav' for i in range(7)], feature, tmp_path/'c', max_bad=1)
    save_audio(tmp_path/'long.wav', tone(440., 44100), 22050)
    with pytest.warns(UserWarning, match='0.wav: lasts 50 frames .1.02 s., fewer than 60'): s = frame_set([tmp_path/'0.wav', tmp_path/'long.wav'], feature, tmp_path/'c', max_bad=.5, least=60)
    assert s.names == ['long'] and len(s.bad) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    save_audio(tmp_path/'x.wav', tone(440.), 22050)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='file.*Choose a place you may write to'): cached_frames(tmp_path/'x.wav', feature, tmp_path/'file'/'deeper')


def test_pairs_see_the_nine_frames_before_and_no_other():
    c = torch.arange(1., 51)[:, None]
    x, y, valid = context_pairs(c)
    assert len(x) == len(y) == 55 and int(valid.sum()) == 41 and valid.nonzero()[0] == 9 and valid.nonzero()[-1] == 49
    seen = torch.nn.functional.pad(x[:, 0], (4, 4)).unfold(0, 9, 1)
    for t in range(9, 50): assert seen[t].tolist() == c[t - 9:t, 0].tolist() and y[t] == c[t]
    assert (x[:5] == c[:5]).all() and (y[-5:] == c[-5:]).all()
    for bad in (0, 4): pytest.raises(ValueError, context_pairs, c, bad)


@pytest.mark.parametrize('pad', [False, True])
def test_blocks_from_memory_and_from_the_disk_are_the_same(tmp_path, pad):
    pieces = [noise(n, 7, seed=n) for n in (80, 33, 150, 20, 12)]
    for i, p in enumerate(pieces): np.save(tmp_path/f'{i}.npy', p.numpy())
    mapped = [torch.from_numpy(np.load(tmp_path/f'{i}.npy', mmap_mode='c')) for i in range(5)]
    kw = dict(bs=3, size=16, context=5, shuffle=True, seed=4, pad=pad)
    a, b = BlockLoader(pieces, **kw), BlockLoader(mapped, resident=False, **kw)
    for _ in range(2):
        for (x,), (y,) in zip(a, b, strict=True): assert torch.equal(x, y) and x.shape[1:] == (21, 7)
    assert a.n == (5 + 2 + 10 + 1 + 1 if pad else 4 + 1 + 9 + 0 + 0)
    every = a.take(torch.arange(a.n))
    for i, (item, start) in enumerate(zip(a.tensors[1], a.tensors[0])):
        p = pieces[int(item)][int(start):int(start) + 21]
        assert torch.equal(every[i, :len(p)], p) and (every[i, len(p):] == p[-1]).all()


def test_the_order_is_the_seeds_and_the_epochs():
    pieces = [noise(500, 3)]
    first = [b for b, in BlockLoader(pieces, 4, 16, 5, shuffle=True, seed=1)]
    loader = BlockLoader(pieces, 4, 16, 5, shuffle=True, seed=1)
    assert all(torch.equal(a, b) for a, (b,) in zip(first, [*loader], strict=True)) and not torch.equal(first[0], next(iter(loader))[0])
    assert len(loader) == len(first) == math.ceil(loader.n/4) and loader.new(bs=2).bs == 2 and len(loader.new(bs=2)) > len(loader)
    halves = [next(iter(loader.new(share=(r, 2))))[0] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), next(iter(loader.new()))[0])


def test_files_stream_as_they_load(tmp_path):
    for sr in (22050, 44100, 8000):
        save_audio(tmp_path/f'{sr}.flac', torch.stack([noise(sr*30), noise(sr*30, seed=1)])*.1, sr)
        assert torch.equal(torch.cat([*stream_audio(tmp_path/f'{sr}.flac', 22050)]), load_audio(tmp_path/f'{sr}.flac', 22050)[0])


def test_lists_are_read_as_they_are(tmp_path):
    for n in ('x/1.wav', 'y/1.wav'): save_audio(tmp_path/n, tone(440.), 22050)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = frame_set(read_recordings(tmp_path), feature, tmp_path/'c')
    assert s.names == ['x/1', 'y/1'] and len({frames_key(Path(f), feature) for f in (tmp_path/'x/1.wav', tmp_path/'y/1.wav')}) == 1

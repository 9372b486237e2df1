"What a latent is said to do is what it does: traversals, the table in physical units, the swap test, animations."
import math

import numpy as np
import pytest
import torch
from torch import nn

from disentangle_nb.core import make_generator
from disentangle_nb.data.syntone import Tones, WorldError
from disentangle_nb.features.tonemel import LevelMel, MaxMel
from disentangle_nb.models.vae import SmallVAE
from disentangle_nb.synthesis.traverse import (
    Dials, Reader, animate, animate_pairs, animate_samples, animate_traversal, between, codes_of, hear, inputs_of,
    latent_names, latent_owner, latent_plane, latent_table, move_latents, plan_pairs, reader_accuracy, show_moves,
    show_plane, show_sounds, show_traversal, sizes_of, swap_latents, swap_table, traversal, walk)


class Ramp(nn.Module):
    "Two groups of latents and a condition; the input is told exactly by all three."
    factors, groups = ['a', 'b'], dict(a=2, b=1)

    def decode(self, a, b, shift=None):
        x = torch.cat([a, b], 1)[:, :, None].expand(-1, 3, 4)
        return x if shift is None else x + shift[:, None, None]

    def encode(self, x, shift=None):
        z = x[..., 0] if shift is None else x[..., 0] - shift[:, None]
        return dict(b=z[:, 2:], a=z[:, :2])


@pytest.fixture(scope='module')
def world():
    return Tones(freqs=np.geomspace(110, 880, 25), amps=np.geomspace(.1, 1, 11), timbres=('sawtooth',),
                 tilt=np.linspace(-12, 0, 5), equal_rms=True, phase=.1, dur=.3)


@pytest.fixture(scope='module')
def reader(world): return Reader(world, LevelMel())


@pytest.fixture(scope='module')
def model(reader): return Dials(reader)


@pytest.fixture(scope='module')
def turned(reader):
    return Dials(reader, torch.linalg.qr(torch.randn(4, 4, generator=make_generator(0)))[0])


@pytest.fixture(scope='module')
def x(world): return LevelMel().encode(world.render(world.sample(6, make_generator(0))))


# --- walks

def test_one_coordinate_moves_and_the_rest_stays():
    z, values = torch.tensor([[.1, .2, .3], [1., 2., 3.]]), torch.tensor([-3., 0., 5.])
    codes = walk(z, values)
    assert codes.shape == (2, 3, 3, 3)
    for i in range(3):
        rest = [j for j in range(3) if j != i]
        assert torch.equal(codes[:, i, :, i], values.expand(2, 3))
        assert torch.equal(codes[:, i][..., rest], z[:, None, rest].expand(2, 3, 2))


def test_faithful_is_the_published_loop():
    z, values = torch.tensor([.1, .2, .3, .4]), torch.linspace(-3, 3, 10)
    want, left = torch.empty(4, 10, 4), z.clone()
    for i in range(4):
        for s, v in enumerate(values):
            left[i] = v
            want[i, s] = left
    assert torch.equal(walk(z, values, faithful=True), want)
    assert torch.equal(walk(z, values)[0], want[0]) and not torch.equal(walk(z, values)[1], want[1])


def test_faithful_leaves_behind_only_what_it_moved():
    codes = walk(torch.zeros(4), [1., 2.], dims=[3, 1], faithful=True)
    assert codes[1].tolist() == [[0, 1, 0, 2], [0, 2, 0, 2]]


def test_values_count_in_deviations_around_codes():
    around = torch.tensor([[0., 10.], [2., 30.]])
    codes = walk(torch.zeros(2), [-1., 1.], around=around)
    sd = math.sqrt(2)
    assert torch.allclose(codes[0, :, 0], torch.tensor([1 - sd, 1 + sd]))
    assert torch.allclose(codes[1, :, 1], torch.tensor([20 - 10*sd, 20 + 10*sd]))


def test_a_batch_is_its_single_codes():
    net = SmallVAE(32, 16, latent=3).eval()
    z = torch.randn(3, 3, generator=make_generator(1))
    both = traversal(net, z, [-2., 0., 2.], bs=4)
    assert both.shape == (3, 3, 3, 32, 16)
    for i in range(3): assert torch.allclose(both[i], traversal(net, z[i], [-2., 0., 2.]), atol=1e-5)
    at = traversal(net, z[0], [float(z[0, 1])], dims=[1])[0, 0]
    assert torch.allclose(at, net.decode(z[:1])[0], atol=1e-5)


def test_groups_and_conditions_reach_the_decoder():
    net, z = Ramp(), torch.arange(6.).view(2, 3)
    assert sizes_of(net) == dict(a=2, b=1) and latent_names(net) == ['a0', 'a1', 'b0']
    assert torch.equal(codes_of(net, inputs_of(net, z)), z)           # in the order of the groups, not of the dict
    shift = torch.tensor([10., 20.])
    out = traversal(net, z, [0., 1.], shift=shift)
    assert torch.equal(out[..., 0], walk(z, [0., 1.]) + shift[:, None, None, None])
    assert torch.equal(codes_of(net, inputs_of(net, z, shift=shift), bs=1, shift=shift), z)


def test_training_mode_is_given_back():
    net = SmallVAE(32, 16, latent=3).train()
    inputs_of(net, torch.zeros(1, 3))
    codes_of(net, torch.zeros(1, 32, 16))
    assert net.training


def test_between_joins_two_codes():
    line = between(torch.tensor([0., 2.]), torch.tensor([4., 0.]), 5)
    assert line.tolist() == [[0, 2], [1, 1.5], [2, 1], [3, .5], [4, 0]]


@pytest.mark.parametrize('call, says', [
    (lambda n: traversal(n, torch.zeros(3), dims=[3]), 'numbered 0 to 2'),
    (lambda n: traversal(n, torch.zeros(3), dims=[-1]), 'numbered 0 to 2'),
    (lambda n: traversal(n, torch.zeros(3), dims=[]), 'got none'),
    (lambda n: traversal(n, torch.zeros(3), [0., math.nan]), 'finite'),
    (lambda n: traversal(n, torch.zeros(3), []), 'finite'),
    (lambda n: traversal(n, torch.tensor([0., 0., math.nan])), 'NaN'),
    (lambda n: traversal(n, torch.zeros(2, 4)), 'has 3 latents'),
    (lambda n: between(torch.zeros(3), torch.zeros(3), 1), 'two ends'),
    (lambda n: between(torch.zeros(3), torch.zeros(2)), 'one shape'),
    (lambda n: move_latents(n, LevelMel(), torch.zeros(3)), r'\(b, d\)'),
    (lambda n: hear(nn.Identity(), torch.zeros(1, 3, 4)), 'no `decode`'),
    (lambda n: hear(LevelMel(), torch.full((1, 128, 8), math.nan)), 'NaN'),
])
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says): call(Ramp())


# --- the table in physical units

@pytest.fixture(scope='module')
def moves(model, x): return move_latents(model, model.reader.feature, codes_of(model, x))


def test_the_table_reads_what_the_dials_do(world, model, moves):
    t = latent_table(moves, kl=[2., 3., 4., 0.])
    assert list(t.index) == ['z0', 'z1', 'z2', 'z3', 'no move']
    assert abs(t.f0_cents.z1 - 3600) < 30 and abs(t.level_db.z2 - 20) < .5     # mel bands and a short phase search
    assert t.f0_cents[['z0', 'z2', 'z3']].max() < 30 and t.level_db[['z0', 'z1', 'z3']].max() < .7
    assert t.f0_rho.z1 > .99 and t.level_rho.z2 > .99 and t.centroid_rho.z0 > .9
    assert (t.f0_lo <= t.f0_cents).all() and (t.f0_cents <= t.f0_hi).all() and (t.pitched == 1).all()
    assert t.loc['z3', ['f0_cents', 'centroid_cents', 'level_db']].max() == 0 and math.isnan(t.level_rho.z3)
    assert t.kl.tolist()[:4] == [2, 3, 4, 0] and math.isnan(t.kl['no move'])


def test_brightness_is_that_of_the_real_tones(world, model, x, moves):
    rows = model.reader(x)
    ends = [rows.clone(), rows.clone()]
    ends[0][:, 0], ends[1][:, 0] = 0, 4
    from disentangle_nb.features.descriptors import centroid_hz
    dull, bright = (centroid_hz(world.render(e), world.sr) for e in ends)
    want = (1200*torch.log2(bright/dull)).median()
    assert abs(latent_table(moves).centroid_cents.z0 - want) < 150


def test_directions_turn_with_the_latent(world, reader, x):
    flipped = Dials(reader, torch.diag(torch.tensor([1., -1., -1., 1.])))
    t = latent_table(move_latents(flipped, reader.feature, codes_of(flipped, x[:2]), dims=[1, 2]))
    assert list(t.index) == ['z1', 'z2', 'no move'] and t.f0_rho.z1 < -.99 and t.level_rho.z2 < -.99


def test_a_rotated_code_moves_everything_together(turned, x):
    t = latent_table(move_latents(turned, turned.reader.feature, codes_of(turned, x[:3])))
    assert (t.f0_cents[:4] > 150).sum() >= 3 and (t.level_db[:4] > 2).sum() >= 3


def test_no_move_is_the_grain_of_the_chain(world, reader, model, x):
    vague = Dials(Reader(world, reader.feature, n=150))
    t = latent_table(move_latents(vague, reader.feature, codes_of(model, x), dims=[2]))
    sure = latent_table(move_latents(model, reader.feature, codes_of(model, x), dims=[2]))
    grain = ['centroid_cents', 'level_db']
    assert (t.loc['no move', grain] > sure.loc['no move', grain]).all()
    assert abs(t.level_db.z2 - 20) < .5                                    # of the walks, which do not encode


def test_an_erased_level_is_nan(world, x):
    deaf = Dials(Reader(world, MaxMel()))
    z = codes_of(deaf, deaf.reader.feature.encode(world.render(world.sample(2, make_generator(0)))))
    moves = move_latents(deaf, deaf.reader.feature, z, dims=[1])
    t = latent_table(moves)
    assert t.level_db.isna().all() and abs(t.f0_cents.z1 - 3600) < 60
    assert len(np.ravel(show_moves(moves))) == 2


def test_what_has_no_pitch_has_no_range_of_it():
    class Hiss(nn.Module):
        factors, groups = ['z'], dict(z=1)
        def decode(self, z): return .5 + .2*torch.rand(len(z), 128, 10, generator=make_generator(0)) + z[..., None]/100
        def encode(self, x): return dict(z=x.mean((1, 2))[:, None])
    t = latent_table(move_latents(Hiss(), LevelMel(), torch.zeros(3, 1)))
    assert t.pitched.z0 < .5 and t.level_db.z0 > 1


def test_kl_needs_one_number_a_latent(moves):
    with pytest.raises(ValueError, match='one each'): latent_table(moves, kl=[1., 2.])


def test_a_plane_holds_the_measures_of_its_corners(model, x):
    z, feature = codes_of(model, x[:1])[0], model.reader.feature
    maps = latent_plane(model, feature, z, (1, 2), [-3., 3.])
    assert np.allclose(1200*np.log2(maps['f0'][:, 1]/maps['f0'][:, 0]), 3600, atol=30)
    assert np.allclose(maps['level'][1] - maps['level'][0], 20, atol=.5)
    assert len(np.ravel(show_plane(maps, [-3., 3.]))) == 3


# --- the reader

def test_a_reader_reads_fresh_sounds(world, reader):
    some = reader_accuracy(Reader(world, reader.feature, n=500), 200)
    assert (reader_accuracy(reader, 100).exact == 1).all()                  # it knows them all
    assert some.exact.frequency > .7 and some.exact.frequency > 5/25 and some.exact.amplitude > 2/11
    assert some.off_by.amplitude <= 4 and some.unit.tolist() == ['dB/octave', 'cents', 'dB', 'wrong']


def test_a_reader_cannot_read_what_the_feature_erased(world):
    blind = reader_accuracy(Reader(world, MaxMel()), 300)
    assert blind.exact.amplitude < .25 and blind.exact.frequency > .95


def test_a_reader_refuses_other_inputs(reader, x):
    with pytest.raises(ValueError, match='knows inputs of shape'): reader(x[..., :5])
    with pytest.raises(ValueError, match='NaN'): reader(x*math.nan)


# --- the swap test

def owners(net, world):
    rows = world.sample(1500, make_generator(2))
    codes = (rows/net.top.clamp(min=1)*6 - 3).float() @ net.mix
    return latent_owner(codes, world.values(rows, world.names[:3]), names=world.names[:3])


def shares(net, owner, **kw):
    return swap_table(swap_latents(net, net.reader, owner, **kw)).set_index(['condition', 'measure'])


def test_owners_are_found(model, turned, world):
    mine = owners(model, world)
    assert mine.owner.tolist() == ['tilt', 'frequency', 'amplitude', ''] and mine.tilt.z0 > .99
    blur = owners(turned, world).drop(columns='owner').to_numpy()
    assert blur.max() < .8 and (blur > .05).sum() > 4
    rows = world.sample(500, make_generator(3))
    told = latent_owner(rows[:, 1:3]*1e-6, world.values(rows, world.names[1:3]), names=world.names[1:3], kl=[1., 1e-6])
    assert told.amplitude.z1 > .9 and told.owner.tolist() == ['frequency', '']      # it tells, but it is asleep
    noise = torch.randn(1500, 3, generator=make_generator(0))
    assert (latent_owner(noise, world.sample(1500, make_generator(4))[:, :1]).owner == '').all()


def test_pairs_differ_in_everything(world):
    a, b = plan_pairs(world, 100)
    least = torch.tensor([1, 6, 3, 0])
    assert len(a) == len(b) == 100 and ((a - b).abs() >= least).all()
    assert torch.equal(a, plan_pairs(world, 100)[0]) and not torch.equal(a, plan_pairs(world, 100, seed=1)[0])
    narrow = Tones(freqs=[220., 440.], amps=[.5, 1.], timbres=('sine',), dur=.1)
    narrow.weights[0, 1] = torch.eye(2, dtype=torch.float64)
    narrow.weights[0, 1][1, 1] = 0                                          # one combination is left
    with pytest.raises(WorldError, match='pairs differ'): plan_pairs(narrow, 5)


def test_a_perfect_code_hands_over_one_factor(model, world):
    t = shares(model, owners(model, world), n=30)
    assert t.value.min() > .95 and t.value.notna().all()
    assert t.goal['swap frequency', 'frequency'] == 'donor' and t.goal['swap frequency', 'tilt'] == 'receiver'
    assert t.off_by['swap frequency', 'frequency'] == 0 and t.off_by['swap frequency', 'f0 (heard)'] < 30
    assert t.latents['swap all', 'tilt'] == 4 and t.latents['swap tilt', 'tilt'] == 1


def test_a_rotated_code_does_not(model, turned, world):
    t = shares(turned, owners(turned, world), n=40, sound=False)
    for control in ('original', 'no swap', 'swap all'): assert t.loc[control].value.min() == 1
    swaps = [t.value[f'swap {a}', b] for a in world.names[:3] for b in world.names[:3]]
    assert np.mean(swaps) < .8


def test_wrong_owners_are_found_out(model):
    t = shares(model, ['frequency', 'tilt', 'amplitude', ''], n=30, sound=False)
    assert t.value['swap frequency', 'frequency'] == 0 and t.value['swap frequency', 'tilt'] == 0
    assert t.value['swap amplitude', 'amplitude'] == 1 and t.value['swap amplitude', 'tilt'] == 1


def test_what_owns_nothing_hands_nothing_over(model):
    t = shares(model, ['', 'frequency', '', ''], n=30)
    assert t.value['swap tilt', 'tilt'] == 0 and t.latents['swap tilt', 'tilt'] == 0
    assert t.value['swap tilt', 'frequency'] == 1 and t.value['swap amplitude', 'level (heard)'] == 0
    assert t.value['swap frequency', 'f0 (heard)'] == 1


@pytest.mark.parametrize('owner, error, says', [
    (['tilt', 'frequency', 'amplitude'], ValueError, '3 owners for 4 latents'),
    (['tilt', 'frequenzy', '', ''], WorldError, "did you mean 'frequency'"),
    (['timbre', '', '', ''], WorldError, 'factor that varies'),                # it has one level here
])
def test_owners_that_make_no_sense(model, owner, error, says):
    with pytest.raises(error, match=says): swap_latents(model, model.reader, owner, n=4)


def test_an_orchestra_is_a_world_too():
    pytest.importorskip('pretty_midi')
    from disentangle_nb.data.worlds import orchestra_world
    from disentangle_nb.features.mel import LogMel
    world = orchestra_world(['Violin', 'Oboe'], (60, 66), (40, 120), dur=.3)
    net = Dials(Reader(world, LogMel(n_mels=96)))
    assert (reader_accuracy(net.reader, 20).exact == 1).all()
    assert shares(net, ['instrument', 'pitch', 'velocity'], n=8).value.min() > .8
    held = swap_table(swap_latents(net, net.reader, ['pitch', 'instrument', 'velocity'], n=8, sound=False))
    assert held.value.min() < .5


# --- figures and animations

def gif(path):
    from PIL import Image
    with Image.open(path) as im:
        times = []
        for i in range(im.n_frames):
            im.seek(i)
            im.load()
            times.append(im.info['duration'])
        return im.format, times, im.info.get('loop'), im.size


def test_animations_have_their_frames(tmp_path, world, x):
    import matplotlib.pyplot as plt
    feature, wav, open_before = LevelMel(), world.render(world.sample(6, make_generator(0))), plt.get_fignums()
    paths = [animate_pairs(tmp_path/'a.gif', feature, wav[:3], x[:3], x[3:6]),
             animate_samples(tmp_path/'b.gif', feature, x[:3], ms=100),
             animate_traversal(tmp_path/'c.gif', feature, x.view(2, 3, *x.shape[1:]), [-3., 0., 3.])]
    for path, ms in zip(paths, (200, 100, 200)):
        kind, times, loop, size = gif(path)
        assert (kind, times, loop) == ('GIF', [ms]*3, 0) and size[0] > 100 and path.stat().st_size < 1e6
    assert plt.get_fignums() == open_before                                    # every frame is closed again


def test_a_failed_animation_leaves_nothing(tmp_path):
    def draw(i):
        if i: raise RuntimeError('out of ink')
        import matplotlib.pyplot as plt
        return plt.figure(figsize=(1, 1))
    (tmp_path/'a.gif').write_text('old')
    with pytest.raises(RuntimeError, match='ink'): animate(tmp_path/'a.gif', draw, 2)
    assert (tmp_path/'a.gif').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match='a frame or more'): animate(tmp_path/'a.gif', draw, 0)


def test_figures_say_what_their_axes_are(world, x):
    feature, wav = LevelMel(), world.render(world.sample(2, make_generator(0)))
    ax = np.ravel(show_sounds({'original': (wav[0], x[0]), 'reconstruction': (wav[0]/10, x[0])}, feature))
    assert [a.get_xlabel() for a in ax[:3]] == ['time (s)', 'frequency (Hz)', 'time (s)']
    assert [a.get_ylabel() for a in ax[:3]] == ['amplitude', 'magnitude (dB)', 'frequency (Hz)']
    peaks = [max(ax[i].lines[0].get_ydata()) for i in (1, 4)]
    assert peaks[0] == pytest.approx(0, abs=.1) and peaks[1] == pytest.approx(-20, abs=.1)   # on the first row's scale
    assert ax[1].lines[0].get_xdata()[-1] == world.sr/2
    grid = show_traversal(x.view(2, 3, *x.shape[1:]), [-1, 0, 1], feature)
    assert len(grid) == 6 and grid[3].get_ylabel() == 'z1'
    one = show_traversal(x[:1, None], [0.], nn.Identity())                      # any input, any number of panels
    assert len(one) == 1

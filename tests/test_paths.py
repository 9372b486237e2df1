"Paths through latent spaces: batches, portions and precision; wrong derivatives; order of convergence; models of slices."
import math

import pytest, torch
from torch import nn

from disentangle_nb.core import make_generator
from disentangle_nb.synthesis import paths
from disentangle_nb.synthesis.paths import (animate_path, decoded, energy, heading, jacobian, jumps, length, line, optimised, paced,
                                            path_audio, shoot, steps_of)


def network(act=nn.Tanh, d=3, m=200, seed=0):
    net, g = nn.Sequential(nn.Linear(d, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, m)), make_generator(seed)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g)*(1.5/p.shape[-1]**.5 if p.ndim > 1 else .5)
    return net


def globe(z): return torch.stack([z[:, 0].cos()*z[:, 1].cos(), z[:, 0].cos()*z[:, 1].sin(), z[:, 0].sin()], 1)
def pairs(n, d=3, seed=1): return torch.randn(2, n, d, generator=make_generator(seed))


@pytest.mark.parametrize('act', [nn.Tanh, nn.ReLU, nn.ELU])
@pytest.mark.parametrize('seed', range(3))
def test_most_pairs_gain_and_none_loses(act, seed):
    f, (a, b) = network(act, seed=seed), pairs(20, seed=seed + 5)
    path, log = optimised(f, a, b, steps=20)
    assert torch.equal(path[:, 0], a) and torch.equal(path[:, -1], b) and not path.requires_grad
    low, high = energy(f, path), energy(f, line(a, b, 20))
    assert (low <= high).all() and (low < .999*high).float().mean() >= .8
    assert jumps(f, path).mean() < jumps(f, line(a, b, 20)).mean()
    assert (log['energy'].diff(dim=0) <= 0).all() and torch.equal(log['energy'][-1], low)


@pytest.mark.parametrize('wrong', [lambda J: -J, lambda J: J.flip(-1), lambda J: 0*J, lambda J: J.roll(1, -2)])
def test_a_wrong_derivative_gains_little_and_loses_nothing(monkeypatch, wrong):
    f, (a, b) = network(), pairs(20)
    right = energy(f, optimised(f, a, b, steps=20)[0])
    monkeypatch.setattr(paths, 'jacobian', lambda f, z: wrong(jacobian(f, z)))
    path, log = optimised(f, a, b, steps=20)
    assert torch.equal(path[:, 0], a) and torch.equal(path[:, -1], b)
    high = energy(f, line(a, b, 20))
    assert (energy(f, path) <= high).all() and ((high - energy(f, path)) < .7*(high - right)).float().mean() > .8


def test_a_pair_alone_equals_the_pair_in_a_batch():
    f, (a, b) = network().double(), pairs(4).double()
    together, log = optimised(f, a, b, steps=15)
    shots, even = shoot(f, a, b - a, 15), paced(f, line(a, b, 15))
    for i in range(4):
        j = slice(i, i + 1)
        alone, own = optimised(f, a[j], b[j], steps=15)
        assert own['iterations'] == log['iterations'][j]
        torch.testing.assert_close(alone, together[j])
        torch.testing.assert_close(shoot(f, a[j], b[j] - a[j], 15), shots[j])
        torch.testing.assert_close(paced(f, line(a[j], b[j], 15)), even[j])


def test_portions_and_precision_do_not_matter():
    f, z = network(), pairs(7)[0]
    torch.testing.assert_close(jacobian(f, z, bs=4), jacobian(f, z))
    torch.testing.assert_close(decoded(f, z, bs=3), decoded(f, z))
    exact = torch.stack([torch.autograd.functional.jacobian(lambda v: f(v[None])[0], q) for q in z])
    torch.testing.assert_close(jacobian(f, z), exact)
    a, b = pairs(5)
    single, double = optimised(f, a, b)[1], optimised(f.double(), a.double(), b.double())[1]
    torch.testing.assert_close(single['energy'][-1].double(), double['energy'][-1], rtol=1e-4, atol=0)
    assert double['converged'].all() and single['converged'].all()


def test_scaling_the_latents_changes_nothing():
    f, (a, b), scale = network().double(), pairs(5).double(), torch.tensor([1., 100., .01]).double()
    plain, _ = optimised(f, a, b, steps=12)
    scaled, _ = optimised(lambda z: f(z/scale), a*scale, b*scale, steps=12)
    torch.testing.assert_close(scaled/scale, plain, rtol=1e-4, atol=1e-4)
    shots = shoot(lambda z: f(z/scale), a*scale, (b - a)*scale, 12)/scale
    torch.testing.assert_close(shots, shoot(f, a, b - a, 12), rtol=1e-4, atol=1e-4)


def test_lengths_on_the_globe_are_angles():
    a, b = torch.rand(2, 20, 2, generator=make_generator(2), dtype=torch.double)*2 - 1
    path, log = optimised(globe, a, b, steps=60)
    assert log['converged'].all()
    torch.testing.assert_close(length(globe, path), (globe(a)*globe(b)).sum(1).acos(), rtol=2e-4, atol=0)


def test_shots_are_of_second_order_and_the_published_ones_of_first():
    start = torch.tensor([[.5, -.3], [-.7, 1.1], [.1, .2]]).double()
    aim = torch.tensor([[.2, 1.], [1., -.4], [-.5, -.5]]).double()
    aim = aim/(jacobian(globe, start) @ aim[..., None]).norm(dim=1)
    v = (jacobian(globe, start) @ aim[..., None])[..., 0]
    there = globe(start)*math.cos(1) + v*math.sin(1)
    def miss(n, **kw): return (globe(shoot(globe, start, aim, n, **kw)[:, -1]) - there).norm(dim=1).max().item()
    assert miss(41) < 1e-3 and 3 < miss(41)/miss(81) < 5
    assert 1.6 < miss(41, faithful=True)/miss(81, faithful=True) < 2.5


def test_a_flat_decoder_is_left_alone():
    W, (a, b) = torch.randn(500, 3, generator=make_generator(3)), pairs(10)
    f = lambda z: z @ W.T
    for way in (optimised(f, a, b)[0], shoot(f, a, b - a), shoot(f, a, b - a, faithful=True), paced(f, line(a, b))):
        assert (way - line(a, b)).abs().max() < 1e-3


def test_every_step_has_the_one_speed_or_none():
    for seed in range(3):
        for act in (nn.Tanh, nn.ReLU):
            f, (a, b) = network(act, seed=seed), pairs(10, seed=seed)
            step = steps_of(f, shoot(f, a, b - a, 30))
            speed = (jacobian(f, a) @ (b - a)[..., None]).norm(dim=(1, 2))/29
            share = step/speed[:, None]
            assert (((share - 1).abs() < .0101) | (share < 1e-6)).all()


@pytest.mark.parametrize('f', [lambda z: 0*z, lambda z: z[:, :1].expand(-1, 9), lambda z: torch.cat([z, z], 1).tanh()])
def test_decoders_with_latents_that_do_nothing(f):
    a, b = pairs(6)
    path, log = optimised(f, a, b, steps=9)
    shots = shoot(f, a, b - a, 9)
    assert path.isfinite().all() and shots.isfinite().all() and paced(f, path).isfinite().all()
    assert (energy(f, path) <= energy(f, line(a, b, 9))).all() and heading(f, path).isfinite().all()


def test_a_path_at_the_end_of_the_world_stands_still():
    z = torch.full((1, 1), .5)
    way = shoot(lambda z: torch.cat([z.sqrt(), z], 1), z, torch.tensor([[-3.]]), 20)[0, :, 0]
    assert way.isfinite().all() and (way >= 0).all() and way[-1] == way[-2]


class Slices(nn.Module):
    "Three latents, an instrument and a pitch to a slice of 16 frames."
    factors, args = ['z', 'timbre', 'pitch'], dict(n_frames=16)
    def __init__(self):
        super().__init__()
        self.names, self.net = nn.Embedding(2, 4), network(d=3 + 4 + 1, m=20*16)
    def component(self, factor, idx): return self.names(idx) if factor == 'timbre' else idx[..., None].float()
    def decode(self, z, timbre, pitch): return self.net(torch.cat([z, timbre, pitch], 1)).view(-1, 20, 16)


class Keep(nn.Module):
    "A feature that hands on what it gets."
    sr, hop = 22050, 1
    def decode(self, x, n_iter=1): return x.mean(1)


def test_a_model_of_slices_plays_forty_of_them():
    from disentangle_nb.models.system import Disentangler
    system = Disentangler(Keep(), Slices(), dict(timbre=['sax', 'violin'], pitch=[57, 58]))
    a, b = pairs(1)
    f = paths.decoder_of(system, 'z', timbre='violin', pitch=57)
    path, log = optimised(f, a, b, steps=40)
    assert (log['energy'][-1] <= log['energy'][0]).all()
    wav = path_audio(system, path[0], 'z', timbre='violin', pitch=57)
    assert wav.shape == (40*16,) and not wav.requires_grad
    held = dict(timbre=system.model.component('timbre', torch.tensor([1])), pitch=torch.zeros(1))
    torch.testing.assert_close(path_audio(system, path[0], 'z', **held), wav)
    assert not torch.equal(path_audio(system, path[0], 'z', timbre='sax', pitch=57), wav)
    with pytest.raises(ValueError, match='did you mean violin'): path_audio(system, path[0], 'z', timbre='violine', pitch=57)


@pytest.mark.parametrize('d', [2, 3, 16])
def test_an_animation_has_the_published_form(tmp_path, d):
    from PIL import Image
    few = d != 3
    path = torch.randn(40, d, generator=make_generator(d))
    file = animate_path(tmp_path/'a.gif', path, path.abs().mean(1, keepdim=True).expand(-1, 500), 'a', **dict(n=3) if few else {})
    with Image.open(file) as gif: assert (gif.n_frames, gif.size, gif.info['duration']) == (3 if few else 50, (540, 270), 100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    f, (a, b) = network().cuda(), pairs(5).cuda()
    path, log = optimised(f, a, b)
    assert path.is_cuda and (log['energy'][-1] <= log['energy'][0]).all()
    assert shoot(f, a, b - a).is_cuda and paced(f, path).is_cuda

"What the models with unnamed latents and their objectives must answer."
import math
import pytest, torch
from disentangle_nb.models.vae import Discriminator, SmallVAE, ToneVAE, WaveClassifier, WaveVAE

tiny = dict(n_mels=16, n_frames=16, latent=4)
models = {'tone': lambda: ToneVAE(**tiny), 'deeper': lambda: ToneVAE(**tiny, channels=(8, 8, 16, 16), hidden=(32, 16)),
          'small': lambda: SmallVAE(**tiny, channels=(8, 16), hidden=16), 'groups': lambda: ToneVAE(**tiny, groups=dict(timbre=2, level=1, pitch=1)),
          'wave': lambda: WaveVAE(256, 4)}
COUNTS = [(ToneVAE, {}, 1_117_521), (ToneVAE, dict(latent=10), 1_117_909), (ToneVAE, dict(channels=(16, 32, 64, 128), hidden=(256, 128)), 1_314_193),
          (ToneVAE, dict(channels=(16, 32, 64, 128), hidden=(256, 128), latent=10), 1_314_965), (Discriminator, {}, 4_015_002),
          (Discriminator, dict(latent=10), 4_017_002), (WaveVAE, {}, 9_235_489), (WaveClassifier, {}, 8_193_988)]


def inputs(model, n=6): return torch.rand(n, *model.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=models)
def model(request):
    torch.manual_seed(0)
    return models[request.param]()


@pytest.mark.parametrize('make, args, n', COUNTS, ids=lambda v: getattr(v, '__name__', str(v)))
def test_parameter_counts_are_the_published_ones(make, args, n):
    with torch.device('meta'): m = make(**args)
    assert sum(p.numel() for p in m.parameters()) == n


def test_layers_of_the_published_network():
    with torch.device('meta'): m = ToneVAE()
    enc, dec = [[tuple(p.shape) for p in s.parameters() if p.ndim > 1] for s in (m.encoder, m.decoder)]
    assert enc == [(16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (128, 4096), (64, 128)]
    assert dec == [(64, 8), (128, 64), (4096, 128), (64, 32, 3, 3), (32, 16, 3, 3), (16, 1, 3, 3)]
    assert sum(p.numel() for n, p in m.named_parameters() if not n.startswith('decoder')) == 557_008
    assert sum(p.numel() for p in m.decoder.parameters()) == 560_513
    assert isinstance(m.decoder[5], torch.nn.LeakyReLU) and isinstance(m.decoder[-2], torch.nn.Sigmoid) # the last dense layer keeps its activation


def test_an_untrained_model_starts_where_the_published_one_does():
    torch.manual_seed(0)
    m, x = ToneVAE(), torch.zeros(8, 128, 32)
    out = m(x)
    assert .3 < out['x_hat'].mean() < .7 and out['x_hat'].std() < .05 # a sigmoid near the middle everywhere
    kl = .5 * (out['mu'].square() + out['logvar'].exp() - out['logvar'] - 1).sum(1).mean()
    assert kl < .3


def test_the_adversary_starts_as_published():
    torch.manual_seed(0)
    d = Discriminator()
    for m, fan in ((d.layers[0], 8), (d.layers[2], 1000), (d.layers[-1], 1000)):
        assert .9 * math.sqrt(6 / fan) < m.weight.abs().max() <= math.sqrt(6 / fan)
    assert [m.negative_slope for m in d.layers if isinstance(m, torch.nn.LeakyReLU)] == [.2] * 5 and d(torch.randn(3, 8)).shape == (3, 2)


def test_the_contract_of_a_system_s_model(model):
    x = inputs(model)
    codes = model.eval().encode(x)
    assert list(codes) == model.factors and model.decode(**codes).shape == x.shape
    assert torch.equal(model.decode(**codes), model.decode(*codes.values()))
    f = model.factors[0]
    assert model.nearest(f, codes[f]).exp().sum(1).allclose(torch.ones(6)) and model.component(f, torch.tensor([0, 1])).shape == (2, codes[f].shape[1])
    out = model(x)
    assert out['x_hat'].shape == x.shape and torch.equal(torch.cat(list(codes.values()), 1), out['mu']) and out['logvar'].shape == out['z'].shape == (6, 4)
    with pytest.raises(ValueError): model.component('nobody', 0)


def test_every_parameter_gets_a_gradient(model):
    out = model.train()(inputs(model))
    (out['x_hat'].square().sum() + out['mu'].sum() + out['logvar'].sum() + out.get('x_logvar', 0)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()]


def test_evaluation_is_deterministic_and_training_is_not(model):
    x = inputs(model)
    assert torch.equal(model.eval()(x)['x_hat'], model(x)['x_hat']) and torch.equal(model(x)['z'], model(x)['mu'])
    assert not torch.equal(model.train()(x)['z'], model(x)['z'])
    model.eval().sample_in_eval = True
    assert not torch.equal(model(x)['z'], model(x)['z'])


def test_one_input_equals_itself_in_a_batch(model):
    x = inputs(model)
    whole = model.eval()(x)
    for i in (0, 5): assert torch.allclose(model(x[i:i + 1])['x_hat'], whole['x_hat'][i:i + 1], atol=1e-5)


def test_arguments_and_state_bring_it_back(model):
    again = type(model)(**model.args)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs(model))['x_hat'], model.eval()(inputs(model))['x_hat'])


def test_overfits_one_batch(model):
    x = inputs(model, 8) - .5 * isinstance(model, WaveVAE)
    opt, first = torch.optim.Adam(model.parameters(), 3e-3), None
    for _ in range(400):
        mu, _ = model.posterior(x)
        error = (model.decoder(mu) - x).square().mean()
        first = first or (x - x.mean(0)).square().mean().item()
        opt.zero_grad(); error.backward(); opt.step()
    assert error.item() < .7 * first


def test_saved_systems_hold_them(tmp_path):
    from disentangle_nb.features.mel import LogMel
    from disentangle_nb.models.system import Disentangler
    torch.manual_seed(0)
    mel = LogMel(16000, 512, 256, 16, 40., 8000.)
    system = Disentangler(mel, ToneVAE(**tiny, groups=dict(timbre=2, pitch=2)), {})
    system.save(tmp_path/'s')
    again = Disentangler.load(tmp_path/'s', device='cpu')
    clip = .1 * torch.randn(3800)
    assert torch.equal(again.encode(clip)['pitch'], system.encode(clip)['pitch']) and again.factors == ['timbre', 'pitch']


@pytest.mark.parametrize('make', [lambda: ToneVAE(n_mels=100), lambda: ToneVAE(n_frames=4), lambda: SmallVAE(n_frames=31), lambda: WaveVAE(10), lambda: WaveVAE(0),
                                  lambda: ToneVAE(groups=dict(a=4)), lambda: ToneVAE(groups=dict(a=8, b=0))])
def test_sizes_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match=r'.{20}'): make()

"What the models with unnamed latents and their objectives must answer."
import math
import pytest, torch
from disentangle_nb.losses.tc import (ESTIMATORS, AdaLoss, AnnealedLoss, BetaTCLoss, DIPLoss, FactorLoss, HFLoss, VAELoss, gaussian_tc, log_q,
                                     log_weights, permute_dims, ratio_tc, share_posterior, split_kl)
from disentangle_nb.models.vae import Discriminator, Halve, SmallVAE, ToneVAE, WaveClassifier, WaveVAE

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


# Objectives

objectives = {'VAE': VAELoss, 'beta': lambda **k: VAELoss(4., **k), 'annealed': lambda **k: AnnealedLoss(10., 5., **k), 'factor': lambda **k: FactorLoss(Discriminator(4, 16, 2), **k),
              'beta-TC': lambda **k: BetaTCLoss(1000, **k), 'DIP I': DIPLoss, 'DIP II': lambda **k: DIPLoss(second=True, **k),
              'HF': lambda **k: HFLoss(1000, [2, 1, 1], **k), 'ada': AdaLoss, 'ada product': lambda **k: AdaLoss(product=True, **k)}


def gaussians(b, d, s2, seed=0, cov=None):
    "Means, log-variances and codes of b posteriors of variance s2 whose codes have covariance `cov`."
    g = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky((torch.eye(d) if cov is None else cov) - s2 * torch.eye(d) + 1e-6 * torch.eye(d))
    mu = torch.randn(b, d, generator=g) @ root.T
    return mu + math.sqrt(s2) * torch.randn(b, d, generator=g), mu, torch.full((b, d), math.log(s2))


@pytest.fixture(params=objectives)
def objective(request): return objectives[request.param]


@pytest.mark.parametrize('faithful', [False, True])
@pytest.mark.parametrize('make', [models['tone'], models['small'], models['wave']], ids=['tone', 'small', 'wave'])
def test_every_objective_moves_every_parameter(objective, make, faithful):
    torch.manual_seed(0)
    model, loss = make(), objective(faithful=faithful)
    model.between = getattr(loss, 'between', None)
    total = loss(model(inputs(model, 8)), 'labels', 'are not looked at')
    total.backward()
    assert total.ndim == 0 and set(loss.parts) >= {'recon', 'kl', 'lower_bound'} and all(v.ndim == 0 and v.isfinite() and not v.requires_grad for v in loss.parts.values())
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()]


def test_total_is_the_weighted_sum_of_its_parts(objective):
    torch.manual_seed(0)
    model, loss = models['tone'](), objective()
    total = loss(model(inputs(model, 8)))
    assert torch.isclose(total, sum(w * loss.parts[k] for k, w in loss.weights.items() if k in loss.parts), rtol=1e-5)
    for k in [k for k in loss.weights if k != 'capacity']: loss.weights[k] = 0.
    assert loss(model(inputs(model, 8))) == 0


@pytest.mark.parametrize('name', ['VAE', 'beta', 'annealed', 'DIP I', 'DIP II']) # the others estimate from the batch, or are pairs
def test_an_example_weighs_the_same_in_any_batch_and_the_order_is_free(name):
    torch.manual_seed(0)
    model = models['tone']().eval()
    x = inputs(model, 8)
    loss = objectives[name]()
    out = model(x)
    turn = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    again = loss({k: v[turn] if len(v) == 8 else v for k, v in out.items()})
    assert torch.isclose(loss(out), again, rtol=1e-5)
    assert torch.isclose(loss({k: torch.cat([v, v]) for k, v in out.items()}), loss(out), rtol=1e-5)


def test_published_scaling_sums_the_error_over_the_batch():
    torch.manual_seed(0)
    model = models['tone']()
    out = model(inputs(model, 6))
    error, kl = (out['x_hat'] - out['x']).square().sum(), .5 * (out['mu'].square() + out['logvar'].exp() - out['logvar'] - 1).sum() / 6
    assert torch.isclose(VAELoss(4., faithful=True)(out), error + 4 * kl) and torch.isclose(VAELoss(4.)(out), error / 6 + 4 * kl)


def test_a_model_with_a_variance_of_its_own_pays_its_likelihood():
    torch.manual_seed(0)
    model = models['small']()
    with torch.no_grad(): model.x_logvar.fill_(-1.3)
    out = model(inputs(model, 4))
    p = torch.distributions.Normal(out['x_hat'], math.exp(-.65))
    assert torch.isclose(VAELoss(0.)(out), -p.log_prob(out['x']).flatten(1).sum(1).mean(), rtol=1e-5)


def by_loops(z, mu, logvar, n, estimator):
    "log q(z) and log q(z_d), term by term."
    b, d = z.shape
    flat = [1 / (b - 1)] * (b * b)
    if estimator == 'stratified':
        for i in range(b): flat[i * b + i], flat[i * b + (i + 1) % b] = 1 / n, (n - b + 1) / (n * (b - 1))
    elif estimator in ('column', 'reference'):
        for i in range(0, b * b, b): flat[i] = 1 / n
        for i in range(1, b * b, b): flat[i] = (n - b + 1) / (n * (b - 1))
        flat[(b - 2) * b] = (n - b + 1) / (n * (b - 1))
    else: flat = [1 / b if estimator == 'mixture' else 1 / (b * n)] * (b * b)
    density = torch.distributions.Normal(mu, (logvar / 2).exp())
    q, each = torch.zeros(b), torch.zeros(b, d)
    for i in range(b):
        own = density.log_prob(z[i])
        for j in range(b):
            w = flat[i * b + j]
            q[i] += math.prod(w * own[j].exp()) if estimator == 'reference' else w * own[j].sum().exp()
            each[i] += w * own[j].exp()
    return q.log(), each.log()


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_estimators_are_what_their_sums_say(estimator):
    z, mu, logvar = gaussians(6, 3, .5)
    q, _, each = log_q(z, mu, logvar, 100, estimator)
    q2, each2 = by_loops(z, mu, logvar, 100, estimator)
    assert torch.allclose(q, q2, atol=1e-4) and torch.allclose(each, each2, atol=1e-4)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('groups', [None, [3, 4, 1], [8]], ids=str)
def test_parts_telescope(estimator, groups):
    z, mu, logvar = gaussians(64, 8, .3)
    logvar = logvar + .3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    out = dict(z=z, mu=mu, logvar=logvar, x=z, x_hat=z)
    sampled = (-.5 * ((z - mu).square() * torch.exp(-logvar) + logvar) + .5 * z.square()).sum(1).mean()
    loss = BetaTCLoss(25600, beta=1., estimator=estimator) if groups is None else HFLoss(25600, groups, beta=1., estimator=estimator)
    assert abs(loss(out) - sampled) < 1e-4 * max(1, abs(sampled)) + 2e-5 * 80 # float32: parts of up to 80 nats cancel


def test_stratified_weights():
    for b, n in ((2, 2), (2, 1000), (64, 64), (64, 25600)):
        w = log_weights(b, n).exp()
        assert torch.allclose(w.sum(1), torch.ones(b), atol=1e-5) and torch.allclose(w.diagonal(), torch.full((b,), 1 / n), rtol=1e-4)


@pytest.mark.parametrize('s2, estimator, truth, within', [
    (1., 'mixture', 0, .05), (1., 'stratified', 0, .05), (1., 'column', 0, .05), (1., 'weighted', 7 * math.log(25600), .01), (1., 'reference', -29., .1),
    (.5, 'stratified', 0, .3), (.1, 'stratified', 0, .3), (.5, 'mixture', .33, .1), (.1, 'mixture', 4.9, .4), (.5, 'reference', -28.68, .15), (.1, 'reference', -24.43, .4)])
def test_total_correlation_of_independent_gaussians(s2, estimator, truth, within):
    mean = sum(split_kl(*gaussians(64, 8, min(s2, .999999), seed), 25600, estimator)['tc'] for seed in range(60)) / 60
    assert abs(mean - truth) < within, mean


def test_total_correlation_of_a_pair():
    cov = torch.tensor([[1., .855], [.855, 1.]])
    assert abs(gaussian_tc(cov) - .6566) < 2e-3
    mean = sum(split_kl(*gaussians(1024, 2, .1, seed, cov), 25600)['tc'] for seed in range(8)) / 8
    assert abs(mean - .657) < .03


def test_permuting_keeps_marginals_and_takes_correlation():
    z = gaussians(2000, 6, .05, 0, .1 * torch.eye(6) + .9)[0]
    p = permute_dims(z, torch.Generator().manual_seed(0))
    assert torch.equal(p.sort(0).values, z.sort(0).values) and torch.equal(p, permute_dims(z, torch.Generator().manual_seed(0)))
    off = torch.corrcoef(p.T) - torch.eye(6)
    assert torch.corrcoef(z.T).min() > .8 and off.abs().max() < 4 / math.sqrt(2000)


def test_the_ideal_discriminator_sees_the_total_correlation():
    rho = .855
    z = gaussians(200_000, 2, .1, 0, torch.tensor([[1., rho], [rho, 1.]]))[0]
    quad = (z[:, 0]**2 - 2 * rho * z[:, 0] * z[:, 1] + z[:, 1]**2) / (1 - rho**2)
    ideal = -.5 * (quad + math.log(1 - rho**2)) + .5 * z.square().sum(1)
    assert abs(ratio_tc(torch.stack([ideal, 0 * ideal], 1)) - .6566) < .01


@pytest.mark.parametrize('faithful', [False, True])
def test_the_discriminator_pulls_the_encoder_only_when_asked_to(faithful):
    def gradient(with_critic):
        torch.manual_seed(0)
        model, loss = models['tone'](), FactorLoss(Discriminator(4, 32, 2), faithful=faithful)
        out = model(inputs(model, 8))
        total = loss(out)
        torch.manual_seed(1)
        if with_critic: total = total + loss.critic(out, torch.Generator().manual_seed(0))
        total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), [p.grad for p in loss.adversary.parameters()]
    (alone, idle), (both, taught) = gradient(False), gradient(True)
    assert torch.equal(alone, both) != faithful
    assert all(g is None for g in idle) and all(g.abs().sum() > 0 for g in taught)


def test_published_factor_loss_uses_half_of_the_batch():
    torch.manual_seed(0)
    model, loss = models['tone'](), FactorLoss(Discriminator(4, 16, 2), gamma=0., faithful=True)
    out = model(inputs(model, 8))
    half = {k: v[:4] for k, v in out.items()}
    assert torch.isclose(loss(out), VAELoss(faithful=True)(half))
    assert abs(loss.critic(out).item() - math.log(2)) < .5


def test_half_a_batch_is_only_looked_at():
    torch.manual_seed(0)
    model = models['tone']()
    x, seen = inputs(model, 8), []
    model.decoder.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    model.halves = True
    out = model(x)
    assert seen == [4] and len(out['mu']) == 8 and len(out['x_hat']) == 4
    halves = [torch.autograd.grad(out['mu'][part].sum(), model.lin_mu.weight, retain_graph=True, allow_unused=True)[0] for part in (slice(0, 4), slice(4, 8))]
    assert halves[0].abs().sum() > 0 and (halves[1] is None or halves[1].abs().sum() == 0)
    model.halves, loss = False, FactorLoss(Discriminator(4, 16, 2), gamma=0., faithful=True)
    assert torch.allclose(loss(out), loss(model(x) | dict(z=out['z'], x_hat=torch.cat([out['x_hat'], out['x_hat']]))))


@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (1, 8, 16, 2)])
def test_pooling_in_place_is_pooling(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last).requires_grad_()
    grads = [torch.autograd.grad((pool(2*x)**2).sum(), x)[0] for pool in (Halve(), torch.nn.MaxPool2d(2))]
    assert torch.equal(*grads) and torch.equal(Halve()(x), torch.nn.functional.max_pool2d(x, 2))
    loss = (Halve()(2*x)**2).sum()
    twice = [torch.autograd.grad(loss, x, retain_graph=True)[0].clone() for _ in range(2)]
    assert torch.equal(*twice)


def test_capacity_is_a_target():
    torch.manual_seed(0)
    model = models['tone']()
    out = model(inputs(model))
    kl = VAELoss()(out) - VAELoss(0.)(out)
    for c in (0., 1., 30.): assert torch.isclose(AnnealedLoss(7., c)(out) - VAELoss(0.)(out), 7 * (kl - c).abs(), rtol=1e-4)


def test_sharing_finds_the_factor_that_moved():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(50, 6, generator=g).repeat(2, 1) + .01 * torch.randn(100, 6, generator=g)
    moved = torch.randint(6, (50,), generator=g)
    mu[torch.arange(50, 100), moved] += 3
    logvar = torch.full((100, 6), -1.) + .01 * torch.randn(100, 6, generator=g)
    for product in (False, True):
        m, s = share_posterior(mu, logvar, product)
        same = m[:50] == m[50:]
        assert torch.equal((~same).int().argmax(1), moved) and (same.sum(1) == 5).all() and torch.equal(s[:50][same], s[50:][same])
        assert torch.equal(m[:50][~same], mu[:50][~same]) # what differs stays as it was
    whole = share_posterior(mu, logvar)[1].exp()[:50][same]
    assert torch.allclose(whole, (.5 * (logvar[:50].exp() + logvar[50:].exp()))[same], rtol=1e-5)


@pytest.mark.parametrize('bad', [lambda o: BetaTCLoss(3)(o), lambda o: BetaTCLoss(100, estimator='mss')(o), lambda o: share_posterior(o['mu'][:5], o['logvar'][:5]),
                                 lambda o: BetaTCLoss(100)({k: v[:1] for k, v in o.items()}), lambda o: FactorLoss(Discriminator(4, 8, 1)).critic({k: v[:1] for k, v in o.items()})])
def test_what_cannot_be_estimated_is_refused(bad):
    model = models['tone']()
    with pytest.raises(ValueError, match=r'.{20}'): bad(model(inputs(model)))


def test_imports_stay_light():
    import subprocess, sys
    code = ("import sys; import disentangle_nb.models.vae, disentangle_nb.losses.tc, disentangle_nb.data.syntone; "
            "print([m for m in ('fastai', 'librosa', 'sklearn', 'matplotlib', 'pandas', 'scipy', 'nbdev', 'torchvision') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

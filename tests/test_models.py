"What every model must answer, asked of the reference GMVAE, its variants and the loudness split."
import math
import pytest, torch
from disentangle_nb.models.gmvae import GMVAE
from disentangle_nb.models.system import LoudnessSplit

small = dict(n_mels=24, n_frames=9, channels=16, hidden=16, latent=4, n_timbre=3, n_pitch=5)
variants = {'gmvae': {}, 'no classifier': dict(pitch_classifier=False), 'one code': dict(pitch_branch=False), 'one prior': dict(mixture=False), 'learnt spread': dict(logvar_trainable=True),
            'class from mean': dict(class_from='mean'), 'no clamp': dict(logvar_clamp=None), 'other priors': dict(sigma_timbre=.5, sigma_pitch=1., mean_gain=4.)}
counts = {(): (34_334_354, 34_335_858, 48_137), (('pitch_classifier', False),): (34_332_960, 34_334_464, 48_137),
          (('pitch_branch', False),): (22_899_168, 22_899_360, 45_062), (('n_frames', 21),): (16_999_058, 17_000_562, None),
          (('latent', 8),): (34_308_338, 34_309_090, None), (('latent', 32),): (34_386_386, 34_389_394, None)}


@pytest.fixture(params=variants)
def model(request):
    torch.manual_seed(0)
    return GMVAE(**small, **variants[request.param])


def notes(n=6): return torch.rand(n, 24, 9, generator=torch.Generator().manual_seed(1)) - .5


@pytest.mark.parametrize('args', counts, ids=str)
def test_parameter_counts_are_the_published_ones(args):
    with torch.device('meta'): m = GMVAE(**dict(args))
    trainable, total, buffers = counts[args]
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in m.parameters()) == total
    assert buffers is None or sum(b.numel() for b in m.buffers()) == buffers


def test_weights_carry_the_published_names():
    with torch.device('meta'): names = {k: tuple(v.shape) for k, v in GMVAE().state_dict().items()}
    for k, shape in {'mu_lookup.weight': (12, 16), 'logvar_lookup.weight': (12, 16), 'pitch_mu_lookup.weight': (82, 16), 'encoder.0.weight': (512, 256, 3),
                     'encoder.4.running_var': (512,), 'encoder_fc.0.weight': (512, 19968), 'lin_logvar.bias': (16,), 'pitch_encoder.3.bias': (512,),
                     'decoder_fc.0.weight': (512, 32), 'decoder_fc.4.weight': (19968,), 'decoder.0.weight': (512, 512, 3), 'decoder.3.bias': (256,),
                     'pitch_classifier.0.weight': (82, 16)}.items(): assert names[k] == shape, k


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    m = GMVAE()
    for w, bound in ((m.mu_lookup.weight, math.sqrt(6 / 28)), (m.pitch_mu_lookup.weight, math.sqrt(6 / 98)), (m.lin_mu.weight, math.sqrt(6 / 528))):
        assert .9 * bound < w.abs().max() <= bound
    assert torch.all(m.logvar_lookup.weight == 0) and torch.allclose(m.pitch_logvar_lookup.weight, torch.tensor(-4.))
    assert not m.logvar_lookup.weight.requires_grad and not m.pitch_logvar_lookup.weight.requires_grad


def test_shapes(model):
    x = notes()
    out = model(x)
    assert out['x_hat'].shape == x.shape and out['timbre_logits'].shape == (6, 3)
    codes = model.encode(x)
    assert list(codes) == model.factors and all(v.shape == (6, 4) for v in codes.values())
    assert model.decode(**codes).shape == x.shape
    for f, k in zip(model.factors, (3, 5)):
        if f == 'timbre' and not model.args['mixture']: k = 1
        assert model.nearest(f, codes[f]).shape == (6, k)
        assert torch.allclose(model.nearest(f, codes[f]).exp().sum(1), torch.ones(6), atol=1e-5)
        assert model.component(f, torch.tensor([0, k - 1])).shape == (2, 4)


def test_every_parameter_gets_a_gradient(model):
    from disentangle_nb.losses.elbo import GMVAELoss
    loss = GMVAELoss()(model.train()(notes(30)), torch.arange(30) % 3, torch.arange(30) % 5, torch.ones(30, dtype=torch.bool))
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum())]
    assert not missing


def test_evaluation_is_deterministic_and_training_is_not(model):
    x = notes()
    assert torch.equal(model.eval()(x)['x_hat'], model(x)['x_hat'])
    assert not torch.equal(model.train()(x)['timbre_z'], model(x)['timbre_z'])
    model.eval().sample_in_eval = True
    assert not torch.equal(model(x)['timbre_z'], model(x)['timbre_z'])


def test_one_note_equals_itself_in_a_batch(model):
    x = notes()
    whole = model.eval()(x)
    for i in (0, 5): assert torch.allclose(model(x[i:i + 1])['x_hat'], whole['x_hat'][i:i + 1], atol=1e-5)


def test_state_dict_round_trip_is_exact(model):
    again = GMVAE(**model.args)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(notes())['x_hat'], model.eval()(notes())['x_hat'])


def test_overfits_one_batch():
    torch.manual_seed(0)
    m = GMVAE(**{**small, 'channels': 32, 'hidden': 32})
    x, opt = torch.tanh(torch.randn(8, 24, 1) + .2 * torch.randn(8, 24, 9)), torch.optim.Adam(m.parameters(), 1e-2)
    first = None
    for _ in range(200):
        error = (m(x)['x_hat'] - x).square().sum()
        first = first or error.item()
        opt.zero_grad(); error.backward(); opt.step()
    assert error.item() < .1 * first


def test_extreme_log_variances_stay_finite():
    from disentangle_nb.losses.elbo import GMVAELoss
    m = GMVAE(**small)
    with torch.no_grad(): m.lin_logvar.bias.fill_(500.), m.pitch_lin_logvar.bias.fill_(-500.)
    assert GMVAELoss()(m(notes()), torch.arange(6) % 3, torch.arange(6) % 5, torch.ones(6, dtype=torch.bool)).isfinite()


@pytest.mark.parametrize('make, x', [(lambda: GMVAE(**small), notes()), (lambda: LoudnessSplit([-.3, .3], n_frames=9), notes())], ids=['GMVAE', 'LoudnessSplit'])
def test_the_contract_of_a_system_s_model(make, x):
    torch.manual_seed(0)
    m = make().eval()
    codes = m.encode(x)
    assert set(codes) == set(m.factors) and m.decode(**codes).shape == x.shape
    assert m.args['n_frames'] == x.shape[-1]
    f = m.factors[0]
    assert m.nearest(f, codes[f]).shape[0] == len(x) and m.component(f, torch.tensor([0, 1])).shape[0] == 2
    assert type(m)(**m.args).state_dict().keys() == m.state_dict().keys()


def test_importing_the_model_stays_light():
    import subprocess, sys
    code = ("import sys, time, torch; t = time.perf_counter(); import disentangle_nb.models.gmvae; took = time.perf_counter() - t; "
            "print(took, [m for m in ('fastai', 'librosa', 'sklearn', 'matplotlib', 'pandas', 'nbdev', 'torchvision') if m in sys.modules])")
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split(' ', 1) for _ in range(3)]
    assert all(r[1].strip() == '[]' for r in runs), runs[0][1]
    assert min(float(r[0]) for r in runs) < .5

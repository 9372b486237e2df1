"""The learnt representation: the specification's exact checks, odd lengths, half precision, files, published weights."""
import math, os, pickle
import pytest, torch
from torch.nn import functional as F
from disentangle_nb.features.waveform import Waveform
from disentangle_nb.models.cosine import (PUBLISHED, ConvDecoder, ConvEncoder, CosineAutoencoder, CosineDecoder, CosineEncoder, Embedder, PairDiscriminator,
                                          SincEncoder, analyse, blocks, carrier_share, cosines, frame, likely_hop, load_published, mel_hz, read_tensors, synthesise)
from disentangle_nb.models.mask import MaskLSTM, MaskTCN, Separator, STFTBank, random_basis
from disentangle_nb.models.system import CheckpointError, Disentangler

SMALL = dict(components=24, kernel=128, hop=32, sr=8000)
KINDS = {'conv': {}, 'unmodulated': dict(modulated=False), 'linear': dict(power=1), 'cosine': dict(encoder='cosine'), 'sinc': dict(encoder='sinc'),
         'free': dict(decoder='conv'), 'gap': dict(hop=48), 'longest hop': dict(hop=128)}


def model(**kw):
    torch.manual_seed(0)
    return CosineAutoencoder(**SMALL | kw)


@pytest.fixture(params=list(KINDS))
def kind(request): return model(**KINDS[request.param])


def numbers(make):
    with torch.device('meta'): return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize('make, want', [
    (ConvEncoder, 4_838_400), (CosineEncoder, 4_840_000), (lambda: CosineEncoder(modulated=False), 3_203_648), (SincEncoder, 3_203_648),
    (CosineDecoder, 1_640_000), (lambda: CosineDecoder(modulated=False), 3_648), (ConvDecoder, 1_638_400), (lambda: ConvDecoder(outputs=2), 3_276_800),
    (PairDiscriminator, 5_202_600), (Embedder, 3_841_600), (CosineAutoencoder, 6_478_400), (lambda: CosineAutoencoder(modulated=False), 4_842_048),
    (lambda: CosineAutoencoder(decoder='conv'), 6_476_800), (lambda: CosineAutoencoder(encoder='sinc'), 4_843_648), (lambda: CosineAutoencoder(encoder='cosine'), 6_480_000),
    (lambda: CosineAutoencoder(256, 1024, 128, 16000), 852_480), (lambda: CosineAutoencoder(hop=384), 6_478_400), (MaskLSTM, 6_078_016)])
def test_parameter_counts(make, want): assert numbers(make) == want


def test_the_small_estimator_is_small(): assert numbers(MaskTCN) < 2_000_000


@pytest.mark.parametrize('n, kernel, hop, t, p', [(44100, 2048, 256, 173, 990), (44100, 2048, 384, 115, 862), (132300, 2048, 256, 517, 922), (132300, 2048, 384, 345, 922), (16000, 1024, 128, 125, 448)])
def test_frames_of_the_specification(n, kernel, hop, t, p): assert frame(n, kernel, hop) == (t, p, p)


def test_an_odd_sample_goes_to_the_right(): assert frame(44099, 2048, 256) == (173, 990, 991) and frame(1, 33, 10) == (1, 16, 16) and frame(2, 33, 10) == (1, 15, 16)


def test_any_length_comes_back_as_long(kind):
    g = torch.Generator().manual_seed(1)
    for n in [1, 2, 31, 32, 33, 127, 128, 129, *torch.randint(1, 3000, (20,), generator=g).tolist()]:
        x = torch.randn(2, n, generator=g)
        with torch.no_grad():
            out = kind(x, x.flip(0))
            whole = kind.reconstruct(x)
        t = -(-n//kind.hop)
        assert out['x_hat'].shape == whole.shape == (2, n) and out['a_mix'].shape == out['a_voice'].shape == (2, 24, t)
        assert all(v.isfinite().all() for v in out.values())


def test_minutes(kind):
    "Two minutes at once: the middle of a long clip is what it is in a piece of it."
    x = torch.randn(1, 8000*120)
    with torch.no_grad():
        long = kind.reconstruct(x)
        start = kind.hop*1000
        near = kind.hop*40
        piece = kind.reconstruct(x[:, start - near:start + 4*near])
    assert long.shape == x.shape
    assert (long[:, start:start + 2*near] - piece[:, near:3*near]).abs().max() < 1e-5*max(1., long.abs().max())


def direct(x, w, hop): # the padded convolution as it is told
    _, left, right = frame(x.shape[-1], w.shape[1], hop)
    return F.conv1d(F.pad(x, (left, right))[:, None], w[:, None], stride=hop)


@pytest.mark.parametrize('n, kernel, hop', [(1000, 128, 32), (1001, 128, 32), (999, 100, 32), (500, 50, 50), (77, 33, 10), (1, 33, 10)])
def test_blocks_are_the_plain_convolutions(n, kernel, hop):
    "Values and gradients, in double, also where 2P is odd and the hop doesn't divide the kernel."
    x, w = torch.randn(2, n).double(), torch.randn(5, kernel).double().requires_grad_()
    H, plain = analyse(x, w, hop), direct(x, w, hop)
    assert (H - plain).abs().max() < 1e-12
    a = torch.rand_like(H).requires_grad_()
    left = frame(n, kernel, hop)[1]
    y, other = synthesise(a, w, hop, n), F.conv_transpose1d(a, w[:, None], stride=hop)[:, 0, left:left + n]
    assert (y - other).abs().max() < 1e-12
    up, down = torch.randn_like(H), torch.randn_like(y)
    for one, two in zip(torch.autograd.grad((H*up).sum() + (y*down).sum(), (w, a)), torch.autograd.grad((plain*up).sum() + (other*down).sum(), (w, a))):
        assert (one - two).abs().max() < 1e-11


@pytest.mark.parametrize('power, modulated', [(2, True), (1, True), (2, False)])
def test_basis_is_the_formula(power, modulated):
    torch.manual_seed(0)
    dec = CosineDecoder(power=power, modulated=modulated)
    f = dec.theta.detach().double()**power
    want = dec.b.detach().double()*(2*math.pi*f[:, None]*torch.arange(2048).double() + dec.phi.detach().double()[:, None]).cos()
    assert (dec.basis().detach() - want).abs().max() < 1e-6*dec.b.max()
    assert abs(dec.basis().abs().max().item() - 3.5112e-4) < 1e-8


def test_basis_is_exact_to_rounding():
    "Against the same single-precision frequencies in double, at the largest arguments there are."
    f, phi = torch.rand(400, dtype=torch.float32)*.5, torch.randn(400)
    want = (2*math.pi*f.double()[:, None]*torch.arange(2048).double() + phi.double()[:, None]).cos()
    assert (cosines(f, phi, 2048).double() - want).abs().max() < 3e-7
    with torch.autocast('cpu', torch.bfloat16): assert (cosines(f, phi, 2048).double() - want).abs().max() < 3e-7
    assert cosines(f, phi, 77).shape == (400, 77) and torch.equal(cosines(f, phi, 77), cosines(f, phi, 2048)[:, :77])


def test_cosines_have_the_right_gradient():
    f, phi = (torch.rand(2).double()*.4).requires_grad_(), torch.randn(2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, phi: cosines(f, phi, 66)[:, 60:], (f, phi))


def test_carriers_at_birth():
    hz = CosineDecoder().carriers_hz()
    for i, want in ((0, .020408), (1, .024917), (400, 259.672), (798, 10927.5), (799, 11025.)): assert abs(hz[i]/want - 1) < 1e-3
    assert (hz < 20).sum() == 188 and (hz < 1000).sum() == 537
    hz = CosineDecoder(power=1).carriers_hz()
    assert abs(hz[0] - 30) < .01 and abs(hz[-1] - 22050) < 1 and (hz.diff() > 0).all()
    assert abs(CosineDecoder(256, 1024, 128, 16000).carriers_hz()[-1] - 4000) < 1


def test_sorting_changes_nothing_that_is_heard():
    m = model()
    with torch.no_grad(): m.decoder.theta.copy_(m.decoder.theta[torch.randperm(24)])
    a = torch.rand(2, 24, 20)
    i = m.order()
    sound, again = m.decode(a), synthesise(m.sort_components(a), m.basis()[i], 32)
    assert (sound - again).norm() < 1e-6*sound.norm() and (m.carriers_hz()[i].diff() > 0).all()
    assert torch.equal(m.sort_components(a), a[:, i]) and torch.equal(m.sort_components(a[0]), a[0, i])


def test_the_decoder_is_linear_and_its_impulses_are_kernels(kind):
    if isinstance(kind.decoder, ConvDecoder): kind.decoder.tanh = False
    t, L, h = 30, 128, kind.hop
    a, b = torch.rand(2, 1, 24, t)
    with torch.no_grad():
        one, two = kind.decode(a), kind.decode(b)
        assert (kind.decode(.3*a - 2*b) - .3*one + 2*two).abs().max() < 1e-5*one.abs().max()
        click = torch.zeros(1, 24, t); click[0, 7, 12] = 1
        y, at = kind.decode(click)[0], 12*h - frame(t*h, L, h)[1]
        assert torch.allclose(y[at:at + L], kind.basis()[7], atol=1e-7) and y[:at].abs().max() == 0 and y[at + L:].abs().max() == 0


def test_what_the_encoder_promises(kind):
    x, y = torch.randn(2, 3, 4000)
    with torch.no_grad():
        a, b = kind.encode(x), kind.encode(y)
        lin, top = kind.encoder.linear(x), kind.encode(x).max()
        assert a.min() >= 0 and .2 < (a == 0).float().mean() < .8
        for s in (.01, 3.): assert (kind.encode(s*x) - s*a).norm() < 1e-5*s*a.norm()
        assert (a - kind.encode(-x) - lin).abs().max() < 1e-5*top
        assert (kind.encode(x + y) <= a + b + 1e-5*top).all()
        assert not kind.encode(0*x).any()


def test_half_of_noise_is_zero_at_birth():
    a = model(components=128, kernel=256, hop=64).encode(torch.randn(4, 8000))
    assert abs((a == 0).float().mean() - .5) < .03


def test_every_parameter_gets_a_gradient(kind):
    out = kind(torch.randn(2, 3000), torch.randn(2, 3000))
    (out['x_hat'].square().mean() + out['a_mix'].mean()).backward()
    for name, p in kind.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert not list(kind.buffers())


def test_one_clip_equals_itself_in_a_batch(kind):
    x = torch.randn(3, 2000)
    with torch.no_grad(): whole, alone = kind(x), kind(x[1:2])
    for k in alone: assert torch.allclose(alone[k], whole[k][1:2], atol=1e-5)


def test_double_precision_and_bfloat16():
    m, x = model(), torch.randn(2, 2000)
    want = m(x, x)
    wide = model().double()(x.double())
    assert wide['x_hat'].dtype == torch.float64 and torch.allclose(wide['a_voice'].float(), want['a_voice'], atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): half = m(x, x)
    assert all(v.dtype == torch.float32 for v in half.values())
    assert (half['x_hat'] - want['x_hat']).norm() < .05*want['x_hat'].norm()


def test_gradients_survive_bfloat16():
    def grads(half):
        m, x = model(), torch.randn(2, 2000, generator=torch.Generator().manual_seed(3))
        with torch.autocast('cpu', torch.bfloat16, half): out = m(x, x)
        (out['x_hat'] - x).square().sum().backward()
        return {k: p.grad for k, p in m.named_parameters()}
    full, half = grads(False), grads(True)
    for k in full: assert (full[k] - half[k]).norm() < .1*full[k].norm(), k


def test_sinc_filters_keep_their_edges():
    torch.manual_seed(0)
    enc = SincEncoder(800, 2048)
    assert len(enc.f2.unique()) == 800 and 350 < (enc.f2 < enc.f1).sum() < 450
    w = enc.kernels().detach()
    assert len(w.unique(dim=0)) == 800
    with torch.no_grad(): enc.f2[5] += .01
    moved = (enc.kernels().detach() != w).any(1)
    assert moved.nonzero().flatten().tolist() == [5]                        # an edge is one filter's, and no other's
    with torch.no_grad(): enc.f2[5] -= .01
    shared = SincEncoder(800, 2048, faithful=True)
    shared.load_state_dict(enc.state_dict())
    assert w.isfinite().all() and (w - shared.kernels()).abs().amax(1).gt(1e-4).float().mean() > .9
    with torch.no_grad(): enc.f1[0] = 0.
    enc.kernels().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (enc.f1, enc.f2, enc.g))


def test_sinc_passes_what_lies_between_its_edges():
    torch.manual_seed(0)
    enc = SincEncoder(800, 2048)
    with torch.no_grad(): enc.f2.copy_(enc.f1 + .02*(1 + torch.rand(800)))   # wide enough for a kernel of 2048 samples to show
    i = enc.f2 < .497                                                       # no edge past the Nyquist frequency, where it would be another's alias
    f1, f2 = enc.f1.detach()[i, None], enc.f2.detach()[i, None]
    bins, gain = torch.linspace(0, .5, 4097), torch.fft.rfft(enc.kernels().detach()[i], 8192).abs()
    assert gain[(bins > f1 + .002) & (bins < f2 - .002)].min() > .8 and gain[(bins < f1 - .003) | (bins > f2 + .003)].max() < .3


def test_sinc_is_the_formula():
    enc = SincEncoder(10, 64, 16, sr=8000)
    t = torch.where((t := torch.arange(-32, 32).double()) == 0, .1, t)
    S = lambda u: u.sin()/(u + 1e-24)
    f1, f2 = enc.f1.detach().double()[:, None], enc.f2.detach().double()[:, None]
    want = 2*f1*S(2*math.pi*f1*t) - 2*f2*S(2*math.pi*f2*t)
    assert (enc.kernels().detach() - want).abs().max() < 1e-6


def test_the_discriminator_pools_over_time():
    torch.manual_seed(0)
    d = PairDiscriminator(24, 10)
    a, b = torch.rand(2, 3, 24, 17)
    Z = [torch.stack([d.embedder(v)[..., t] for t in range(17)], 1) for v in (a, b)] # (b, t, c), by hand
    assert torch.allclose(d(a, b), d.head(torch.cat(Z, -1).mean(1))[:, 0], atol=1e-5)
    with torch.no_grad(): d.head[-1].weight.zero_()
    assert abs(F.binary_cross_entropy_with_logits(d(a, b), torch.ones(3)) - math.log(2)) < 1e-6


def test_two_steps_in_a_row_train():
    "The published code fails here: its second gradient needs weights that the first step has changed in place."
    torch.manual_seed(0)
    m, d = model(), PairDiscriminator(24, 10)
    opt, (voice, rest) = torch.optim.Adam([*m.parameters(), *d.parameters()], 1e-3), torch.randn(2, 4, 2000)
    for _ in range(2):
        out = m(voice, voice + rest)
        (out['x_hat'] - voice).square().mean().backward()
        opt.step(); opt.zero_grad()
        a, b = m.encode(torch.cat([voice, rest])).chunk(2)
        (F.softplus(-d(a, a.roll(1, 0))) + F.softplus(d(a, b))).mean().backward()
        opt.step(); opt.zero_grad()
    assert all(p.isfinite().all() for p in m.parameters())


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    m, s = model(components=64, kernel=256, hop=64, sr=16000), torch.arange(4000)/16000
    x = torch.stack([sum(torch.sin(2*math.pi*k*f*s)/k for k in range(1, 6)) for f in (150., 220., 330., 410.)])*.2
    opt = torch.optim.Adam(m.parameters(), 1e-3)
    for _ in range(300):
        loss = 10*torch.log10((m(x)['x_hat'] - x).square().sum()/x.square().sum())
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < -15
    assert carrier_share(m).min() >= 0 and carrier_share(m).max() <= 1


@pytest.mark.parametrize('bad, words', [(dict(kernel=16), 'leave gaps'), (dict(encoder='mel'), 'conv and cosine and sinc'), (dict(decoder='mel'), 'cosine and conv'),
                                        (dict(power=3), '1 or 2'), (dict(encoder='sinc', kernel=127), 'even')])
def test_what_can_not_be_built_says_why(bad, words):
    with pytest.raises(ValueError, match=words): model(**bad)


def test_what_can_not_be_encoded_says_why():
    m = model()
    for x, words in ((torch.zeros(2, 0), '0 samples'), (torch.zeros(5), r'\(b, n\)'), (torch.zeros(1, 16, 5), '32 samples long')):
        with pytest.raises(ValueError, match=words): m.encode(x)
    with pytest.raises(ValueError, match='make 4 frames; the representation has 9'): m.decode(torch.zeros(1, 24, 9), 100)


# files
def test_a_saved_model_is_the_same(kind, tmp_path):
    system = Disentangler(Waveform(8000, kind.hop), kind, {})
    again = Disentangler.load(system.save(tmp_path/'m'), device='cpu')
    x = torch.randn(1, 4000)
    assert again.model.args == kind.args and torch.equal(again.model.encode(x), kind.encode(x)) and torch.equal(again.model.reconstruct(x), kind.reconstruct(x))


def test_a_disentangler_goes_there_and_back():
    m = model(n_frames=50)
    system = Disentangler(Waveform(8000, 32), m, {})
    x = torch.randn(2, 1600)
    codes = system.encode(x)
    assert codes['a'].shape == (2, 24*50)
    assert torch.allclose(system.decode(codes, 1600), m.decode(m.encode(x), 1600), atol=1e-6)
    long = torch.randn(1, 8000)
    assert system.encode(long)['a'].shape[:2] == (1, 10) and system.decode(system.encode(long), 8000).shape == (1, 8000)


def published(m):
    own = {k: m.get_parameter(v).detach().clone() for k, v in PUBLISHED.items()}
    return ({'conv_a1.weight': own['conv_a1.weight'][:, None], 'conv_a2.weight': own['conv_a2.weight']},
            {'norm_factor': own['norm_factor'][:, None], 'freq_mat': own['freq_mat'][:, None, None], 'phi': own['phi'][:, None, None]})


@pytest.mark.parametrize('kw', [{}, dict(modulated=False), dict(power=1)], ids=str)
@pytest.mark.parametrize('how', ['dict', 'safetensors', 'pytorch', 'legacy', 'parallel'])
def test_published_weights(how, kw, tmp_path):
    m = model(**kw)
    parts = published(m)
    if how == 'parallel': parts = [{'module.' + k: v for k, v in p.items()} for p in parts]
    if how in ('safetensors', 'pytorch', 'legacy'):
        from safetensors.torch import save_file
        files = [tmp_path/f'{name}.{"safetensors" if how == "safetensors" else "pytorch"}' for name in ('analysis', 'synthesis')]
        for f, p in zip(files, parts): save_file(p, f) if how == 'safetensors' else torch.save(p, f, _use_new_zipfile_serialization=how == 'pytorch')
        parts = files
    read = load_published(*parts, hop=32, sr=8000, power=kw.get('power', 2))
    x = torch.randn(1, 3000)
    assert read.args['modulated'] == kw.get('modulated', True)
    assert torch.equal(read.reconstruct(x), m.reconstruct(x)) and torch.equal(read.basis(), m.basis())


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)


def test_weights_that_are_not_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path/'bomb'))
    a, s = published(model())
    torch.save({'phi': Bomb()}, tmp_path/'new.pytorch')
    torch.save({'phi': Bomb()}, tmp_path/'old.pytorch', _use_new_zipfile_serialization=False)
    (tmp_path/'raw.pytorch').write_bytes(pickle.dumps(Bomb()))
    (tmp_path/'text.safetensors').write_text('no weights')
    torch.save(torch.zeros(3), tmp_path/'one.pytorch')
    for name in ('new.pytorch', 'old.pytorch', 'raw.pytorch', 'text.safetensors', 'one.pytorch', 'none.pytorch'):
        with pytest.raises(CheckpointError) as e: load_published(a, tmp_path/name)
        assert name in str(e.value) or 'named tensors' in str(e.value)
    assert not (tmp_path/'bomb').exists()
    with pytest.raises(CheckpointError, match='named tensors'): read_tensors({})


def test_weights_that_do_not_fit_are_named():
    a, s = published(model())
    for change, words in ((dict(phi=torch.zeros(3)), 'phi should hold 24'), (dict(phi=torch.full((24, 1, 1), torch.nan)), 'finite'), (dict(other=torch.zeros(1)), 'unknown: other')):
        with pytest.raises(CheckpointError, match=words): load_published(a, {**s, **change}, hop=32)
    with pytest.raises(CheckpointError, match='missing: conv_a2.weight'): load_published({'conv_a1.weight': a['conv_a1.weight']}, s, hop=32)


def test_the_hop_is_found_by_listening():
    torch.manual_seed(0)
    m, x = model(hop=32), torch.sin(torch.arange(2000)*.2)[None]*.3
    opt = torch.optim.Adam(m.parameters(), 2e-3)
    for _ in range(60):
        loss = (m(x)['x_hat'] - x).square().sum()
        opt.zero_grad(); loss.backward(); opt.step()
    found = likely_hop(*published(m), x, (24, 32, 48), sr=8000)
    assert list(found)[0] == 32


# masks
@pytest.mark.parametrize('bank', ['cosine', 'stft'])
@pytest.mark.parametrize('mask', ['lstm', 'tcn'])
def test_separators(bank, mask, tmp_path):
    torch.manual_seed(0)
    args = SMALL if bank == 'cosine' else dict(n_fft=128, hop=32, sr=8000)
    sep = Separator(bank, args, mask, dict(width=16), 30)
    mix, voice = torch.randn(2, 3, 2345)
    out = sep(mix, voice)
    assert out['x_hat'].shape == mix.shape and out['mask'].shape == out['a_mix'].shape == out['a_voice'].shape
    assert 0 <= out['mask'].min() and out['mask'].max() <= 1
    (out['x_hat'] - voice).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sep.parameters())
    sep.eval()
    for n in (1, 40, 2345):
        v, rest = sep.separate(mix[:, :n])
        assert v.shape == rest.shape == (3, n) and torch.allclose(v + rest, mix[:, :n], atol=1e-6)
    again = Disentangler.load(Disentangler(Waveform(8000, 32), sep, {}).save(tmp_path/'s'), device='cpu').model
    assert torch.equal(again.separate(mix)[0], sep.separate(mix)[0]) and again.args == sep.args


def test_silence_stays_silence():
    for bank, args in (('cosine', SMALL), ('stft', dict(n_fft=128, hop=32, sr=8000))):
        v, rest = Separator(bank, args, 'tcn', dict(width=8, inner=8, blocks=2)).eval().separate(torch.zeros(1, 999))
        assert not v.any() and not rest.any()


def test_a_mask_of_ones_gives_the_mixture_back():
    x = torch.randn(2, 3333)
    bank = STFTBank(256, 64, 8000)
    assert (bank.decode(bank.encode(x), 3333, x) - x).norm() < 1e-5*x.norm()  # 100 dB


def test_freezing_holds_the_bank():
    sep = Separator('cosine', SMALL, 'tcn', dict(width=8, inner=8, blocks=2)).freeze()
    sep(torch.randn(2, 999))['x_hat'].square().sum().backward()
    assert all(p.grad is None for p in sep.bank.parameters()) and all(p.grad is not None for p in sep.mask.parameters())
    sep.freeze(False)(torch.randn(2, 999))['x_hat'].square().sum().backward()
    assert all(p.grad is not None for p in sep.parameters())


def test_a_random_basis_is_its_seed_and_leaves_the_dice_alone():
    torch.manual_seed(5); a = torch.rand(2)
    torch.manual_seed(5); one = random_basis(SMALL, 3)
    assert torch.equal(a, torch.rand(2))
    assert torch.equal(one.encoder.k1, random_basis(SMALL, 3).encoder.k1) and not torch.equal(one.encoder.k1, random_basis(SMALL, 4).encoder.k1)


def test_pieces_of_a_song_have_the_mask_of_the_song():
    "What a long file needs: convolutions see `reach` frames, the level is the file's."
    torch.manual_seed(0)
    mask = MaskTCN(24, 8, 16, 3)
    mask(torch.rand(4, 24, 50)) # running statistics that are not their defaults
    a = torch.rand(1, 24, 300)
    with torch.no_grad(): whole, r = mask.eval()(a), mask.reach
    with torch.no_grad(): piece = mask(a[..., 100 - r:200 + r], a.mean())
    assert torch.allclose(piece[..., r:-r], whole[..., 100:200], atol=1e-5)


def test_mel_points():
    hz = mel_hz(800, 30., 22050.)
    mel = 2595*(1 + hz/700).log10()
    assert abs(mel[0] - 47.293) < 1e-3 and abs(mel[-1] - 3923.337) < 1e-2 and (mel.diff() - 4.8511).abs().max() < 1e-3
    assert blocks(torch.rand(3, 10), 4).shape == (3, 4, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    m, x = model(), torch.randn(2, 3000)
    want, got = m(x, x), m.cuda()(x.cuda(), x.cuda())
    for k in want: assert (want[k] - got[k].cpu()).norm() < 5e-3*want[k].norm()  # TF32 may be on
    with torch.no_grad(): assert (m.basis().cpu() - model().basis()).abs().max() < 1e-6*m.basis().abs().max().cpu()

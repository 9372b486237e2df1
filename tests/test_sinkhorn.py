"The Sinkhorn penalty and waveform losses against other ways to compute them, in other precisions and in odd cases."
import math, warnings
import pytest, torch
from scipy.optimize import linear_sum_assignment
from disentangle_nb.losses.sinkhorn import (entropic_cost, exact_cost, frame_costs, frame_distributions, sinkhorn_divergence,
                                            sinkhorn_penalty, sinkhorn_plan)
from disentangle_nb.losses.waveform import neg_snr, pair_bce, si_sdr, total_variation


def sparse(b=2, c=20, t=30, seed=0):
    "Activations with silent frames and twins; on a grid, so that float32 and float64 rank them alike."
    g = torch.Generator().manual_seed(seed)
    a = (torch.randn(b, c, t, generator=g).relu()*64).round()/64
    a[..., :3] = 0; a[..., 5] = a[..., 6]
    return a


def literal(a, reg=1.3, steps=400, p=1):
    "The procedure with all differences written out, two potentials, gradients through every step."
    q = a + 1/a.shape[1]
    q = q/q.sum(-1, keepdim=True)
    d = q[..., :, None] - q[..., None, :]
    if p == 1: M = d.abs().sum(1).mean(0)
    else: # the root of zero has no derivative: take it elsewhere
        s = d.square().sum(1)
        M = torch.where(s > 0, s.where(s > 0, torch.ones_like(s)).sqrt(), 0.).mean(0)
    n = len(M)
    f = g = torch.full((n,), -math.log(n), dtype=M.dtype)
    for _ in range(steps):
        g = -math.log(n) - torch.logsumexp(f[:, None] - M/reg, 0)
        f = -math.log(n) - torch.logsumexp(g - M/reg, 1)
    return (torch.exp(f[:, None] + g - M/reg)*M).sum()


def value_and_gradient(f, a):
    a = a.clone().requires_grad_()
    v = f(a); v.backward()
    return v.detach(), a.grad


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('p', [1, 2])
@pytest.mark.parametrize('relative', [.2, 1., 20.])
def test_penalty_and_gradient_against_unrolled_float64(relative, p, dtype):
    a = sparse()
    reg = relative*frame_costs(frame_distributions(a), p).mean().item()
    value, grad = value_and_gradient(lambda v: literal(v, reg, p=p), a.double())
    v, g = value_and_gradient(lambda v: sinkhorn_penalty(v, p, reg), a.to(dtype))
    assert v.dtype == g.dtype == dtype
    assert abs(v/value - 1) < 1e-5 and (g - grad).abs().max()/grad.abs().max() < 1e-5


def test_unrolled_and_implicit_agree_in_batches_and_rectangles():
    g = torch.Generator().manual_seed(0)
    M, W = (torch.rand(2, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    for reg in (.2, 1., 50.):
        grads = [value_and_gradient(lambda m: (sinkhorn_plan(m, reg, 1e-12, 5000, unrolled=u)*W).sum(), M)[1] for u in (False, True)]
        assert torch.allclose(*grads, atol=1e-9, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda m: sinkhorn_plan(m, .5, 1e-13), M.requires_grad_())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('within', [False, True])
@pytest.mark.parametrize('r, cost', [(.2, .00669), (1., .26894), (5., .45017)])
def test_two_points_by_hand(r, cost, within, dtype):
    M = torch.tensor([[0., 1.], [1., 0.]], dtype=dtype)
    P = sinkhorn_plan(M, r, within=within)
    assert abs((P*M).sum().item() - math.exp(-1/r)/(1 + math.exp(-1/r))) < 1e-6 and round((P*M).sum().item(), 5) == cost
    assert (P.sum(0) - .5).abs().max() < 1e-6 and (P.sum(1) - .5).abs().max() < 1e-6


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('n', [5, 6, 7, 8])
def test_from_the_assignment_to_the_mean_of_all_costs(n, seed):
    C = torch.rand(n, n, generator=torch.Generator().manual_seed(10*n + seed), dtype=torch.float64)
    rows, cols = linear_sum_assignment(C.numpy())
    exact = C[rows, cols].mean().item()
    assert math.isclose(exact_cost(C), exact, rel_tol=1e-12)
    costs = [(sinkhorn_plan(C, k*C.max().item(), 1e-4, 20_000)*C).sum().item() for k in (.005, .02, .1, .5, 2., 10., 1000.)]
    assert abs(costs[0] - exact) < 2e-3
    assert all(a < b for a, b in zip(costs, costs[1:])) and abs(costs[-1]/C.mean().item() - 1) < 1e-3


@pytest.mark.parametrize('within', [False, True])
@pytest.mark.parametrize('reg', [.3, 1.3, 5.])
def test_marginals_within_a_thousand_iterations(reg, within):
    M = frame_costs(frame_distributions(sparse())).double()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        P = sinkhorn_plan(M, reg, within=within, max_iter=999)
    for side in (0, 1): assert (P.sum(side) - 1/len(M)).abs().max() < 1e-5


def test_plan_and_divergence_against_pot():
    ot = pytest.importorskip('ot', reason='POT is not installed')
    M = frame_costs(frame_distributions(sparse().double()))
    share = torch.full((30,), 1/30, dtype=torch.float64).numpy()
    for reg in (.3, 1.3, 5.):                             # at .05 their two potentials in turn need more than 10,000 iterations
        theirs = ot.sinkhorn(share, share, M.numpy(), reg, numItermax=10_000, stopThr=1e-13)
        assert abs(sinkhorn_plan(M, reg, within=True) - torch.tensor(theirs)).max() < 1e-8
    assert abs(exact_cost(M[:, torch.randperm(30)]) - ot.emd2(share, share, M.numpy())) < 1e-9
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 3, 12, generator=g, dtype=torch.float64), torch.randn(1, 3, 9, generator=g, dtype=torch.float64) + 1
    a, b = (torch.full((k,), 1/k, dtype=torch.float64).numpy() for k in (12, 9))
    C = torch.cdist(x.mT, y.mT)[0].numpy()
    assert abs(exact_cost(torch.cdist(x[..., :9].mT, y.mT)[0]) - ot.emd2(b, b, C[:9].copy())) < 1e-9
    P = ot.sinkhorn(a, b, C, .5, numItermax=10_000, stopThr=1e-12)
    theirs = (P*C).sum() + .5*(P*torch.tensor(P*108).log().numpy()).sum()
    assert abs(entropic_cost(torch.tensor(C), .5, 1e-10).item() - theirs) < 1e-8


@pytest.mark.parametrize('p', [1, 1.5, 2])
@pytest.mark.parametrize('relative', [1e-4, .01, .1, 1., 100.])
def test_the_loop_stops_by_itself(p, relative):
    for a in (sparse(), torch.zeros(1, 4, 6), torch.ones(1, 3, 1), 1e6*sparse(seed=1), sparse(1, 1, 50)):
        M = frame_costs(frame_distributions(a), p).double()
        reg = relative*max(M.mean().item(), 1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            P = sinkhorn_plan(M, reg, within=True, max_iter=25)
        assert (P.sum(0) - 1/len(M)).abs().sum() < 1e-8 and (P - P.T).abs().max() < 1e-12


def test_a_loop_that_is_cut_short_says_so():
    M = frame_costs(frame_distributions(sparse())).double()
    for within in (False, True):
        with pytest.warns(UserWarning, match='after 2 iterations'): sinkhorn_plan(M, .1, max_iter=2, within=within)


def test_half_precision_changes_activations_and_nothing_else():
    a = sparse()
    assert torch.equal(sinkhorn_penalty(a.bfloat16()), sinkhorn_penalty(a.bfloat16().float()))
    plain = [value_and_gradient(f, a) for f in (sinkhorn_penalty, total_variation)]
    with torch.autocast('cpu', torch.bfloat16): under = [value_and_gradient(f, a) for f in (sinkhorn_penalty, total_variation)]
    for (v, g), (w, h) in zip(plain, under): assert v.dtype == w.dtype == torch.float32 and torch.equal(v, w) and torch.equal(g, h)
    half = a.bfloat16().requires_grad_()
    (sinkhorn_penalty(half) + sinkhorn_divergence(half, half.detach().flip(1)) + total_variation(half)).backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()


@pytest.mark.parametrize('p', [1, 2])
@pytest.mark.parametrize('normalise', ['time', 'component', None])
def test_gradient_is_finite_where_frames_coincide(p, normalise):
    for a in (torch.zeros(2, 4, 6), torch.ones(1, 3, 5), torch.rand(1, 3, 1), sparse()):
        for loss in (sinkhorn_penalty, lambda v, p, normalise: sinkhorn_divergence(v, v.detach() + 1, p, 1., normalise)):
            v, g = value_and_gradient(lambda v: loss(v, p, normalise=normalise), a)
            assert v.isfinite() and g.isfinite().all()


def test_nan_ends_the_loop_and_arrives():
    a = sparse(); a[0, 0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        v, g = value_and_gradient(sinkhorn_penalty, a)
    assert v.isnan() and g.isnan().any()


def test_divergence_is_unbiased_by_order_and_size():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 10, generator=g, dtype=torch.float64)
    same = x[..., torch.randperm(10, generator=g)]
    assert abs(sinkhorn_divergence(x, torch.cat([same, same], -1), reg=3., tol=1e-10)) < 1e-8
    y = x + .5
    one_by_one = torch.stack([sinkhorn_divergence(a[None], b[None], tol=1e-9) for a, b in zip(x, y)])
    assert abs(sinkhorn_divergence(x, y, tol=1e-9) - one_by_one.mean()) < 1e-8


def test_memory_stays_far_below_all_differences():
    "96 MB an item would be the differences of one second at full size."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in (out if isinstance(out, (tuple, list)) else [out]):
                if isinstance(t, torch.Tensor): self.most = max(self.most, t.numel())
            return out
    a = sparse(1, 200, 100)
    with Largest() as seen: value_and_gradient(sinkhorn_penalty, a)
    assert 0 < seen.most <= 2*a.numel()


def test_waveforms_of_any_shape_and_level():
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 3, 1, 500, generator=g), torch.randn(2, 3, 1, 500, generator=g)
    y = x + .3*e
    assert si_sdr(y, x).shape == (2, 3, 1) and neg_snr(y, x).ndim == 0
    for level in (1e-8, 1e4):
        for f in (si_sdr, neg_snr): assert torch.allclose(f(level*y, level*x), f(y, x), atol=1e-3)
    assert torch.allclose(-neg_snr(y[0, 0, 0], x[0, 0, 0]), 10*torch.log10(x[0, 0, 0].square().sum()/(.3*e[0, 0, 0]).square().sum()), atol=1e-4)
    each = torch.stack([neg_snr(a, b) for a, b in zip(y.reshape(6, 500), x.reshape(6, 500))]).mean()
    assert torch.allclose(neg_snr(y, x, each=True), each, atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(si_sdr(y, x), si_sdr(y.clone(), x))


def test_pairs_in_half_precision_and_far_out():
    v = torch.tensor([300.], requires_grad=True)
    loss = pair_bce(-v.bfloat16(), v)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and v.grad.item() == pytest.approx(1.)


def test_variation_of_single_frames_and_components():
    for shape in ((1, 1, 5), (2, 5, 1), (1, 1, 1)):
        for norm in ('l1', 'l2'):
            v, g = value_and_gradient(lambda a: total_variation(a, norm=norm), torch.rand(shape))
            assert v.isfinite() and g.isfinite().all()

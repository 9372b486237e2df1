"MMD under half precision, other devices, odd sizes and heavy repetition; the identities stand in the notebook."
import pytest, torch
from disentangle_nb.losses.mmd import conditional_mmd2, latent_mmd2, matched, mmd2, permutation_test, pooled_distances, squared_distances


def two(m=12, n=9, d=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=g), torch.randn(n, d, generator=g) + .2


def test_half_precision_changes_samples_and_nothing_else():
    x, y = two()
    with torch.autocast('cpu', torch.bfloat16): under = mmd2(x, y)
    assert under.dtype == torch.float32 and torch.equal(under, mmd2(x, y))
    assert abs(mmd2(x.bfloat16(), y.bfloat16()) - mmd2(x.bfloat16().float(), y.bfloat16().float())) < 1e-7
    assert mmd2(x.double(), y).dtype == torch.float64


def test_a_far_origin_does_not_matter():
    "The digits that an offset of 100 costs in float32 are lost before the distances are taken."
    x, y = two(d=500)
    near, far = squared_distances(x, y), squared_distances(x + 100, y + 100)
    assert ((near - far).abs() / near).max() < 1e-5


@pytest.mark.parametrize('kernel', ['rbf', 'imq'])
def test_gradient_is_finite_where_everything_coincides(kernel):
    x = torch.ones(5, 7, requires_grad=True)
    mmd2(x, torch.ones(4, 7), kernel).backward()
    assert torch.isfinite(x.grad).all()


def test_gradient_does_not_pass_through_the_scale():
    x, y = (v.double() for v in two())
    scale = pooled_distances(x, y)[~torch.eye(21, dtype=torch.bool)].median()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mmd2(a, y).backward(); mmd2(b, y, scale=scale).backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-12)


def test_chance_comes_from_the_generator_alone():
    x, _ = two()
    draw = lambda seed: latent_mmd2(x, torch.Generator().manual_seed(seed))
    torch.manual_seed(0); a = draw(1)
    torch.manual_seed(7); assert torch.equal(a, draw(1))
    state = torch.get_rng_state(); permutation_test(*two(), n=20)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('repeat', [True, False])
@pytest.mark.parametrize('seed', range(5))
def test_partners_against_counting(seed, repeat):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 9, (40,), generator=g), torch.randint(4, 13, (25,), generator=g)
    s, t = matched(a, b, g, repeat)
    assert torch.equal(a[s], b[t]) and torch.equal(s, s.unique())
    for c in range(13):
        wanted, there = int((a == c).sum()), int((b == c).sum())
        used = torch.bincount(t[b[t] == c], minlength=25)[b == c]
        assert int(used.sum()) == (wanted*(there > 0) if repeat else min(wanted, there))
        if there: assert used.max() - used.min() <= 1


def test_every_partner_is_equally_likely():
    g, a, b = torch.Generator().manual_seed(0), torch.tensor([3]), torch.tensor([3, 5, 3, 3])
    seen = torch.cat([matched(a, b, g)[1] for _ in range(900)]).bincount(minlength=4)
    assert seen[1] == 0 and (seen[[0, 2, 3]] - 300).abs().max() < 60


def test_keys_may_be_numbers_rows_or_lists():
    a, b = torch.tensor([[0, 4], [3, 3], [0, 3]]), torch.tensor([[0, 3], [3, 3]])
    assert [v.tolist() for v in matched(a, b)] == [[1, 2], [1, 0]]
    assert [v.tolist() for v in matched([7, 8], [8])] == [[1], [0]]
    with pytest.raises(ValueError, match='one row a sample'): matched(a, b[:, 0])
    with pytest.raises(ValueError, match='name every sample'): conditional_mmd2(*two(), torch.zeros(12), torch.zeros(8))


def test_memory_of_a_large_test_is_bounded():
    "Deals go in blocks of 8 million names: here there are two."
    x, y = two(800, 700, 3)
    t = permutation_test(x, y, n=6000)
    assert t['null'].shape == (6000,) and abs(t['null'].mean()) < 1e-4 and t['p'] == 1/6001


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_agrees():
    x, y = two(64, 48, 8000)
    k = torch.arange(64) % 6, torch.arange(48) % 6
    for f in (mmd2, lambda a, b: conditional_mmd2(a, b, *k), lambda a, b: mmd2(a, b, 'imq', False)):
        assert abs(f(x, y) - f(x.cuda(), y.cuda()).cpu()) < 1e-5
    s, t = matched(k[0].cuda(), k[1].cuda())
    assert s.is_cuda and permutation_test(x.cuda(), y.cuda(), 50)['null'].shape == (50,) and latent_mmd2(x.cuda()).is_cuda
    assert torch.equal(x.cuda()[s].cpu(), x[s.cpu()])

"""Metrics at the edges: what a definition says of few items, empty levels, constant columns, tiny and huge numbers."""
import math, warnings
import numpy as np, pandas as pd, pytest, torch
from sklearn.svm import LinearSVC
from disentangle_nb.evaluation import metrics as M, predictors as P, scores as S

SMALL = dict(factor_vae_score=dict(votes=300, test_votes=300), beta_vae_score=dict(points=200, test_points=200), dci=dict(trees=5),
             dci_es=dict(trees=3, sizes=(1, 4)), infomec=dict(shuffles=1))


def drawn(n=600, seed=0, levels=(4, 10, 10)):
    "Independent factors, exact codes and noise."
    g = np.random.default_rng(seed); v = np.stack([g.integers(0, m, n) for m in levels], 1)
    return v, (v - v.mean(0))/v.std(0), g.normal(size=(n, 3))


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
def test_round_off_is_no_information(seed):
    assert S.check_metric('modularity', seed=seed).ok.all()
    v, z, _ = drawn(seed=seed); s = M.modularity(np.c_[z, np.full(len(z), .1*seed)], v)
    assert s.codes[3] == 0 and (M.information(np.full(len(z), .3), v).mi == 0).all()


def test_bins_of_tiny_ranges():
    x = np.linspace(0, 1, 100)[:, None]; want = M.to_bins(x)
    for small in (1e-9, 1e-150, 1e-305): assert (M.to_bins(x*small) == want).all()
    assert (M.to_bins(1e8 + x) == want).all() and (M.to_bins(1 + 1e-15*x) == 0).all()


@pytest.mark.parametrize('name', ['sap', 'irs', 'explicitness', 'mig', 'factor_vae_score'])
@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_scale_of_codes_is_free(name, scale):
    v, z, w = drawn(); f, kw = S.METRICS[name], SMALL.get(name, {})
    assert f(z*scale, v, **kw).value == pytest.approx(f(z, v, **kw).value, abs=1e-6)


def test_numbers_whose_squares_overflow_are_refused():
    v, z, _ = drawn()
    with pytest.raises(ValueError, match='1e100'): M.sap(z*1e120, v)
    with pytest.raises(ValueError, match='1e100'): M.sap(z, v*1e120)


# --- lines and machines -----------------------------------------------------------------------------------------------

def test_a_nominal_level_without_items_counts_for_nothing():
    v, z, _ = drawn(); items = M.read_items(z, v, kinds='nominal'); rows = np.flatnonzero(v[:, 1] != 3)
    got = M.variance_share(items.take(rows)); assert np.isfinite(got).all()
    assert got == pytest.approx(M.variance_share(M.read_items(z[rows], v[rows], kinds='nominal')), abs=1e-12)


def test_sap_of_the_library_is_its_own_machine_per_code():
    g = np.random.default_rng(0); v = np.stack([g.choice(3, 900, p=[.5, .3, .2]), g.choice(4, 900, p=[.4, .3, .2, .1])], 1)
    z = np.c_[v[:, 0] + .4*g.normal(size=900), v[:, 1] + .4*g.normal(size=900), np.full(900, .7), np.zeros(900)]
    got, (a, b) = S.score(z, v, 'sap', 'disentanglement_lib'), M._split(900, 1/3, 0); want = np.zeros((2, 4))
    for k in range(2):
        for d in range(4):
            svc = LinearSVC(C=.01, class_weight='balanced', dual=False, tol=1e-9, max_iter=10_000)
            want[k, d] = svc.fit(z[a, d:d + 1], v[a, k]).score(z[b, d:d + 1], v[b, k])
    assert got.relation == pytest.approx(want, abs=.01) and want[:, 2].min() > .3           # a constant code still guesses
    two = np.sort(want, 1); assert got.value == pytest.approx((two[:, -1] - two[:, -2]).mean(), abs=.01)
    assert M.sap(z*0, v, by='svm').value == 0 and M.sap(z[:, :1]*0, v, by='svm').value == 0


# --- interventions ----------------------------------------------------------------------------------------------------

def test_irs_leaves_out_levels_with_one_item():
    g = np.random.default_rng(0); alone = M.irs(g.normal(size=(12, 3)), np.arange(12))
    assert math.isnan(alone.value) and '12 levels' in alone.reason
    v = np.r_[np.repeat(np.arange(4), 20), np.arange(4, 10)]; z = v + .3*g.normal(size=86); s = M.irs(z, v)
    kept = v < 4; off = [np.quantile(np.abs(z[v == u] - z[v == u].mean()), .99) for u in range(4)]
    assert s.value == pytest.approx(1 - np.mean(off)/np.abs(z - z.mean()).max(), abs=1e-12) and '6 levels' in s.reason and kept.sum() == 80


def test_irs_of_the_library_bins_every_factor():
    v = np.arange(400); z = np.sin(v/40.)[:, None] + .1*np.random.default_rng(0).normal(size=(400, 1)); lib = S.score(z, v, 'irs', 'disentanglement_lib')
    assert lib.value == M.irs(z, M.to_bins(v[:, None].astype(float))).value


def test_beta_vae_pairs_have_levels_of_their_own():
    "From the definition: the spread of |z - z'| over points is that of a mean of L independent pairs."
    g = np.random.default_rng(0); v = np.stack([g.integers(0, 10, 4000) for _ in range(2)], 1); z = np.c_[v[:, 0]**3./100, v[:, 1]]
    got = [M._differences(z, r) for j, r in M._games(v, 2000, 2, np.random.default_rng(1), pairs=64) if j == 1]
    x = np.concatenate(got)[:, 0]; a, b = g.integers(0, 10, (2, 200_000)); pair = np.abs(a**3./100 - b**3./100)
    assert x.mean() == pytest.approx(pair.mean(), rel=.02) and x.std() == pytest.approx(pair.std()/8, rel=.1)
    z = np.c_[v[:, 0] + v[:, 1], (v[:, 0] == 9)*v[:, 1]]              # the second code moves only where the first factor is 9
    rows = np.concatenate([r for j, r in M._games(v, 400, 2, np.random.default_rng(2), pairs=64) if j == 0])
    assert (v[rows[..., 0], 0] == v[rows[..., 1], 0]).all()
    per_point = [len(set(v[r[:, 0], 0])) for r in rows]; assert min(per_point) > 5


def test_beta_vae_as_a_plain_loop():
    "Noise whose width is the first factor's level: with one level for all pairs of a point this would be another game."
    from sklearn.linear_model import LogisticRegression
    g = np.random.default_rng(3); v = np.stack([g.integers(0, 5, 2000) for _ in range(2)], 1)
    z = g.normal(size=(2000, 1))*(v[:, :1]**2 + .1); rows = [[np.flatnonzero(f == u) for u in range(5)] for f in v.T]
    def draw(n):
        x, y = [], g.integers(0, 2, n)
        for k in y:
            pairs = np.array([g.choice(rows[k][u], 2) for u in v[g.integers(2000, size=32), k]])
            x.append(np.abs(z[pairs[:, 0]] - z[pairs[:, 1]]).mean(0))
        return np.array(x), y
    plain = LogisticRegression(max_iter=1000).fit(*draw(1000)).score(*draw(1000))
    ours = M.beta_vae_score(z, v, L=32, points=2000, test_points=2000).value
    assert ours == pytest.approx(plain, abs=3*(.25/1000 + .25/2000)**.5)     # .66; one level for all pairs gives .77


def test_games_of_noise_are_at_chance():
    for k in (2, 3, 4, 6):
        g = np.random.default_rng(k); v, z = g.integers(0, 6, (4000, k)), g.normal(size=(4000, 5)); n = 4000; sd = (1/k*(1 - 1/k)/n)**.5
        for f, kw in ((M.factor_vae_score, dict(votes=n, test_votes=n)), (M.beta_vae_score, dict(points=n, test_points=n))):
            assert abs(f(z, v, **kw).value - 1/k) < 3*sd, f.__name__
            assert abs(f(z, v, rescale=True, **kw).value) < 3*sd/(1 - 1/k)


# --- few items, few factors -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 3, 4, 5])
@pytest.mark.parametrize('name', ['explicitness', 'infomec', 'dci', 'dci_es'])
def test_few_items_give_a_number_or_a_reason(name, n):
    g = np.random.default_rng(n)
    for v in (np.arange(n) % 2, np.arange(n), np.linspace(0, 1, n)):
        for kind in (None, 'nominal', 'continuous'):
            s = S.METRICS[name](g.normal(size=(n, 2)), v, kinds=kind, **SMALL[name] if name in SMALL else {})
            values = list((s.parts or {'': s.value}).values())
            assert all(math.isfinite(x) for x in values) or s.reason
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'too few' in S.METRICS[name](g.normal(size=(2, 2)), [0, 1], **SMALL.get(name, {})).reason


@pytest.mark.parametrize('predictor', ['lasso', 'forest', 'boosting'])
def test_a_held_out_column_without_variance_is_left_out(predictor):
    v, z, _ = drawn(200); train, held = M._split(200, 1/3, 0); flat = v[:, 0] + np.arange(200)/1e3; flat[held] = 2.
    s = P.dci(z, np.c_[flat, v[:, 1] + .5], kinds='continuous', predictor=predictor, trees=5)
    assert math.isnan(s.factors['factor 0']) and 0 < s.factors['factor 1'] <= 1 and "'factor 0'" in s.reason
    rare = np.full(200, 'a', object); rare[:] = np.where(v[:, 0] > 1, 'a', 'b'); rare[train[:5]] = 'c'       # taught, never asked
    assert 0 < P.dci(z, dict(rare=rare), predictor='lasso').factors['rare'] <= 1


def test_waves_count_what_they_miss_everywhere():
    g = np.random.default_rng(0); x = g.normal(size=(200, 1)); f = P._waves(x, x[:, 0], 0, False, 0)
    assert f(x, x[:, 0] + 3) == pytest.approx(1 - 9/x.var(), rel=.02)       # off by a constant is off
    assert math.isnan(f(x, np.ones(200)))


def test_untaught_levels_are_not_asked():
    v, z, _ = drawn(300); train, held = M._split(300, 1/3, 0); y = v[:, 1].copy(); y[held[:30]] = 10       # never taught
    with_, without = P.explicitness(z, y), P.explicitness(z, np.where(y == 10, -1, y))
    assert with_.value == pytest.approx(without.value, abs=.05) and with_.value > .9


@pytest.mark.parametrize('name', ['mig_sup', 'dcimig', 'modularity', 'factor_vae_score', 'beta_vae_score'])
def test_one_factor_is_no_contest(name):
    v, z, _ = drawn(); s = S.METRICS[name](z, v[:, 0], **SMALL.get(name, {})); assert math.isnan(s.value) and 'factor' in s.reason
    t = S.score_table(z, v[:, 0], name, settings={k: x for k, x in SMALL.items() if k == name}, refits=2, n_boot=5, n_null=5); assert math.isnan(t.value.iloc[0]) and t.reason.iloc[0]


def test_mean_over_active_codes():
    v, z, _ = drawn(); s = M.mig_sup(np.c_[z, z[:, :3]*0], v); assert s.more['active'] == pytest.approx(2*s.value, abs=1e-12)


def test_capacity_explicitness_stays_in_its_range():
    for loss in ([9., 9, 0], [9, 9, 9], [0, 9, 9]): assert -1 <= P.capacity_explicitness([0, 99, 100], loss, .5) <= 1


# --- the door ---------------------------------------------------------------------------------------------------------

def test_what_items_hold_is_not_taken_twice():
    v, z, _ = drawn(); items = M.read_items(z, v); info = M.information(items, bins=10)
    for call in (lambda: M.mig(items, names=['a', 'b', 'c']), lambda: M.sap(items, kinds='nominal'), lambda: M.irs(items, missing=None),
                 lambda: M.mig(info, bins=20, correct=True), lambda: M.mig(info, how='count'), lambda: M.mig(info, kinds='nominal'),
                 lambda: S.score_table(items, kinds='nominal'), lambda: S.score(items, names=['a'])):
        with pytest.raises(ValueError, match='holds some already'): call()
    assert M.mig(items, bins=10).value == M.mig(info).value


def test_two_factors_of_one_name():
    v, z, _ = drawn(); frame = pd.DataFrame(v, columns=['a', 'b', 'a'])
    for factors, names in ((frame, None), (frame, ['a', 'b']), (v, ['a', 'b', 'a']), ({1: v[:, 0], '1': v[:, 1]}, None), (frame[['b']], ['b', 'b'])):
        with pytest.raises(ValueError, match='more than once'): M.read_items(z, factors, names)
    assert M.read_items(z, frame, 'b').names == ('b',)


def test_missing_labels_are_counted_and_odd_marks_warned_of():
    v, z, _ = drawn(); v = pd.DataFrame(v, columns=list('abc')); v.loc[:9, 'b'] = -1
    s = M.mig(z, v); assert "{'b': 10}" in s.reason
    t = S.score_table(z, v, 'mig', n_boot=5, n_null=5); assert t.attrs['missing'] == {'b': 10} and "{'b': 10}" in t.reason.iloc[0]
    with pytest.warns(UserWarning, match='missing=None'): M.read_items(z, v - 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert M.read_items(z, v - 2, missing=None).missing == {}


def test_half_precision():
    v, z, _ = drawn(); t = torch.tensor(z, dtype=torch.bfloat16, requires_grad=True)
    assert M.sap(t, torch.tensor(v)).value == pytest.approx(1, abs=.01)
    assert M.sap(t, torch.tensor(v, dtype=torch.bfloat16)).value == pytest.approx(1, abs=.01)
def test_draws_without_a_score_are_named():
    v, z, _ = drawn(40); rare = dict(a=v[:, 0], rare=np.where(np.arange(40) < 2, 1, 0))     # a random half may hold one item of the level, or none
    t = S.score_table(z, rare, 'explicitness', refits=6, settings=dict(explicitness=dict(test=.5)))
    assert 'without a score' in t.reason.iloc[0] or 'too few' in t.reason.iloc[0]




# --- closed forms and the table ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', S.EXACT)
def test_closed_forms_on_the_grid(name):
    for n in (400, 1200):
        t = S.check_metric(name, n=n, strict=False); t = t[t.case.str.startswith('grid')]
        assert len(t) == 9 and t.ok.all() and (t.tolerance == 1e-6).all()


def test_another_norm_is_another_score():
    with pytest.raises(AssertionError, match='grid, packed'): S.check_metric('mig', norm='code')
    with pytest.raises(AssertionError, match='grid'): S.check_metric('mig_sup', bins=10)


def test_settings_that_nobody_reads_are_refused():
    v, z, _ = drawn(100)
    for settings in (dict(dci=dict(trees=5)), dict(mgi=dict(norm='code')), dict(mig=dict(nrom='code')), dict(sap=dict(by='svm', c=1))):
        with pytest.raises(ValueError, match='settings? '): S.score_table(z, v, ('mig', 'sap'), settings=settings)
    for name in ('infomec', 'dci_es'):
        with pytest.raises(ValueError, match='is defined for'): S.score(z, v, name, 'disentanglement_lib')


def test_table_says_what_it_is_made_of():
    v, z, w = drawn(300); t = S.score_table(z + .3*w, v, ('mig', 'irs', 'sap', 'explicitness'), references=dict(noise=w, untrained=z @ w[:3]), bins=10, code_type='drawn')
    assert t.interval.tolist() == ['200 draws', '200 halves', '200 halves', '10 halves, Student'] and t.shuffles.tolist() == [200, 100, 100, 10]
    a = t.attrs; assert (a['n_boot'], a['n_null'], a['refits'], a['code_type'], a['settings']['mig']) == (200, 200, 10, 'drawn', dict(bins=10))
    assert a['versions']['numpy'] == np.__version__ and set(a['versions']) == {'numpy', 'scikit-learn'}
    assert t.noise['mig'] == M.mig(w, v, bins=10).value and (t.noise < t.value).all() and np.isfinite(t.untrained).all()
    assert S.score_table(z, v, n_boot=3, n_null=4, refits=2).index.tolist() == [*S.QUICK, 'explicitness']
    for bad, words in ((dict(noise=w[1:]), 'encode the same items'), (dict(value=w), 'column of the table')):
        with pytest.raises(ValueError, match=words): S.score_table(z, v, 'mig', references=bad)


def test_halves_of_quick_metrics_cover_new_data():
    def data(g): v = g.integers(0, 5, (400, 2)); return v + g.normal(size=(400, 2)), v
    truth = np.std([M.irs(*data(np.random.default_rng(s))).value for s in range(150)])
    rows = [S.score_table(*data(np.random.default_rng(1000 + s)), 'irs', n_boot=60, n_null=0).iloc[0] for s in range(20)]
    assert np.mean([(r.hi - r.lo)/2/1.96 for r in rows]) == pytest.approx(truth, rel=.4)    # extremes: halves are coarse


def test_divergences_of_another_shape():
    _, z, w = drawn(100)
    for kl in ([np.ones(3)], [np.ones(3), np.ones(2)], [np.ones((100, 3))]*2, [np.ones(3), np.full(3, np.nan)]):
        with pytest.raises(ValueError, match='divergences'): S.udr([z, w], kl)


# --- information ------------------------------------------------------------------------------------------------------

def test_information_is_symmetric_and_bounded():
    g = np.random.default_rng(0); a = g.integers(0, 6, 500); b = (a + g.integers(0, 3, 500)) % 8; I = lambda x, y: M.information(x, y, bins=10, coarse='all').mi.item()
    H = lambda x: float(M.entropy(np.bincount(x)))
    assert I(a, b) == pytest.approx(I(b, a), abs=1e-12) and 0 < I(a, b) <= min(H(a), H(b))
    assert I(a, a) == pytest.approx(H(a), abs=1e-12) and I(b, 3*b) == pytest.approx(H(b), abs=1e-12) and I(0*a + .1, b) == 0


@pytest.mark.parametrize('name', S.BINNED)
def test_monotone_maps_change_nothing_that_is_counted_in_equal_bins(name):
    v, z, w = drawn(); z = z + .2*w; f = S.METRICS[name]
    assert f(np.exp(2*z), v, how='count').value == pytest.approx(f(z, v, how='count').value, abs=1e-12)
    assert f(np.arctan(z)**3, v, how='count').value == pytest.approx(f(z, v, how='count').value, abs=1e-12)
    assert abs(f(np.exp(2*z), v).value - f(z, v).value) > .005          # bins of equal width do mind


def test_neighbours_in_the_place_of_counts():
    from sklearn.feature_selection import mutual_info_classif
    v, z, w = drawn(); z = z + .3*w; info = M.information(z, v, estimator='knn')
    want = [mutual_info_classif(z, f, n_neighbors=10, random_state=0) for f in v.T]
    assert info.mi == pytest.approx(np.array(want), abs=1e-6) and M.mig(info).value == pytest.approx(M.mig(z, v, estimator='knn').value)
    for f in (M.mig, M.mig_sup, M.modularity, M.dcimig): assert 0 < f(info).value <= 1
    t = S.score_table(z, v, ('mig', 'modularity'), settings=dict(mig=dict(estimator='knn')), refits=3, n_boot=5, n_null=5)
    assert t.interval.tolist() == ['3 halves, Student', '5 draws'] and t.value['mig'] == M.mig(info).value and t.null['mig'] < .02
    for call in (lambda: M.jemmig(info), lambda: M.mig(info, norm='code'), lambda: M.mig(z, v, estimator='knn', correct=True), lambda: M.mig(z, v, estimator='ksg')):
        with pytest.raises(ValueError): call()


def test_less_what_chance_gives():
    v, z, w = drawn(2000); raw, less = (M.information(w, v, correct=c).mi for c in (False, 'null'))
    assert raw.mean() > .02 and less.mean() < .004 and (less >= 0).all()
    items = M.read_items(z + .3*w, v); one = M.information(items, correct='null'); chance = M.information(items).mi - one.mi
    assert .01 < chance[one.mi > 0].mean() < .06                        # (levels - 1)(bins - 1)/2N is .014 and .043
    drawn_ = S.bootstrap_information(items, 5, correct='null'), S.bootstrap_information(items, 5)
    assert drawn_[0].mi == pytest.approx(np.maximum(drawn_[1].mi - (M.information(items).mi - M.information(items, correct='null').mi), 0), abs=.02)
    assert S.null_information(items, 20, correct='null').mi.mean() < .4*S.null_information(items, 20).mi.mean()
    with pytest.raises(ValueError, match="'null'"): M.mig(items, correct='nul')
    assert S.score_table(items, metrics='mig', correct='null', n_boot=5, n_null=5).null.iloc[0] < .01


# --- blocks -----------------------------------------------------------------------------------------------------------

def test_blocks_stand_for_one_code():
    v, z, w = drawn(1000); x = np.c_[z[:, 0], z[:, 1], z[:, 1] + .1*w[:, 0], z[:, 2]]; blocks = dict(level=[1, 2], pitch=3)
    plain, joined = M.read_items(x, v), M.read_items(x, v, blocks=blocks); info = M.information(joined)
    assert info.items.blocks == (('level', (1, 2)), ('pitch', (3,)), ('code 0', (0,)))
    assert M.mig(plain).value < .75 and M.mig(joined).value > .95 and M.sap(joined).value > .95
    for f in (M.mig, M.mig_sup, M.jemmig, M.dcimig, M.modularity, M.sap):
        alone = f(M.read_items(x[:, [0, 1, 3]], v)).value; assert f(joined).value == pytest.approx(alone, abs=.05), f.__name__
    d = P.dci(joined, trees=5); assert d.relation.shape == (3, 3) and min(d.parts.values()) > .95
    assert d.relation == pytest.approx(M.pool_columns(P.dci(plain, trees=5).relation, joined, np.sum))
    for f in (M.irs, M.factor_vae_score, P.infomec): s = f(joined); assert math.isnan(s.value) and 'blocks' in s.reason
    t = S.score_table(x, v, blocks=blocks, n_boot=5, n_null=5, refits=2, references=dict(noise=np.random.default_rng(0).normal(size=x.shape)))
    assert t.value['mig'] > .95 and t.ceiling['mig'] > .95 and 'blocks' in t.reason['irs'] and t.noise['mig'] < .1
    with pytest.raises(ValueError, match='holds some already'): M.read_items(joined, blocks=blocks)
    with pytest.raises(ValueError, match='with blocks'): S.score_table(joined, metrics='mig', references=dict(noise=w))
    with pytest.raises(ValueError, match="norm='factor'"): M.mig(joined, norm='code')


def test_leakage_of_blocks():
    v, z, w = drawn(2000); wide = np.eye(10)[v[:, 1]] + .01*np.random.default_rng(0).normal(size=(2000, 10)); names = ['timbre', 'level', 'pitch']
    t = P.block_leakage(np.c_[z[:, 0], wide, w[:, 0]], v, dict(timbre=[0], level=range(1, 11), pitch=[11]), names=names).set_index(['factor', 'block'])
    assert t.leak['level', 'level'] > .99 and t.acc['level', 'timbre'] == pytest.approx(.1, abs=.06) and abs(t.leak['pitch', 'pitch']) < .06
    assert t.own.groupby('factor').sum().eq(1).all() and t.n.eq(667).all() and (t.chance['level'] < .15).all()


# --- effort -----------------------------------------------------------------------------------------------------------

def test_networks_read_what_lines_do_not():
    g = np.random.default_rng(0); y = g.integers(0, 10, 1500); x = np.c_[np.cos(2*np.pi*y/10), np.sin(2*np.pi*y/10)]*(1 + .1*g.normal(size=(1500, 1)))
    hits = [P._probe('net', w, x[:1000], y[:1000], True, 0, 0)(x[1000:], y[1000:]) for w in (0, 32)]; assert hits[0] < .9 < hits[1]
    a, b = (P.dci_es(x, y, probe='net', sizes=(0, 16, 32)) for _ in range(2)); assert a.parts['E'] == b.parts['E'] and a.parts['I'] > .9
    assert P._capacity('net', (0, 5), 3, 2) == pytest.approx(np.log([3*2 + 2, 3*5 + 5 + 25 + 5 + 5*2 + 2]))
    r2 = P._probe('net', 32, x[:1000], x[:1000, 0]*x[:1000, 1], False, 0, 0)(x[1000:], x[1000:, 0]*x[1000:, 1]); assert r2 > .9

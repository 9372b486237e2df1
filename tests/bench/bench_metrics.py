"""Metrics on 10,000 x 10 codes against the plain way: a loop over pairs, votes or factors through scikit-learn.

    python tests/bench/bench_metrics.py [--pairs 7] [--dci-pairs 3] [--items 10000] [--json FILE]

Both sides start from the same arrays and are timed in turn; a ratio is the median over pairs. They also have to agree: the
last columns are the largest difference of their values and what is allowed. Boosting is scored on three factors of 4, 10
and 10 levels, because the exact form takes minutes for more; its time is proportional to the sum of the levels. Exits 1
below a floor, or where values differ.
"""
import argparse, json, os, statistics, sys, time, warnings
for pool in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(pool, '1') # one core each, and none that spins
import numpy as np
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.svm import LinearSVC
from disentangle_nb.evaluation.metrics import (completeness, dcimig, disentanglement, factor_vae_score, information, jemmig, mig, mig_sup, modularity,
                                               read_items, sap)
from disentangle_nb.evaluation.predictors import dci, explicitness
from disentangle_nb.evaluation.scores import bootstrap_information, null_information

FLOOR = {'information': 12., 'FactorVAE score': 5., 'SAP': 2.6, 'explicitness': 1.2, 'DCI': 25.}
WITHIN = {'information': 1e-9, 'FactorVAE score': .02, 'SAP': .005, 'explicitness': 1e-4, 'DCI': .05}
BUDGET = 5. # s for 200 resamples of the information family


def arrays(n, levels, d=10, seed=0):
    "Factors with so many levels each, and codes that mix neighbours a little, with noise."
    rng = np.random.default_rng(seed)
    v = np.stack([rng.integers(0, m, n) for m in levels], 1); z = (v - v.mean(0))/v.std(0)
    z = np.c_[z, rng.normal(size=(n, d - len(levels)))] if d > len(levels) else z
    return z + .3*np.roll(z, 1, axis=1) + .3*rng.normal(size=z.shape), v


def halves(n, seed=0):
    rows = np.random.default_rng(seed).permutation(n); cut = round(n/3)
    return rows[cut:], rows[:cut]


def information_plain(z, v, bins=20):
    b = [np.digitize(c, np.histogram(c, bins)[1][:-1]) - 1 for c in z.T]
    mi = np.array([[mutual_info_score(f, c) for c in b] for f in v.T])
    hv, hz = np.array([mutual_info_score(f, f) for f in v.T]), np.array([mutual_info_score(c, c) for c in b])
    two, sup = np.sort(mi, 1), np.sort(mi/hv[:, None], 0)
    best, mine = mi.argmax(1), mi.argmax(0)
    credit = np.sort(mi, 0)[-1] - np.sort(mi, 0)[-2]
    J = hv + hz[best] - mi.max(1) - two[:, -1] + two[:, -2]
    ratio = 1 - ((mi**2).sum(0) - mi.max(0)**2)/mi.max(0)**2/(len(mi) - 1)
    return [((two[:, -1] - two[:, -2])/hv).mean(), (sup[-1] - sup[-2]).mean(), (1 - J/(hv + np.log(bins))).mean(),
            sum(max(credit[mine == k], default=0) for k in range(len(mi)))/hv.sum(), ratio.mean()]


def information_ours(z, v):
    info = information(z, v)
    return [f(info).value for f in (mig, mig_sup, jemmig, dcimig, modularity)]


def votes_plain(z, v, L=64, train=10_000, test=5_000):
    rng, sd = np.random.default_rng(0), z.std(0, ddof=1)
    rows = [{u: np.flatnonzero(f == u) for u in np.unique(f)} for f in v.T]
    def ballot(n):
        tally = np.zeros((z.shape[1], v.shape[1]))
        for _ in range(n):
            k = rng.integers(v.shape[1]); same = rows[k][v[rng.integers(len(v)), k]]
            tally[(z[rng.choice(same, L)].var(0, ddof=1)/sd**2).argmin(), k] += 1
        return tally
    winner = ballot(train).argmax(1); fresh = ballot(test)
    return [fresh[np.arange(len(winner)), winner].sum()/test]


def sap_plain(z, v):
    a, b = halves(len(z)); score = np.zeros((v.shape[1], z.shape[1]))
    for k in range(v.shape[1]):
        for d in range(z.shape[1]):
            score[k, d] = LinearSVC(C=.01, class_weight='balanced').fit(z[a, d:d + 1], v[a, k]).score(z[b, d:d + 1], v[b, k])
    two = np.sort(score, 1)
    return [(two[:, -1] - two[:, -2]).mean()]


def explicitness_plain(z, v):
    a, b = halves(len(z)); mu, sd = z[a].mean(0), z[a].std(0); out = []
    for k in range(v.shape[1]):
        p = LogisticRegression(max_iter=1000, tol=1e-6).fit((z[a] - mu)/sd, v[a, k]).predict_proba((z[b] - mu)/sd)
        out.append(np.mean([roc_auc_score(v[b, k] == c, p[:, c]) for c in range(p.shape[1])]))
    return [np.mean(out)]


def dci_plain(z, v):
    a, b = halves(len(z)); R, I = [], []
    for k in range(v.shape[1]):
        model = GradientBoostingClassifier(random_state=0).fit(z[a], v[a, k])
        R.append(model.feature_importances_); I.append(model.score(z[b], v[b, k]))
    return [disentanglement(np.array(R)), completeness(np.array(R)), np.mean(I)]


def timed(f, *args):
    start = time.perf_counter(); out = f(*args)
    return time.perf_counter() - start, np.array(out, float)


def row(name, plain, ours, z, v, pairs):
    "Time both in turn, compare their values, print a line."
    if pairs > 1: ours(z, v)                                            # warm up
    both = [(timed(plain, z, v), timed(ours, z, v)) for _ in range(pairs)]
    slow, fast = (statistics.median(p[i][0] for p in both) for i in (0, 1))
    ratio, off = statistics.median(p[0][0]/p[1][0] for p in both), np.abs(both[-1][0][1] - both[-1][1][1])
    ok = ratio >= FLOOR[name] and off.max() <= WITHIN[name] and (name != 'DCI' or off[2] <= .01)
    print(f"{name:16} {1e3*slow:12.1f} {1e3*fast:10.1f} {ratio:8.1f} {FLOOR[name]:7g} {pairs:6} {off.max():12.2g} {WITHIN[name]:8g}  {'ok' if ok else 'BELOW THE FLOOR'}", flush=True)
    return dict(plain_ms=1e3*slow, ours_ms=1e3*fast, ratio=ratio, floor=FLOOR[name], pairs=pairs, differences=off.tolist(), ok=ok)


def resampling(z, v):
    "Seconds for 200 bootstrap draws and for 200 shuffles, all five scores."
    items, out = read_items(z, v), {}
    for name, f in dict(draws=bootstrap_information, shuffles=null_information).items():
        start = time.perf_counter(); info = f(items, 200); [m(info).value for m in (mig, mig_sup, jemmig, dcimig, modularity)]
        out[name] = time.perf_counter() - start
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs', type=int, default=7)
    p.add_argument('--dci-pairs', type=int, default=3, help='pairs for boosting, a minute or two each; 0 leaves it out')
    p.add_argument('--items', type=int, default=10_000)
    p.add_argument('--json', help='file to write the numbers to')
    args = p.parse_args(); warnings.filterwarnings('ignore')
    z, v = arrays(args.items, [4] + [10]*9); few = arrays(args.items, [4, 10, 10])
    print(f"{args.items} items, 10 codes, medians of interleaved pairs, one thread\n{'':16} {'plain, ms':>12} {'ours, ms':>10} {'ratio':>8} {'floor':>7} {'pairs':>6} {'difference':>12} {'allowed':>8}")
    rows = {'information': row('information', information_plain, information_ours, z, v, args.pairs),
            'FactorVAE score': row('FactorVAE score', votes_plain, lambda z, v: [factor_vae_score(z, v).value], z, v, args.pairs),
            'SAP': row('SAP', sap_plain, lambda z, v: [sap(z, v, by='svm').value], z, v, args.pairs),
            'explicitness': row('explicitness', explicitness_plain, lambda z, v: [explicitness(z, v).value], z, v, args.pairs)}
    if args.dci_pairs: rows['DCI'] = row('DCI', dci_plain, lambda z, v: list(dci(z, v).parts.values()), *few, args.dci_pairs)
    rows['resampling'] = resampling(z, v)
    ok = all(r.get('ok', True) for r in rows.values()) and max(rows['resampling'].values()) < BUDGET
    print(f"\n200 draws {rows['resampling']['draws']:.2f} s, 200 shuffles {rows['resampling']['shuffles']:.2f} s (bound {BUDGET:g} s each)\n{'ok' if ok else 'BELOW A FLOOR'}")
    if args.json:
        with open(args.json, 'w') as f: json.dump(rows, f, indent=1)
    return 0 if ok else 1


if __name__ == '__main__': sys.exit(main())

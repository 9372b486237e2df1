"Scores of the pattern benchmark: closed-form cases, codes that must pass and codes that must fail; alignment, sections, patterns."
import numpy as np
import pytest
import torch

from disentangle_nb.data.frames import contrast, draw_melody
from disentangle_nb.evaluation import patterns as P
from disentangle_nb.models.gated import GatedAutoencoder

constant = lambda x: torch.ones(len(x), 3)
frames = lambda x: x


def turned(encode, seed=0):
    "The same code in other coordinates."
    q = torch.linalg.qr(torch.randn(239, 239, generator=torch.Generator().manual_seed(seed)))[0]
    return lambda x: 3*encode(x) @ q


# --- codes nobody trained ---------------------------------------------------------------------------------------------------

def test_chroma_folds_octaves():
    for s in (5, 17, 29): assert P.chroma(draw_melody([s], 3))[0].argmax() == 5
    assert P.chroma(torch.rand(4, 110)).shape == (4, 12)  # an axis that isn't whole octaves
    a = P.chroma(draw_melody([5, 9], 12))
    assert P.best_turn(a[None], a.roll(4, 1)[None]).item() == pytest.approx(1., abs=1e-5)
    assert P.best_turn(a[None], P.chroma(draw_melody([9, 5], 12))[None]).item() < .9


def test_correlation_with_the_past_is_what_it_says():
    x = torch.rand(30, 20, generator=torch.Generator().manual_seed(1))
    z = P.cross_correlation(x, context=9)
    past = x[11:20].mean(0)
    by_hand = torch.tensor([sum(x[20, i]*past[i - k] for i in range(20) if 0 <= i - k < 20) for k in range(-19, 20)])
    assert z.shape == (30, 39) and torch.allclose(z[20], by_hand, atol=1e-5) and z[0].abs().max() < 1e-6


# --- invariance, retrieval, intervals -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def table():
    torch.manual_seed(1)
    return P.board({'untrained': GatedAutoencoder().eval()})


def test_a_constant_is_invariant_and_fails_everything():
    inv = P.invariance(constant, up=(1, 7))
    assert inv['transposed'] == pytest.approx(1.) and inv['random'] == pytest.approx(1.) and len(inv['curve']) == 2
    assert P.retrieval(constant)['top1'] == 0 and P.interval_knn(constant) <= 1/15 + 1e-6


def test_a_perfect_code_passes_and_absolute_pitch_does_not(table):
    s, raw = (table.loc[k, :'knn_noise'].to_dict() for k in ('cross-correlation', 'frames'))
    assert s['top1'] == s['top1_timbre'] == s['top1_noise'] == s['knn'] == s['knn_timbre'] == 1 and s['transposed'] > .95
    assert raw['top1'] <= .02 and raw['knn'] <= .1 and raw['gap'] < .1
    assert [k for k, v in P.passed(raw | dict(recon=.2, recon_spread=.05)).items() if v] == ['recon', 'recon_spread']
    assert not P.passed(s | dict(recon=.31, recon_spread=.11))['recon_spread'] and not P.passed(s | dict(recon=.31, recon_spread=.11))['recon']


def test_scores_ignore_the_coordinates_of_a_code(table):
    other, own = turned(P.cross_correlation), table.loc['cross-correlation']
    assert P.invariance(other)['gap'] == pytest.approx(own['gap'], abs=1e-3)
    assert P.retrieval(other, noise=P.NOISE)['top1'] == own['top1_noise'] and P.interval_knn(other, P.TIMBRE) == own['knn_timbre']


def test_the_benchmark_is_what_was_specified():
    for s, d in P.melodies(): assert s.shape == d.shape == (12,) and 10 <= s.min() and s.max() <= 21 and 8 <= d.min() and d.max() <= 19
    notes, keys = P.walks()
    assert notes.shape == (100, 8) and notes.min() >= 6 and notes.max() <= 26 and notes.diff(dim=1).abs().max() <= 4
    assert set(keys.tolist()) == set(range(-5, 8)) - {0}
    assert all(torch.equal(a, b) for a, b in zip(P.walks(seed=3), P.walks(seed=3))) and not torch.equal(P.walks(seed=3)[0], notes)
    lengths = []
    P.interval_knn(lambda x: lengths.append(x) or x)
    assert len(lengths) == 150 and all(len(x) == 28 for x in lengths)
    assert torch.equal(lengths[0], draw_melody([10, 3], 14)) and torch.equal(lengths[75], draw_melody([11, 4], 14))


def test_ties_count_against_retrieval():
    half = iter(range(1000))
    two = lambda x: torch.ones(len(x), 2) if next(half) % 2 else -torch.ones(len(x), 2)  # fifty alike
    assert P.retrieval(two)['top1'] == 0
    assert P.retrieval(P.cross_correlation) == dict(top1=1., mrr=1.)


def test_the_majority_decides_and_the_nearest_a_tie():
    z, y = torch.eye(4), torch.tensor([7, 8, 8, 9])
    assert P.nearest_vote(z, y, torch.tensor([[.9, .5, .4, 0.], [.9, .5, 0., .4]])).tolist() == [8, 7]


def test_probes_tell_what_a_code_holds():
    raw, lag = P.pitch_and_step(frames), P.pitch_and_step(P.cross_correlation)
    assert raw['pitch class']['acc'] > .9 and raw['step']['acc'] < .2 and lag['step']['acc'] > .95
    assert lag['pitch class']['acc'] < raw['pitch class']['acc'] - .4 and .05 < raw['step']['chance'] < .15


def test_an_untrained_model_fails_all_but_the_raw_cosine(table):
    s = table.loc['untrained'].to_dict()
    assert s['transposed'] > .99 and not any(v for k, v in P.passed(s).items() if k != 'recon_spread')
    assert list(table.index) == ['untrained', 'frames', 'chroma', 'cross-correlation', 'chroma, best turn'] and table.top1['chroma, best turn'] > .95


class Knows(torch.nn.Module):
    "Its code is the step of the frames to come in full, so that it imagines perfectly, in one key or all."
    def __init__(self, moves):
        super().__init__()
        self.w, self.moves = torch.nn.Parameter(torch.zeros(1)), moves
    def encode(self, x): self.x = x; return dict(interval=x, context=x)
    def decode(self, interval, context): return context if self.moves else interval


def test_reconstruction_is_asked_for_in_other_keys():
    good, stuck = P.moved_reconstruction(Knows(True)), P.moved_reconstruction(Knows(False))
    assert list(good) == [0, 4, 10, 24] and max(good.values()) < 1e-9
    assert stuck[0] < 1e-9 and min(stuck[k] for k in (4, 10, 24)) > .5


# --- two clips ----------------------------------------------------------------------------------------------------------------

def test_alignment_finds_onsets_in_another_key_and_tempo():
    notes, d = [12, 16, 19, 17, 14, 12, 9, 12], torch.tensor([12, 8, 16, 12, 10, 14, 12, 12])
    a, b = draw_melody(notes, 12), draw_melody([s + 5 for s in notes], d)
    path, cost = P.align(P.cross_correlation(a), P.cross_correlation(b))
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [95, 95] and path.diff(dim=0).min() >= 0 and cost < .1
    assert (P.carried(path, [12*i for i in range(1, 8)]) - d.cumsum(0)[:-1]).abs().max() <= 2
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    same, none = P.align(z, 2*z)
    assert torch.equal(same[:, 0], same[:, 1]) and none < 1e-6
    part, _ = P.align(P.cross_correlation(a)[36:72], P.cross_correlation(b), subsequence=True)
    assert abs(part[0, 1] - 36) <= 4 and abs(part[-1, 1] - 71) <= 4


def test_melodies_are_found_at_another_tempo():
    assert P.tempo_retrieval(P.cross_correlation, n=8) == 1. and P.tempo_retrieval(frames, n=8) < .6


@pytest.mark.parametrize('up', [-7, 0, 3])
def test_the_key_with_the_least_error_is_the_transposition(up):
    notes = [12, 16, 19, 17, 14, 12]
    a, b = draw_melody(notes, 12), draw_melody([s + up for s in notes], 12)
    best, error = P.transposition(Knows(True), a, b)
    assert best == 2*up and error.shape == (49,) and error.argmin() == 24 + 2*up
    with pytest.raises(ValueError, match='more than 10 frames'): P.transposition(Knows(True), a[:9], b[:9])


# --- sections -----------------------------------------------------------------------------------------------------------------

def literal_walk(d, th):
    "As it is told: from a cell, as long as the weighted mean of the last ten stays above."
    out = []
    for s in range(len(d)):
        m = 0
        while s + m < len(d):
            last = d[max(s, s + m - 9):s + m + 1]
            w = np.arange(1, len(last) + 1)
            if (last*w).sum()/w.sum() <= th: break
            m += 1
        out.append(m)
    return out


def literal_segments(S, least, th):
    "As it is told: every pair of frames in reading order, a band of seven diagonals cleared after each find."
    S, found = S.copy(), []
    n = len(S)
    for i in range(n):
        for j in range(i + 1, n):
            m = literal_walk(S.diagonal(j - i)[i:], th)[0]
            if m >= least:
                found.append((i, i + m, j, j + m))
                for t in range(m):
                    for d in range(-3, 4):
                        if 0 <= j + t + d < n: S[i + t, j + t + d] = 0
    return found


@pytest.mark.parametrize('n', [1, 5, 9, 10, 11, 40])
def test_walks_are_as_long_as_told(n):
    for seed in range(20):
        d = np.random.default_rng(seed).normal(.3, 1, n)
        for th in (-.5, .1, .4): assert P.walk_lengths(d, th).tolist() == literal_walk(d, th)


def test_segments_are_those_of_the_literal_search():
    rng = np.random.default_rng(0)
    for _ in range(3):
        S = rng.normal(0, .3, (45, 45))
        for i, j, m in ((2, 20, 14), (5, 30, 13), (18, 30, 12), (3, 24, 16)): S[range(i, i + m), range(j, j + m)] += 1.
        found = P.segments(S, 11, .3)
        assert found == literal_segments(S, 11, .3) and len(found) >= 3
    assert P.segments(np.zeros((20, 20)), 30) == []


def test_the_threshold_falls_until_something_is_found():
    S = np.full((40, 40), -.5)
    S[range(5, 20), range(20, 35)] = .003
    assert P.segments(S, 12)[0] == (5, 20, 20, 35)


def test_sections_come_back_in_any_key():
    g = torch.Generator().manual_seed(5)
    A, B = (torch.randint(10, 22, (10,), generator=g) for _ in range(2))
    piece = draw_melody(torch.cat([A, B, A + 5, B]), 12, noise=.05)
    found, seen = (P.segments(P.self_similarity(e(piece)), 80, .2) for e in (P.cross_correlation, frames))
    assert any(abs(s[0]) < 12 and abs(s[2] - 240) < 14 for s in found) and any(abs(s[0] - 120) < 14 and abs(s[2] - 360) < 14 for s in found)
    assert seen and all(90 < s[0] < 150 for s in seen)


def test_likeness_is_nothing_near_the_diagonal_and_large_at_repeats():
    x = contrast(torch.rand(40, 120, generator=torch.Generator().manual_seed(0)))
    S = P.self_similarity(torch.cat([x, x]))
    assert S.shape == (89, 89) and np.median(S) == pytest.approx(0, abs=1e-9)
    assert S[10, 50] > .5 and S[20, 20] < .1
    c = torch.rand(20, 12, generator=torch.Generator().manual_seed(1))
    turn = P.turning_similarity(torch.cat([c, c.roll(3, 1)]), smooth=1)
    assert turn.min() >= 0 and turn.max() == pytest.approx(1.) and turn[range(20), range(20, 40)].min() > .999 and turn[0, 1:20].max() < .9
    steady = P.turning_similarity(torch.cat([c[:1].repeat(20, 1), 5*c[1:2], c[:1].repeat(20, 1)]))
    assert steady.min() == 1.  # the median filter removes what lasts one frame


def test_patterns_gather_what_begins_and_ends_alike():
    segs = [(0, 50, 100, 150), (2, 49, 200, 247), (2, 60, 300, 358), (60, 90, 160, 190)]
    assert P.patterns(segs, 3) == [[(0, 50), (100, 150), (200, 247)], [(2, 60), (300, 358)], [(60, 90), (160, 190)]]
    notes = [(0., 60), (1/3, 62), (1., 64), (4., 65), (4.5, 67)]
    found = P.pattern_notes([[(0, 10), (40, 50)], [(0, 10), (90, 99)]], notes, .1)
    assert found == [[[(0., 60), (1/3, 62)], [(4., 65), (4.5, 67)]]]  # triplets stay; an empty occurrence goes, and its pattern
    assert P.pattern_text(found).splitlines()[:4] == ['pattern1', 'occurrence1', '0.00000, 60.00000', '0.33333, 62.00000'] and P.pattern_text([]) == ''


def test_measures_of_patterns():
    pytest.importorskip('mir_eval')
    a = [[[(0., 60), (1., 62)], [(4., 65), (5., 67)]]]
    assert all(v[0] == pytest.approx(1.) for v in P.pattern_scores(a, a).values())

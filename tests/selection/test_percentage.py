"""Learning percentage and subsets against plain float64 references."""

import warnings

import numpy as np
import pytest
import torch

from lightning_itk.selection import (
    approximate_learning_percentage,
    describe,
    instruction_following_difficulty,
    learning_percentage,
    sample_scores,
    select,
    thirds,
)

FRACTIONS = (0.001, 0.01, 0.15, 0.4, 0.7, 1.0)


def reference_select(scores, fraction, clusters=None, order="lowest", seed=0):
    """One cluster after the other, in plain Python: the quotas that `select` must give and what fills them."""
    clusters = np.zeros(len(scores), int) if clusters is None else np.asarray(clusters)
    defined = [i for i in range(len(scores)) if not np.isnan(scores[i])]
    count = round(fraction * len(defined))
    sign = -1 if order == "highest" else 1
    ranked = np.random.default_rng(seed).random(len(scores)) if order == "random" else sign * np.asarray(scores)
    members = {
        c: sorted((i for i in defined if clusters[i] == c), key=lambda i: (ranked[i], i)) for c in np.unique(clusters)
    }
    quotas, remainders = {}, {}
    for c, m in members.items():
        quotas[c], remainders[c] = divmod(count * len(m), max(len(defined), 1))
    waiting = [c for c in members if remainders[c]]
    waiting.sort(key=lambda c: ranked[members[c][len(members[c]) // 2 if order == "middle" else quotas[c]]])
    if order == "middle":
        places = sorted(range(len(waiting)), key=lambda place: abs(place - (len(waiting) - 1) / 2))
        waiting = [waiting[place] for place in places]
    waiting.sort(key=lambda c: -remainders[c])
    for c in waiting[: count - sum(quotas.values())]:
        quotas[c] += 1
    cut = {c: (len(m) - quotas[c]) // 2 if order == "middle" else 0 for c, m in members.items()}
    return sorted(i for c, m in members.items() for i in m[cut[c] : cut[c] + quotas[c]])


def test_learning_percentage_is_the_papers_formula():
    losses = np.random.default_rng(0).uniform(0, 5, (4, 301))
    before, first, _, last = np.exp(losses)
    np.testing.assert_allclose(learning_percentage(losses), (before - first) / (before - last), rtol=1e-9)
    np.testing.assert_allclose(approximate_learning_percentage(losses), (before - first) / before, rtol=1e-11)


def test_learning_percentage_where_perplexity_overflows():
    losses = np.array([[900.0, 2000, 1, 1, 3], [2.0, 1999, 800, 800, 3], [1.0, 1990, 700, 801, 2]])
    expected = [1.0, -np.expm1(-1) / -np.expm1(-10), np.exp(100), np.exp(-1), 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(learning_percentage(losses), expected, rtol=1e-12)


def test_small_drops_keep_their_digits():
    drop = 1e-13
    losses = np.array([[2.0], [2.0 - drop], [2.0 - 2 * drop]])
    exact = (losses[0] - losses[1]) / (losses[0] - losses[2])
    np.testing.assert_allclose(learning_percentage(losses), exact, rtol=1e-12)


def test_undefined_is_nan():
    losses = np.array([[2.0, 0, np.nan, 2], [1.0, 0, 1, 1], [1.0, 0, 1, 2]])
    np.testing.assert_array_equal(np.isnan(learning_percentage(losses)), [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(approximate_learning_percentage(losses)), [False, False, True, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_come_back_as_tensors(dtype):
    losses = torch.rand(4, 7, dtype=torch.float64).to(dtype)
    lp = learning_percentage(losses)
    assert isinstance(lp, torch.Tensor)
    assert lp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(lp.numpy(), learning_percentage(losses.double().numpy()), rtol=1e-5)
    chosen = select(lp, 0.5)
    assert isinstance(chosen, torch.Tensor)
    assert chosen.dtype == torch.int64


@pytest.mark.parametrize("function", [learning_percentage, approximate_learning_percentage])
def test_losses_are_checked(function):
    with pytest.raises(ValueError, match=r"\[epochs \+ 1 >= 2, samples\], found shape \(3,\)"):
        function(np.zeros(3))
    with pytest.raises(ValueError, match=r"found inf at \[1, 2\]"):
        function(np.array([[1.0, 1, 1], [1, 1, np.inf]]))


def test_ifd():
    np.testing.assert_allclose(instruction_following_difficulty([1.0, 2, np.nan], [2.0, 0, 1]), [0.5, np.nan, np.nan])
    with pytest.raises(ValueError, match="shapes"):
        instruction_following_difficulty([1.0], [1.0, 2])


def test_sample_scores_per_metric():
    losses = np.array([[3.0, 2, 1], [1.0, 1, 0], [0.5, 1, 0]])
    tokens = np.array([5, 2, 0])
    np.testing.assert_allclose(sample_scores("loss", losses, tokens), [3, 2, np.nan])
    np.testing.assert_allclose(sample_scores("length", losses, tokens), [5, 2, np.nan])
    np.testing.assert_allclose(sample_scores("lp", losses), learning_percentage(losses))
    np.testing.assert_allclose(sample_scores("lp_app", losses)[:2], approximate_learning_percentage(losses)[:2])
    with pytest.raises(ValueError, match="unknown metric 'lpp', expected one of lp_app, lp, loss, length"):
        sample_scores("lpp", losses)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lp needs losses"):
        sample_scores("lp", losses[:2])
    with pytest.raises(ValueError, match="tokens must have one entry"):
        sample_scores("length", losses)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("order", ["lowest", "highest", "middle", "random"])
@pytest.mark.parametrize("kinds", [None, 1, 300, 5000])
def test_counts_are_exact_and_shares_proportional(fraction, order, kinds):
    random = np.random.default_rng(1)
    scores = random.normal(size=2003).astype(np.float32)
    scores[random.random(2003) < 0.04] = np.nan
    clusters = None if kinds is None else random.integers(0, kinds, 2003)
    chosen = select(scores, fraction, clusters=clusters, order=order, seed=3)
    defined = ~np.isnan(scores)
    assert len(chosen) == round(fraction * defined.sum())
    assert chosen.dtype == np.int64
    assert np.all(np.diff(chosen) > 0)
    assert not np.isnan(scores[chosen]).any()
    if clusters is not None:
        sizes = np.bincount(clusters[defined], minlength=kinds)
        taken = np.bincount(clusters[chosen], minlength=kinds)
        assert np.all(taken <= sizes)
        assert np.all(np.abs(taken - len(chosen) * sizes / defined.sum()) < 1)


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.4, 1 / 3, 1.0])
@pytest.mark.parametrize(
    ("order", "kinds"),
    [("middle", None), ("middle", 1), *((order, k) for order in ("lowest", "highest") for k in (None, 1, 7, 90))],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_select_equals_plain_python(fraction, order, kinds, coarse):
    random = np.random.default_rng(2)
    scores = random.normal(size=401)
    if coarse:
        scores = np.round(scores)
    scores[random.random(401) < 0.1] = np.nan
    clusters = None if kinds is None else random.integers(0, kinds, 401)
    chosen = select(scores, fraction, clusters=clusters, order=order)
    assert chosen.tolist() == reference_select(scores, fraction, clusters, order)


@pytest.mark.parametrize("order", ["lowest", "highest", "middle", "random"])
def test_many_small_selections_equal_plain_python(order):
    random = np.random.default_rng(6)
    for seed in range(400):
        samples = random.integers(1, 60)
        tied, close = random.integers(-2, 3, samples) * 0.5, 1 + random.integers(0, 30, samples) * 1e-12
        scores = (random.normal(size=samples), tied, tied * 0, close)[seed % 4]
        scores = scores.astype(random.choice([np.float32, np.float64]))
        scores[random.random(samples) < random.choice([0, 0.1, 0.5])] = random.choice([np.nan, -np.nan])
        numbers = np.minimum(random.geometric(random.choice([0.05, 0.5]), samples), 40)
        clusters = (None, numbers, numbers.astype(str), numbers * 10**12 - 7, (numbers + 90).astype(np.int8))[seed % 5]
        fraction = random.choice([1e-9, 0.05, 0.15, 1 / 3, 0.5, 0.9, 1])
        chosen = select(scores, fraction, clusters=clusters, order=order, seed=seed)
        assert chosen.tolist() == reference_select(scores, fraction, clusters, order, seed), (seed, scores, clusters)


def test_middle_is_centred_in_each_cluster():
    scores = np.random.default_rng(0).normal(size=700)
    clusters = np.arange(700) % 7
    chosen = select(scores, 0.4, clusters=clusters, order="middle")
    for cluster in range(7):
        ranks = np.searchsorted(np.sort(scores[clusters == cluster]), scores[chosen[clusters[chosen] == cluster]])
        assert sorted(ranks) == list(range(30, 70))


def test_one_sample_per_cluster_is_the_global_ranking():
    scores = np.random.default_rng(0).normal(size=101)
    clusters = np.random.default_rng(1).permutation(101)
    for order in ("lowest", "highest", "middle"):
        expected = select(scores, 0.2, order=order)
        np.testing.assert_array_equal(select(scores, 0.2, clusters=clusters, order=order), expected)


def test_full_precision_decides_what_float32_cannot():
    scores = 1 + np.random.default_rng(0).permutation(1000) * 1e-12
    np.testing.assert_array_equal(select(scores, 0.1), np.sort(np.argsort(scores)[:100]))
    clusters = np.arange(1000) % 2
    chosen = select(scores, 0.1, clusters=clusters)
    assert chosen.tolist() == reference_select(scores, 0.1, clusters)
    huge = np.array([1e300, 2e300, -1e300, 0.0, -0.0])
    assert select(huge, 0.8).tolist() == [0, 2, 3, 4]
    assert select(huge, 0.4).tolist() == [2, 3]


def test_equal_scores_are_taken_in_index_order():
    scores = np.array([-0.0, 0.0, 0.0, -0.0, 1])
    assert select(scores, 0.6).tolist() == [0, 1, 2]
    assert select(scores, 0.6, order="highest").tolist() == [0, 1, 4]


def test_random_is_seeded_and_blind_to_scores():
    scores = np.arange(1000.0)
    first = select(scores, 0.1, order="random", seed=1)
    np.testing.assert_array_equal(first, select(scores[::-1].copy(), 0.1, order="random", seed=1))
    assert not np.array_equal(first, select(scores, 0.1, order="random", seed=2))
    hits = sum(np.bincount(select(scores, 0.1, order="random", seed=s), minlength=1000) for s in range(200))
    assert 18 < hits[:500].mean() < 22


@pytest.mark.parametrize(
    "labels",
    [
        np.array(list("abba") * 5),
        np.array([-7, 10**12] * 10),
        np.arange(20, dtype=np.int8) % 3 - 100,
        np.array([-128, 127] * 10, np.int8),
        np.array([2**64 - 3, 2**64 - 1] * 10, np.uint64),
    ],
)
def test_any_labels_serve_as_clusters(labels):
    scores = np.random.default_rng(0).normal(size=20)
    compact = np.unique(labels, return_inverse=True)[1]
    np.testing.assert_array_equal(select(scores, 0.4, clusters=labels), select(scores, 0.4, clusters=compact))


def test_whole_number_scores():
    lengths = np.array([3, 1, 2, 9], np.uint8)
    assert select(lengths, 0.5, order="highest").tolist() == [0, 3]


def test_nothing_to_choose_from():
    assert select(np.full(5, np.nan), 0.5).tolist() == []
    assert select(np.empty(0), 0.5, clusters=np.empty(0, int)).tolist() == []
    assert select(np.arange(100.0), 0.001, clusters=np.arange(100)).tolist() == []


@pytest.mark.parametrize("kinds", [None, 1, 30, 1000])
def test_thirds_are_disjoint_ordered_and_complete(kinds):
    random = np.random.default_rng(5)
    scores = random.normal(size=500)
    scores[::50] = np.nan
    clusters = None if kinds is None else random.integers(0, kinds, 500)
    low, middle, high = thirds(scores, clusters)
    assert sorted(np.concatenate([low, middle, high])) == np.flatnonzero(~np.isnan(scores)).tolist()
    assert (len(low), len(middle), len(high)) == (163, 164, 163)
    if kinds in (None, 1):
        assert scores[low].max() < scores[middle].min() < scores[middle].max() < scores[high].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, found 0.0"),
        ({"fraction": 1.01}, "found 1.01"),
        ({"fraction": float("nan")}, "found nan"),
        ({"order": "best"}, "unknown order 'best', expected one of lowest, highest, middle, random"),
        ({"scores": np.array([1, np.inf, 2])}, "found inf at sample 1"),
        ({"scores": np.zeros((2, 2))}, r"one number per sample, found shape \(2, 2\)"),
        ({"clusters": np.zeros(2, int)}, r"one label per sample: found shape \(2,\), expected \(3,\)"),
        ({"clusters": np.zeros(3)}, "whole numbers or strings, found float64"),
    ],
)
def test_refusals(arguments, message):
    call = {"scores": np.arange(3.0), "fraction": 0.5, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        select(call.pop("scores"), call.pop("fraction"), **call)
    assert "\n" not in str(error.value)


def test_describe():
    scores = np.array([np.nan, 0.1, 0.2, 0.3, 0.4, np.nan])
    tokens = np.array([0, 40, 10, 30, 20, 5])
    assert describe(scores, tokens, select(scores, 0.5)) == {
        "samples": 6,
        "defined": 4,
        "dropped": 2,
        "without_response": 1,
        "selected": 2,
        "mean_tokens": 25,
        "mean_tokens_all": 25,
        "lowest": 0.1,
        "highest": 0.2,
        "overlap_random": pytest.approx(0.5, abs=0.5),
        "overlap_longest": 0.5,
    }
    assert describe(scores, tokens, [])["selected"] == 0

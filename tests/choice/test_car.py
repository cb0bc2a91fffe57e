"""CAR, its checks, and a ranking whose intervals hold what they promise."""

import numpy as np
import pytest
import torch

from lightning_itk.choice import (
    TeacherResponses,
    car,
    compatibility_adjusted_reward,
    rank_teachers,
    shift_rewards,
    shift_warning,
)


def teacher(reward, loss, tokens=None, rank=None):
    return TeacherResponses(reward, loss, np.full(len(reward), 10) if tokens is None else tokens, rank)


def test_car_is_the_papers_formula():
    assert compatibility_adjusted_reward(2.0, 0.5, beta=3.0) == pytest.approx(2 / 2.5)
    assert compatibility_adjusted_reward(2, 1) == pytest.approx(0.5)
    assert isinstance(compatibility_adjusted_reward(2, 1), float)
    reward, loss = np.array([1.0, 0, 3]), np.array([0.0, 1, 2])
    np.testing.assert_allclose(compatibility_adjusted_reward(reward, loss), [1, 0, 3 / 7])
    car = compatibility_adjusted_reward(torch.tensor(reward), torch.tensor(loss))
    torch.testing.assert_close(car, torch.tensor([1, 0, 3 / 7], dtype=torch.float64))
    np.testing.assert_allclose(compatibility_adjusted_reward(reward, loss, beta=0), reward)
    np.testing.assert_allclose(compatibility_adjusted_reward([1.0], [1.0]), [0.25])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 1.0), "rewards must be at least 0, found -0.1: shift them first"),
        ((np.array([1, -2.0]), np.ones(2)), "found -2"),
        ((1.0, -1.0), "losses must be at least 0, found -1"),
        ((1.0, float("nan")), "loss must be finite, found nan"),
        ((float("inf"), 1.0), "reward must be finite, found inf"),
        ((1.0, 1.0, -3.0), "beta must be a number of at least 0, found -3.0"),
        ((1.0, 1.0, float("nan")), "beta must be"),
        ((np.ones(2), np.ones(3)), r"one shape, found \(2,\) and \(3,\)"),
    ],
)
def test_car_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        compatibility_adjusted_reward(*arguments)


def test_shifting_is_the_same_for_all_teachers():
    rewards = {"a": [-3.0, 1, np.nan], "b": [-1.0, 2, 0]}  # means -1 and 1/3
    shifted = shift_rewards(rewards)
    np.testing.assert_allclose(shifted["a"], [-2, 2, np.nan])
    np.testing.assert_allclose(shifted["b"], [0, 3, 1])
    np.testing.assert_allclose(shift_rewards(rewards, 10)["b"], [9, 12, 10])
    np.testing.assert_allclose(shift_rewards({"a": [-1.0, 3], "b": [np.nan, np.nan]})["a"], [-1, 3])
    with pytest.raises(ValueError, match="teacher 'b': the reward of prompt 1 is infinite"):
        shift_rewards({"a": [1.0, 2], "b": [0.0, -np.inf]})


def noisy(reward: float, loss: float, seed: int) -> TeacherResponses:
    random = np.random.default_rng(seed)
    return teacher(random.normal(reward, 0.5, 500), np.abs(random.normal(loss, 0.1, 500)))


def test_one_outlier_does_not_choose_the_teacher():
    right, wrong = noisy(5, 1, seed=0), noisy(1, 0.2, seed=1)  # CAR 1.25 and 0.62
    np.put(right.reward, 7, -40)
    ranking = rank_teachers({"wrong": wrong, "right": right}, shift="auto")
    assert [row.teacher for row in ranking] == ["right", "wrong"]
    assert ranking[0].best > 0.99
    assert ranking[0].shift == 0
    assert shift_warning(ranking) is None
    # What used to be: everything moved by the lowest reward, and the loss alone decided.
    inverted = rank_teachers({"wrong": wrong, "right": right}, shift=40)
    assert inverted[0].teacher == "wrong"
    assert shift_warning(inverted) == "the shift of 40 decides the ranking: without it CAR ranks right, wrong"


def test_auto_brings_the_lowest_mean_to_zero_in_every_resampling():
    teachers = {"low": noisy(-2, 1, 0), "far": noisy(2, 6, 1), "near": noisy(1, 0.2, 2)}
    ranking = rank_teachers(teachers, shift="auto")
    assert [row.teacher for row in ranking] == ["near", "far", "low"]
    shift = -np.mean(teachers["low"].reward)
    assert ranking[0].shift == pytest.approx(shift)
    assert ranking[0].reward == pytest.approx(np.mean(teachers["near"].reward) + shift)
    low = ranking[2]
    assert (low.reward, low.car, low.interval, low.best) == (0, 0, (0, 0), 0)  # of a fixed shift it would be 0 ± 0.01
    assert ranking[0].unshifted_car is None
    assert shift_warning(ranking) == (
        f"the shift of {shift:.4g} decides the ranking: without it CAR is not defined for negative means, "
        "and the mean reward alone ranks far, near, low"
    )
    two = rank_teachers({name: teachers[name] for name in ("low", "far")}, shift="auto")
    assert shift_warning(two) is None  # the lowest is at 0 whatever its loss: two teachers stand by mean reward


def test_a_shift_that_turns_nothing_is_not_warned_of():
    ranking = rank_teachers({"a": noisy(5, 1, 0), "b": noisy(1, 1, 1)}, shift=3)
    assert ranking[0].shift == 3
    assert ranking[0].unshifted_car == pytest.approx((ranking[0].reward - 3) / (1 + 3 * ranking[0].loss))
    assert shift_warning(ranking) is None
    equal = rank_teachers({"a": noisy(0.1, 1, 0), "b": noisy(0.1, 1, 0)}, shift=0.7, negative="allow")
    assert shift_warning(equal) is None


def test_ranking_shows_car_beside_its_rivals():
    random = np.random.default_rng(0)
    prompt = random.normal(size=400)  # what is hard is hard for every teacher

    def responses(reward, loss):
        noise = random.normal(size=(2, 400)) * 0.1
        return teacher(reward + prompt + 5 + noise[0], loss + 0.3 * prompt + 2 + noise[1], rank=np.full(400, 7.0))

    ranking = rank_teachers(
        {"far": responses(2, 6), "near": responses(1, 0), "twin": responses(1, 0), "weak": responses(0, 0)}
    )
    assert [row.teacher for row in ranking][2:] == ["weak", "far"]
    assert {row.teacher for row in ranking[:2]} == {"near", "twin"}
    near, twin, weak, far = ranking
    assert near.tied_with == (twin.teacher,)
    assert twin.tied_with == (near.teacher,)
    assert weak.tied_with == far.tied_with == ()
    assert near.best + twin.best == pytest.approx(1)
    assert far.reward == max(row.reward for row in ranking)
    assert near.car == pytest.approx(near.reward / (1 + 3 * near.loss))
    assert near.interval[0] < near.car < near.interval[1]
    assert near.rsr == pytest.approx(7 / near.loss)
    assert (near.length, near.prompts) == (10, 400)


def test_bootstrap_is_paired():
    random = np.random.default_rng(1)
    reward, loss = random.normal(size=300) + 6, random.random(300) + 1
    better = rank_teachers({"a": teacher(reward, loss), "b": teacher(reward + 0.01, loss)})
    assert better[0].teacher == "b"
    assert better[0].best == 1
    assert better[0].tied_with == ()
    assert better[0].interval[0] < better[1].car  # alone, the intervals overlap
    equal = rank_teachers({"a": teacher(reward, loss), "b": teacher(reward, loss)})
    assert [row.tied_with for row in equal] == [("b",), ("a",)]
    assert [row.best for row in equal] == [0.5, 0.5]


def test_interval_covers_the_truth():
    truth, hits = 5 / (1 + 3 * 2), 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        row = rank_teachers(
            {"a": teacher(random.normal(5, 1, 200), random.exponential(2, 200))}, resamples=400, seed=seed
        )[0]
        hits += row.interval[0] <= truth <= row.interval[1]
    assert hits >= 88


def test_resampling_in_blocks(monkeypatch):
    random = np.random.default_rng(2)
    candidates = {name: teacher(random.random(50), random.random(50)) for name in "abc"}
    whole = rank_teachers(candidates, resamples=100, seed=4)
    monkeypatch.setattr(car, "_BLOCK", 7 * 50)
    assert rank_teachers(candidates, resamples=100, seed=4) == whole


def test_missing_responses():
    reward, loss, tokens = np.arange(4.0), np.ones(4), np.full(4, 5)
    holes = teacher([1, np.nan, 1, 1], [1, 1, 1, 1], [3, 3, 3, 0])
    with pytest.raises(ValueError, match="teacher 'b' lacks 2 of 4 responses, the first at prompt 1"):
        rank_teachers({"a": teacher(reward, loss, tokens), "b": holes})
    ranking = rank_teachers({"a": teacher(reward, loss, tokens), "b": holes}, missing="drop")
    assert {row.teacher: row.reward for row in ranking} == {"a": 1.0, "b": 1.0}
    assert ranking[0].prompts == 2
    nothing = teacher(np.full(4, np.nan), loss)
    with pytest.raises(ValueError, match="no prompt is answered by every teacher"):
        rank_teachers({"a": teacher(reward, loss), "b": nothing}, missing="drop", shift="auto")


def test_negative_rewards_need_a_word():
    low = {"a": teacher([-1.0, 3], [1.0, 1]), "b": teacher([1.0, 1], [2.0, 2])}
    with pytest.raises(ValueError, match="teacher 'a' has a negative reward .-1., with which a higher loss raises CAR"):
        rank_teachers(low)
    assert rank_teachers(low, shift="auto")[0].reward == 1
    assert rank_teachers(low, shift=1.0)[0].reward == 2
    assert rank_teachers(low, negative="allow")[0].reward == 1
    with pytest.raises(ValueError, match="negative mean reward"):
        rank_teachers({"a": teacher([-2.0, 1], [1.0, 1])}, negative="allow")


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({}, "ranking needs teachers"),
        ({"a": teacher([1.0], [1.0]), "b": teacher([1.0, 2], [1.0, 1])}, "same prompts, found {'a': 1, 'b': 2}"),
        ({"a": teacher([1.0, 2], [1.0])}, r"teacher 'a': loss has shape \(1,\), expected \(2,\)"),
        ({"a": teacher([1.0, 2], [1.0, -1])}, "teacher 'a': loss of prompt 1 is -1.0"),
        ({"a": teacher([1.0, 2], [np.inf, 1])}, "teacher 'a': loss of prompt 0 is inf"),
        ({"a": teacher([1.0, np.inf], [1.0, 1])}, "teacher 'a': the reward of prompt 1 is infinite"),
    ],
)
def test_ranking_refuses(teachers, message):
    with pytest.raises(ValueError, match=message) as error:
        rank_teachers(teachers)
    assert "\n" not in str(error.value)

"""Which teacher for which student: the compatibility-adjusted reward (CAR) with its rivals beside it.

The strongest model is not always the best teacher (arXiv 2411.07133): its answers may be out of the student's reach.
CAR divides the reward of a teacher's answers by how surprising they are to the untuned student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_itk.choice.statistics import rank_surprisal_ratio
from lightning_itk.metrics import compatibility_adjusted_reward

_BLOCK = 1 << 24  # elements of one temporary


def shift_rewards(rewards: Mapping[str, ArrayLike], shift: float | None = None) -> dict[str, NDArray[np.float64]]:
    """Add one constant to the rewards of all teachers, so that CAR's formula holds. The ranking depends on it.

    Args:
        rewards: per teacher [samples]; nan = missing.
        shift: what to add; None = what brings the lowest mean reward of a teacher to 0 (nothing if none is negative).
            CAR is made of means, so single rewards may stay negative: of them, one outlier would decide.

    Raises:
        ValueError: an infinite reward.
    """
    arrays = {teacher: np.asarray(values, np.float64) for teacher, values in rewards.items()}
    for teacher, values in arrays.items():
        if np.isinf(values).any():
            raise ValueError(f"teacher {teacher!r}: the reward of prompt {int(np.isinf(values).argmax())} is infinite")
    if shift is None:
        means = [float(np.nanmean(values)) for values in arrays.values() if not np.isnan(values).all()]
        shift = max([0.0, *(-mean for mean in means)])
    return {teacher: values + shift for teacher, values in arrays.items()}


@dataclass(frozen=True)
class TeacherResponses:
    """One teacher's responses to the common prompts, as the student and the reward model see them; all [prompts]."""

    reward: ArrayLike  # reward of each response; nan = no response
    loss: ArrayLike  # mean response NLL under the untuned student, nats; nan = no response token
    tokens: ArrayLike  # response tokens
    rank: ArrayLike | None = None  # mean of min(rank, 100); None = no RSR


@dataclass(frozen=True)
class TeacherRank:
    """One row of the ranking: CAR, its parts and its rivals, over the common prompts."""

    teacher: str
    car: float
    interval: tuple[float, float]  # of CAR, paired bootstrap
    best: float  # share of the resamplings in which this teacher has the highest CAR
    tied_with: tuple[str, ...]  # teachers whose CAR differs by an interval that holds 0
    reward: float
    loss: float
    length: float  # mean response tokens
    rsr: float | None  # lower is better
    prompts: int
    shift: float = 0.0  # what was added to the rewards; `reward` holds it
    unshifted_car: float | None = None  # CAR without it; None where a teacher's mean reward is then negative


def rank_teachers(
    teachers: Mapping[str, TeacherResponses],
    *,
    beta: float = 3.0,
    shift: float | Literal["auto"] = 0.0,
    negative: Literal["refuse", "allow"] = "refuse",
    missing: Literal["refuse", "drop"] = "refuse",
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> list[TeacherRank]:
    """Rank candidate teachers for one student by CAR, with a paired bootstrap over the prompts.

    All teachers are resampled with the same prompts, so what makes a prompt hard for everyone cancels out of their
    differences. Intervals are percentiles and are not corrected for the number of pairs.

    CAR is a ratio, so its ranking depends on where rewards have their 0: a large shift makes all of them alike, and the
    loss alone decides. Under auto the teacher of the lowest mean reward has CAR 0 whatever its loss, in every
    resampling; the others stand by (r - lowest r) / (1 + beta L), and two teachers by their mean reward. See
    `shift_warning`.

    Args:
        teachers: name -> responses to the same prompts, in the same order.
        beta: of CAR.
        shift: added to every reward of every teacher; auto = what brings the lowest mean reward of a teacher to 0
            (nothing if no mean is negative), in each resampling anew. Single rewards may then be negative.
        negative: allow = take single negative rewards as long as every teacher's mean is at least 0.
        missing: drop = rank on the prompts that every teacher answered.
        resamples: bootstrap resamplings.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        Teachers by falling CAR.

    Raises:
        ValueError: no teacher, unequal prompts, missing responses, negative rewards, undefined or infinite numbers.
    """
    if not teachers or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"ranking needs teachers, resamples of at least 1 and a level within (0, 1), "
            f"found {len(teachers)}, {resamples} and {level}"
        )
    names = list(teachers)
    rewards = shift_rewards({name: responses.reward for name, responses in teachers.items()}, 0)
    columns = [_columns(name, teachers[name], rewards[name]) for name in names]
    lengths = {name: column.shape[1] for name, column in zip(names, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"teachers must answer the same prompts, found {lengths}")
    table = np.stack(columns)  # [teachers, (reward, loss, tokens, rank), prompts]
    absent = np.isnan(table[:, :3]).any(1) | (table[:, 2] == 0)
    if missing == "refuse" and absent.any():
        teacher, prompt = np.argwhere(absent)[0]
        count = int(absent[teacher].sum())
        raise ValueError(
            f"teacher {names[teacher]!r} lacks {count} of {table.shape[2]} responses, the first at prompt {prompt} "
            "(missing='drop' ranks on the common prompts)"
        )
    table = table[:, :, ~absent.any(0)]
    if table.shape[2] == 0:
        raise ValueError("no prompt is answered by every teacher")
    means = table.mean(2)
    raw = means[:, 0].copy()
    fixed = None if shift == "auto" else float(shift)
    added = max(0.0, -float(raw.min())) if fixed is None else fixed
    lowest = (raw if negative == "allow" or fixed is None else table[:, 0].min(1)) + added
    if (lowest < 0).any():
        worst = int(lowest.argmin())
        what = "mean reward" if negative == "allow" else "reward"
        hint = "" if negative == "allow" else ", or negative='allow' to check the means only"
        raise ValueError(
            f"teacher {names[worst]!r} has a negative {what} ({lowest[worst]:g}), with which a higher loss raises CAR: "
            f"give a shift (or 'auto'){hint}"
        )
    means[:, 0] += added
    values = compatibility_adjusted_reward(means[:, 0], means[:, 1], beta)
    unshifted = None if (raw < 0).any() else compatibility_adjusted_reward(raw, means[:, 1], beta)
    drawn = _resample(table[:, :2], beta, fixed, resamples, np.random.default_rng(seed))  # [resamples, teachers]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(drawn, tails, axis=0)
    gap_low, gap_high = np.quantile(drawn[:, :, None] - drawn[:, None, :], tails, axis=0)
    # Teachers with the same answers share the first place.
    leads = drawn == drawn.max(1, keepdims=True)
    best = (leads / leads.sum(1, keepdims=True)).mean(0)
    ranking, order = [], np.argsort(-values, kind="stable")
    for t in order:
        tied = (gap_low[t] <= 0) & (gap_high[t] >= 0)
        ranking.append(
            TeacherRank(
                teacher=names[t],
                car=float(values[t]),
                interval=(float(low[t]), float(high[t])),
                best=float(best[t]),
                tied_with=tuple(names[other] for other in order if tied[other] and other != t),
                reward=float(means[t, 0]),
                loss=float(means[t, 1]),
                length=float(means[t, 2]),
                rsr=None if teachers[names[t]].rank is None else rank_surprisal_ratio(table[t, 3], table[t, 1]),
                prompts=table.shape[2],
                shift=added,
                unshifted_car=None if unshifted is None else float(unshifted[t]),
            )
        )
    return ranking


def shift_warning(ranking: Sequence[TeacherRank]) -> str | None:
    """One line where a ranking is the shift's: without it, two teachers would stand the other way round.

    Args:
        ranking: of `rank_teachers`. It is compared with CAR of the rewards as they are, or with the mean rewards where
            one of them is negative, because CAR is then not defined.
    """
    before = np.array([row.reward - row.shift if row.unshifted_car is None else row.unshifted_car for row in ranking])
    after = np.array([row.car for row in ranking])
    gaps, now = before[:, None] - before, after[:, None] - after
    if not (np.isclose(before[:, None], before, rtol=1e-9, atol=0) | (gaps * now >= 0)).all():
        names = ", ".join(ranking[place].teacher for place in np.argsort(-before, kind="stable"))
        ranks = f"CAR ranks {names}"
        if ranking[0].unshifted_car is None:
            ranks = f"CAR is not defined for negative means, and the mean reward alone ranks {names}"
        return f"the shift of {ranking[0].shift:.4g} decides the ranking: without it {ranks}"
    return None


def _columns(name: str, responses: TeacherResponses, reward: NDArray[np.float64]) -> NDArray[np.float64]:
    rank = np.full(reward.shape, np.nan) if responses.rank is None else responses.rank
    parts = {"reward": reward, "loss": responses.loss, "tokens": responses.tokens, "rank": rank}
    arrays = {what: np.asarray(values, np.float64) for what, values in parts.items()}
    for what, values in arrays.items():
        if values.ndim != 1 or values.shape != reward.shape:
            raise ValueError(f"teacher {name!r}: {what} has shape {values.shape}, expected {reward.shape}")
        if np.isinf(values).any() or (what != "reward" and (values < 0).any()):
            wrong = np.flatnonzero(np.isinf(values) | ((values < 0) & (what != "reward")))[0]
            raise ValueError(f"teacher {name!r}: {what} of prompt {wrong} is {values[wrong]}")
    return np.stack(list(arrays.values()))


def _resample(
    table: NDArray[np.float64], beta: float, shift: float | None, resamples: int, random: np.random.Generator
) -> NDArray[Any]:
    """CAR of every teacher under each resampling of the prompts [resamples, teachers]; shift None = auto, of each."""
    teachers, _, prompts = table.shape
    flat = table.reshape(teachers * 2, prompts)
    drawn = np.empty((resamples, teachers))
    step = max(1, _BLOCK // prompts)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        picks = random.integers(prompts, size=(rows, prompts)) + np.arange(rows)[:, None] * prompts
        counts = np.bincount(picks.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        means = (counts @ flat.T / prompts).reshape(rows, teachers, 2)
        added = -means[..., 0].min(1, keepdims=True).clip(max=0) if shift is None else shift
        drawn[start : start + rows] = (means[..., 0] + added) / (1 + beta * means[..., 1])
    return drawn

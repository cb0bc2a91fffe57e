"""Which teacher for which student: CAR and its rivals."""

from lightning_itk.choice.car import (
    TeacherRank,
    TeacherResponses,
    compatibility_adjusted_reward,
    rank_teachers,
    shift_rewards,
    shift_warning,
)
from lightning_itk.choice.statistics import rank_surprisal_ratio

"""Which samples to train on: learning percentage, exact subsets, scores files, clusters."""

from lightning_itk.selection.percentage import (
    Metric,
    Order,
    approximate_learning_percentage,
    describe,
    instruction_following_difficulty,
    learning_percentage,
    sample_scores,
    select,
    thirds,
)

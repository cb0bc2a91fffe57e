"""Token losses as pure functions: tensors in, one sum out."""

from lightning_itk.losses.chunked import Head
from lightning_itk.losses.divergence import Divergence, Kind
from lightning_itk.losses.implementation import Impl
from lightning_itk.losses.token import (
    LossParts,
    cross_entropy,
    kl_divergence,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_divergence,
    linear_kl_parts,
    linear_loss,
)

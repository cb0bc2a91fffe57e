"""Supervised fine-tuning: learn the responses themselves."""

from lightning_itk.batch import Batch
from lightning_itk.losses.token import linear_cross_entropy
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.step import Term


class SFTModule(InstructionModule):
    """Supervised fine-tuning of a causal language model on the responses of instruction data.

    The loss is the mean cross-entropy of all response tokens of the optimizer step, stop tokens included. The
    [tokens, vocabulary] logits are never held as a whole.
    """

    def losses(self, batch: Batch) -> dict[str, Term]:
        """`ce`: summed cross-entropy of the response tokens, in nats."""
        loss = linear_cross_entropy(
            *self.response_states(batch), impl=self.impl, has_ignored=False, max_scratch_bytes=self.max_scratch_bytes
        )
        return {"ce": Term(loss)}

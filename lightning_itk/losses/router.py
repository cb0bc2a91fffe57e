"""The load-balancing loss of mixture-of-experts models, as a sum over tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def router_balance(
    logits: Float[Tensor, "tokens experts"],
    shares: Float[Tensor, " tokens"],
    load: Float[Tensor, " experts"],
) -> Float[Tensor, ""]:
    """Experts times the sum over tokens of share * sum_e load_e p_e; p the softmax of the logits in fp32 or wider.

    Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6, where load_e is the fraction of the tokens
    that chose expert e (k of them for the k experts of a token). It has no gradient, so with a load that is known
    beforehand the loss is a sum over tokens. Divided by the sum of shares it is k where all experts are used alike.

    Args:
        logits: of the router, before its softmax.
        shares: how much each token counts; 0 on padding.
        load: without a gradient.
    """
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # No product of matrices: autocast would take it to half precision.
    return logits.shape[-1] * (shares.to(p) * (p * load.to(p)).sum(-1)).sum()


@torch.no_grad()
def chosen_experts(
    logits: Float[Tensor, "tokens experts"], shares: Float[Tensor, " tokens"], k: int
) -> Float[Tensor, " experts"]:
    """The shares of the tokens that chose each expert, summed; divided by the sum of shares it is the load."""
    experts = logits.float().topk(k, dim=-1).indices
    return shares.new_zeros(logits.shape[-1]).index_add_(0, experts.flatten(), shares.repeat_interleave(k))

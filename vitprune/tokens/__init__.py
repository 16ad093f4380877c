"""The algorithm of DynamicViT (https://arxiv.org/abs/2106.02034): tensors in, tensors out.

Nothing here knows timm, files or commands. Names and the paper's symbols:

==========  ======================================================================
keep        rho, the keep ratio of one stage
log_pi      log of pi, (B, N, 2): [..., 0] drop, [..., 1] keep (the authors' code has them swapped)
decision    D, (B, N): 1 keep, 0 drop, of one stage
kept        D-hat, (B, N): the product of the decisions so far
gate        G, (B, 1, T, T): 1 on the diagonal, else D-hat of the key token
sizes       how many patches a token stands for, (B, N); not in the paper
==========  ======================================================================

B images, N patch tokens, P prefix tokens (class, distillation, register), T = P + N, C channels.
"""

from vitprune.tokens.losses import distillation_loss, ratio_loss, token_distillation_loss, token_loss
from vitprune.tokens.masking import (
    attention_bias,
    gumbel_decision,
    gumbel_noise,
    key_bias,
    perturbed_topk_decision,
    size_bias,
)
from vitprune.tokens.merging import merge_masked, merge_tokens
from vitprune.tokens.predictor import TokenPredictor
from vitprune.tokens.selection import (
    flat_rows,
    gather_tokens,
    keep_scores,
    split_tokens,
    take_rows,
    topk_decision,
    topk_tokens,
)

__all__ = [
    "TokenPredictor",
    "attention_bias",
    "distillation_loss",
    "flat_rows",
    "gather_tokens",
    "gumbel_decision",
    "gumbel_noise",
    "keep_scores",
    "key_bias",
    "merge_masked",
    "merge_tokens",
    "perturbed_topk_decision",
    "ratio_loss",
    "size_bias",
    "split_tokens",
    "take_rows",
    "token_distillation_loss",
    "token_loss",
    "topk_decision",
    "topk_tokens",
]

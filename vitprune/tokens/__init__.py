"""The algorithm, from DynamicViT (https://arxiv.org/abs/2106.02034) on: tensors in, tensors out.

Nothing here knows timm, files or commands. Names and the paper's symbols:

==========  ======================================================================
keep        rho, the keep ratio of one stage
scores      log-odds of keeping, (B, N); less their mean a in the formulas of redundancy and merging
log_pi      log of pi, (B, N, 2): [..., 0] drop, [..., 1] keep (the authors' code has them swapped)
decision    D, (B, N): 1 keep, 0 drop, of one stage
kept        D-hat, (B, N): the product of the decisions so far
gate        G, (B, 1, T, T): 1 on the diagonal, else D-hat of the key token
sizes       how many patches a token stands for, (B, N); not in the paper
==========  ======================================================================

B images, N patch tokens, P prefix tokens (class, distillation, register), T = P + N, C channels.
"""

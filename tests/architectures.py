"""A tiny model of every shape that an adapter has to cope with, by what is special about it."""

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}
PLAIN = {"name": "vit_tiny_patch16_224", **TINY}
ENCODER = {**TINY, "num_classes": 7}
BEIT = {"name": "beit_base_patch16_224", **TINY}
# Not 16 channels: oneDNN 3.12 (torch 2.14) gets bf16 convolutions of 16 channels into patches wrong on CPUs with AMX.
LVVIT = {"name": "lvvit_s", **TINY, "stem_width": 32}

VIT = {
    # prefix tokens
    "class token": PLAIN,
    "class and distillation token, two heads": {"name": "deit_tiny_distilled_patch16_224", **TINY},
    "class token and 4 registers": {"name": "vit_small_patch14_reg4_dinov2", **TINY, "img_size": 84},
    "one register": {"name": "test_vit2", "img_size": 96},
    "DeiT-III": {"name": "deit3_small_patch16_224", **TINY},
    "CLIP": {"name": "vit_base_patch16_clip_224", **TINY},
    # pooling
    "no class token, attention pool": {"name": "vit_base_patch16_siglip_224", **TINY},
    "attention pool with prefix": {"name": "test_vit3", "img_size": 96},
    "average": {"name": "vit_medium_patch16_gap_256", **TINY},
    "average of patches beside a class token": {**PLAIN, "global_pool": "avg"},
    "average, normed before pooling": {**PLAIN, "global_pool": "avg", "fc_norm": False},
    "average with prefix": {**PLAIN, "global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "max": {**PLAIN, "global_pool": "max"},
    "average and max": {**PLAIN, "global_pool": "avgmax"},
    "average and max with prefix, normed before pooling": {
        **PLAIN,
        "global_pool": "avgmax",
        "pool_include_prefix": True,
        "fc_norm": False,
    },
    "refined, class token": {**PLAIN, "global_pool": "prr"},
    "refined, average": {**PLAIN, "global_pool": "prr", "class_token": False, "reg_tokens": 2},
    "class token, normed after pooling": {**PLAIN, "fc_norm": True},
    # stem, sizes, classifier
    "hybrid stem": {"name": "vit_tiny_r_s16_p8_224", **TINY, "img_size": 160},
    "ViTamin": {"name": "vitamin_small_224", "depth": 4, "img_size": 96},
    "not square": {**PLAIN, "img_size": (64, 128)},
    "patches of 8": {"name": "vit_small_patch8_224", **TINY, "img_size": 48},
    "7 classes, 1 channel": {**PLAIN, "num_classes": 7, "in_chans": 1},
    "no classifier": {**PLAIN, "num_classes": 0},
    # blocks
    "RMS norm": {"name": "test_vit4", "img_size": 96},
    "norm of queries and keys": {**PLAIN, "qk_norm": True},
    # Without a norm before attention its logits grow, and the gate hides a pruned token only up to eps * exp(logit).
    "norm after": {"name": "vit_base_patch16_rpn_224", **TINY, "qk_norm": True},
    "parallel scaling": {"name": "vit_base_patch16_xp_224", **TINY},
    "parallel things": {"name": "vit_small_patch16_18x2_224", **TINY},
    "differential attention": {"name": "vit_dwee_patch16_reg1_gap_256", **TINY},
    "differential parallel": {"name": "vit_dpwee_patch16_reg1_gap_256", **TINY},
    "gated MLP": {"name": "vit_giant_patch14_dinov2", **TINY, "img_size": 84, "mlp_ratio": 4},
}
"""timm's VisionTransformer."""

OTHERS = {
    # rotary positions
    "EVA": {"name": "eva_giant_patch14_224", **TINY, "img_size": 84},
    "EVA-02": {"name": "eva02_tiny_patch14_224", **TINY, "img_size": 84},
    "EVA-02 CLIP": {"name": "eva02_base_patch16_clip_224", **TINY},
    "EVA-02 CLIP, norm after": {"name": "eva02_enormous_patch14_clip_224", **TINY, "img_size": 84},
    "DINOv3": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7},
    "DINOv3, average": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7, "global_pool": "avg"},
    "DINOv3, not square": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7, "img_size": (64, 128)},
    "Perception Encoder": {"name": "vit_pe_core_tiny_patch16_384", **TINY, "num_classes": 7},
    "RoPE ViT, axial": {"name": "vit_small_patch16_rope_224", **TINY},
    "RoPE ViT, mixed": {"name": "vit_small_patch16_rope_mixed_224", **TINY},
    "RoPE ViT, mixed, absolute too": {"name": "vit_small_patch16_rope_mixed_ape_224", **TINY},
    "Sapiens2": {"name": "vit_base_patch16_sapiens2", **ENCODER, "num_heads": 4, "num_kv_heads": (4, 2, 2, 4)},
    # a bias for every pair of tokens
    "BEiT": BEIT,
    "BEiT v2": {"name": "beitv2_base_patch16_224", **TINY},
    "BEiT, class token": {**BEIT, "global_pool": "token"},
    "BEiT, shared bias": {**BEIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": None},
    "BEiT, own and shared bias": {**BEIT, "use_shared_rel_pos_bias": True},
    "BEiT, not square": {**BEIT, "img_size": (64, 128)},
    "relative positions": {"name": "vit_relpos_small_patch16_224", **TINY},
    "relative positions, class token": {"name": "vit_relpos_base_patch16_cls_224", **TINY},
    "relative positions beside a class token": {"name": "vit_relpos_base_patch16_clsgap_224", **TINY},
    "relative positions, norm after": {"name": "vit_relpos_base_patch16_rpn_224", **TINY, "qk_norm": True},
    "relative positions, shared": {"name": "vit_srelpos_small_patch16_224", **TINY},
    # talking heads and class attention
    "CaiT": {"name": "cait_xxs24_224", **TINY},
    "CaiT, average": {"name": "cait_xxs24_224", **TINY, "global_pool": "avg"},
    # variable sizes
    "NaFlex, average": {"name": "naflexvit_base_patch16_gap", **TINY},
    "NaFlex, attention pool": {"name": "naflexvit_base_patch16_map", **TINY},
    "NaFlex, factorized positions": {"name": "naflexvit_base_patch16_parfac_gap", **TINY},
    "NaFlex, RADIO": {"name": "naflexvit_base_patch16_radio_v3", **TINY, "num_classes": 7},
    "NaFlex, axial": {"name": "naflexvit_base_patch16_gap", **TINY, "rope_type": "axial"},
    "NaFlex, mixed": {"name": "naflexvit_base_patch16_gap", **TINY, "rope_type": "mixed"},
    # encoders of language models, as classifiers
    "Qwen3": {"name": "qwen3_vit_88m", **ENCODER},
    "DeepSeek": {"name": "deepseek_vit_412m", **ENCODER, "img_size": 84},
    "Gemma 4": {"name": "gemma4_vit_167m", **ENCODER, "head_dim": 32, "intermediate_size": 128},
}
"""The other families of timm."""

LVVITS = {
    "LV-ViT, skip_lam 1": {**LVVIT, "name": "lvvit_t"},
    "LV-ViT, skip_lam 2": LVVIT,
    "LV-ViT, skip_lam 3": {**LVVIT, "name": "lvvit_l"},
    "LV-ViT, not square": {**LVVIT, "img_size": (64, 128)},
    "LV-ViT, 7 classes, 1 channel": {**LVVIT, "num_classes": 7, "in_chans": 1},
    "LV-ViT, no classifier": {**LVVIT, "num_classes": 0},
}

ALL = {**VIT, **OTHERS, **LVVITS}

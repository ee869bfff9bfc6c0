"""Configurations of UNet2DConditionModel of the kind of DeepFloyd IF's networks, at small widths."""

TOKENS, TEXT_WIDTH = 7, 24
# The arguments that diffusers' script for IF's checkpoints (scripts/convert_if.py) gives, at small widths.
PUBLISHED = {
    "use_linear_projection": False,
    "projection_class_embeddings_input_dim": None,
    "upcast_attention": False,
    "out_channels": 6,
    "cross_attention_norm": "group_norm",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "addition_embed_type": "text",
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": TEXT_WIDTH,
    "addition_embed_type_num_heads": 4,  # 64 of 64 channels in IF, which the script leaves at its default
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
}
STAGE_1 = {
    **PUBLISHED,
    "sample_size": 16,
    "in_channels": 3,
    "block_out_channels": (32, 32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "class_embed_type": None,
}
STAGE_2 = {
    **PUBLISHED,
    "sample_size": 32,
    "in_channels": 6,
    "block_out_channels": (32, 32, 64, 64, 96),
    "layers_per_block": (1, 1, 2, 2, 2),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",) * 2,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 3,
    "time_embedding_dim": 128,
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
    "only_cross_attention": True,
}

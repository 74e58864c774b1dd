"""Models of diffusers, in small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.example import Example, Factory, example

LATENT, TEXT = (2, 4, 16, 16), (2, 7, 20)


def diffusers() -> dict[str, Factory]:
    """Denoisers with and without conditions, and autoencoders."""
    time = torch.tensor([3, 5])
    small: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    crossed: dict[str, Any] = {
        **small,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 20,
        "attention_head_dim": 4,
        "sample_size": 16,
    }
    coded: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    heads: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16}
    latent, text = torch.randn(LATENT), torch.randn(TEXT)
    return {
        "UNet2DModel": _model(
            "UNet2DModel",
            (torch.randn(2, 3, 16, 16), time),
            **small,
            sample_size=16,
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=8,
        ),
        "UNet2DModel of classes": _model(
            "UNet2DModel",
            (torch.randn(2, 3, 16, 16), time, torch.tensor([1, 2])),
            **small,
            sample_size=16,
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=8,
            num_class_embeds=5,
        ),
        "UNet2DConditionModel": _model("UNet2DConditionModel", (latent, time, text), **crossed),
        "UNet2DConditionModel linear": _model(
            "UNet2DConditionModel", (latent, time, text), **crossed, use_linear_projection=True
        ),
        "AutoencoderKL": _model("AutoencoderKL", (torch.randn(2, 3, 32, 32),), **coded),
        "AutoencoderTiny": _model(
            "AutoencoderTiny",
            (torch.randn(2, 3, 32, 32),),
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "VQModel": _model("VQModel", (torch.randn(2, 3, 32, 32),), **coded, num_vq_embeddings=12),
        "AutoencoderDC": _model(
            "AutoencoderDC",
            (torch.randn(2, 3, 32, 32),),
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ),
        "DiTTransformer2DModel": _model(
            "DiTTransformer2DModel",
            (latent,),
            {"timestep": time, "class_labels": torch.tensor([1, 2])},
            **heads,
            in_channels=4,
            norm_num_groups=4,
            num_embeds_ada_norm=10,
        ),
        "Transformer2DModel": _model(
            "Transformer2DModel",
            (latent,),
            {"encoder_hidden_states": text},
            **heads,
            in_channels=4,
            norm_num_groups=4,
            cross_attention_dim=20,
        ),
        "PixArtTransformer2DModel": _model(
            "PixArtTransformer2DModel",
            (latent,),
            {"encoder_hidden_states": text, "timestep": time},
            **heads,
            in_channels=4,
            cross_attention_dim=24,
            caption_channels=20,
            use_additional_conditions=False,
        ),
        "SD3Transformer2DModel": _model(
            "SD3Transformer2DModel",
            (),
            {
                "hidden_states": latent,
                "encoder_hidden_states": text,
                "pooled_projections": torch.randn(2, 12),
                "timestep": time,
            },
            **heads,
            in_channels=4,
            joint_attention_dim=20,
            caption_projection_dim=24,
            pooled_projection_dim=12,
            pos_embed_max_size=16,
        ),
        "FluxTransformer2DModel": _model(
            "FluxTransformer2DModel",
            (),
            {
                "hidden_states": torch.randn(2, 16, 4),
                "encoder_hidden_states": text,
                "pooled_projections": torch.randn(2, 12),
                "timestep": torch.rand(2),
                "img_ids": torch.rand(16, 3),
                "txt_ids": torch.rand(7, 3),
            },
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=20,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 4, 8),
        ),
        "AuraFlowTransformer2DModel": _model(
            "AuraFlowTransformer2DModel",
            (),
            {"hidden_states": latent, "encoder_hidden_states": text, "timestep": torch.rand(2)},
            sample_size=16,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=20,
            caption_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        "SanaTransformer2DModel": _model(
            "SanaTransformer2DModel",
            (),
            {"hidden_states": latent, "encoder_hidden_states": text, "timestep": time},
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=3,
            attention_head_dim=8,
            num_cross_attention_heads=3,
            cross_attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=20,
            sample_size=16,
        ),
        "UNet1DModel": _model(
            "UNet1DModel",
            (torch.randn(2, 3, 32), time),
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 32, 64),
            extra_in_channels=64,
        ),
        "ControlNetModel": _model(
            "ControlNetModel",
            (latent, time, text, torch.randn(2, 3, 32, 32)),
            **{k: v for k, v in crossed.items() if k not in ("up_block_types", "sample_size")},
            conditioning_embedding_out_channels=(16, 24),
        ),
    }


def _model(name: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor] | None = None, **options: Any) -> Factory:
    def make() -> Example:
        import diffusers

        return example(getattr(diffusers, name)(**options), *args, **{**(kwargs or {}), "return_dict": False})

    return make

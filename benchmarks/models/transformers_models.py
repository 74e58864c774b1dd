"""Models of Hugging Face transformers, in small configurations."""

from __future__ import annotations

from typing import Any

from models.example import Example, Factory, Shapes, example, inputs

IDS: Shapes = {"input_ids": (2, 12)}
PAIR: Shapes = {"input_ids": (2, 12), "decoder_input_ids": (2, 9)}
IMAGE: Shapes = {"pixel_values": (2, 3, 64, 64)}
CLIP: Shapes = {"pixel_values": (2, 4, 3, 32, 32)}
AUDIO: Shapes = {"input_values": (2, 4000)}
BOTH: Shapes = {"input_ids": (2, 12), "pixel_values": (2, 3, 64, 64)}

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TEXT: dict[str, Any] = {
    **SPECIAL,
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
EXPERTS: dict[str, Any] = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
SEQ2SEQ: dict[str, Any] = {
    **SPECIAL,
    "vocab_size": 100,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    **SPECIAL,
    "vocab_size": 100,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
}
N_LAYER: dict[str, Any] = {
    **SPECIAL,
    "vocab_size": 100,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 80,
}
PATCHES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 64,
    "patch_size": 16,
    "num_channels": 3,
}
STAGES: dict[str, Any] = {"image_size": 64, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_channels": 3}
WINDOWS: dict[str, Any] = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
WAVE: dict[str, Any] = {
    **TEXT,
    "conv_dim": [16, 24],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TOWERS: dict[str, Any] = {
    "text_config": {**TEXT, "projection_dim": 20},
    "vision_config": {**PATCHES, "projection_dim": 20},
    "projection_dim": 20,
}
SERIES: dict[str, Any] = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1}
SERIES_INPUTS: Shapes = {
    "past_values": (2, 14),
    "past_time_features": (2, 14, 1),
    "past_observed_mask": (2, 14),
    "future_values": (2, 4),
    "future_time_features": (2, 4, 1),
}


def transformers() -> dict[str, Factory]:
    """Text, sequence to sequence, speech, vision, several modalities, and time series."""
    return {**_encoders(), **_decoders(), **_seq2seq(), **_speech(), **_vision(), **_modalities(), **_series()}


def _encoders() -> dict[str, Factory]:
    lm = "ForMaskedLM"
    return {
        "BERT": _model("Bert", lm, IDS, **TEXT),
        "BERT classifier": _model("Bert", "ForSequenceClassification", IDS, **TEXT),
        "RoBERTa": _model("Roberta", lm, IDS, **TEXT),
        "XLM-RoBERTa-XL": _model("XLMRobertaXL", lm, IDS, **TEXT),
        "DeBERTa": _model("Deberta", lm, IDS, **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        "DeBERTa-v2": _model("DebertaV2", lm, IDS, **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        "ALBERT": _model("Albert", lm, IDS, **TEXT, embedding_size=20),
        "ELECTRA": _model("Electra", lm, IDS, **TEXT, embedding_size=20),
        "DistilBERT": _model("DistilBert", lm, IDS, vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=80),
        "MPNet": _model("MPNet", lm, IDS, **TEXT),
        "CamemBERT": _model("Camembert", lm, IDS, **TEXT),
        "ERNIE": _model("Ernie", lm, IDS, **TEXT),
        "Nystromformer": _model("Nystromformer", lm, IDS, **TEXT, num_landmarks=4, segment_means_seq_len=12),
        "RoFormer": _model("RoFormer", lm, IDS, **TEXT, embedding_size=20),
        "ConvBERT": _model("ConvBert", lm, IDS, **TEXT, embedding_size=20),
        "MobileBERT": _model(
            "MobileBert", lm, IDS, **TEXT, embedding_size=20, intra_bottleneck_size=24, true_hidden_size=24
        ),
        "SqueezeBERT": _model("SqueezeBert", lm, IDS, **TEXT, embedding_size=48),
        "Megatron-BERT": _model("MegatronBert", lm, IDS, **TEXT),
        "RemBERT": _model("RemBert", lm, IDS, **TEXT, input_embedding_size=20, output_embedding_size=28),
        "I-BERT": _model("IBert", lm, IDS, **TEXT),
        "BigBird": _model("BigBird", lm, IDS, **TEXT, attention_type="original_full"),
        "BigBird sparse": _model("BigBird", lm, {"input_ids": (2, 48)}, **TEXT, block_size=4, num_random_blocks=2),
        "Longformer": _model("Longformer", lm, IDS, **TEXT, attention_window=[4, 4]),
        "ESM": _model("Esm", lm, IDS, **TEXT, mask_token_id=3),
        "FNet": _model("FNet", lm, IDS, **TEXT),
        "ModernBERT": _model("ModernBert", lm, IDS, **TEXT, cls_token_id=1, sep_token_id=2),
        "Data2Vec text": _model("Data2VecText", lm, IDS, **TEXT),
        "Funnel": _model(
            "Funnel", lm, IDS, vocab_size=100, block_sizes=[1, 1], d_model=48, n_head=4, d_head=12, d_inner=80
        ),
        "XLNet": _model(
            "XLNet",
            "LMHeadModel",
            IDS,
            vocab_size=100,
            d_model=48,
            n_layer=2,
            n_head=4,
            d_inner=80,
            use_mems_eval=False,
        ),
        "XLM": _model(
            "XLM", "WithLMHeadModel", IDS, vocab_size=100, emb_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
        ),
        "FlauBERT": _model("Flaubert", "WithLMHeadModel", IDS, vocab_size=100, emb_dim=48, n_layers=2, n_heads=4),
        "Reformer": _model(
            "Reformer",
            "ModelWithLMHead",
            {"input_ids": (2, 16)},
            **TEXT,
            attn_layers=["local", "local"],
            attention_head_size=12,
            feed_forward_size=80,
            axial_pos_shape=[4, 4],
            axial_pos_embds_dim=[20, 28],
            local_attn_chunk_length=4,
            is_decoder=True,
        ),
        "CANINE": _model(
            "Canine",
            "ForTokenClassification",
            IDS,
            **TEXT,
            num_hash_buckets=50,
            downsampling_rate=2,
            local_transformer_stride=4,
        ),
        "Perceiver": _model(
            "Perceiver",
            lm,
            {"inputs_ids": (2, 12)},
            vocab_size=100,
            d_latents=40,
            d_model=40,
            num_latents=6,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            max_position_embeddings=12,
            qk_channels=24,
            v_channels=40,
        ),
        "LUKE": _model("Luke", lm, IDS, **TEXT, entity_vocab_size=20, entity_emb_size=16),
        "LayoutLM": _model("LayoutLM", lm, IDS, **TEXT, max_2d_position_embeddings=64),
        "LiLT": _model(
            "Lilt", "ForTokenClassification", IDS, **TEXT, max_2d_position_embeddings=64, channel_shrink_ratio=2
        ),
        "MRA": _model("Mra", lm, {"input_ids": (2, 64)}, **TEXT),
        "X-MOD": _model("Xmod", lm, IDS, **TEXT, languages=["en_XX", "de_DE"], default_language="en_XX"),
        "YOSO": _model("Yoso", lm, IDS, **TEXT, use_expectation=True),
    }


def _decoders() -> dict[str, Factory]:
    lm = "ForCausalLM"
    latent: dict[str, Any] = {
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 10,
        "v_head_dim": 14,
    }
    models = {
        "GPT-2": _model("GPT2", "LMHeadModel", IDS, **N_LAYER),
        "GPT": _model("OpenAIGPT", "LMHeadModel", IDS, **N_LAYER),
        "GPT-BigCode": _model("GPTBigCode", lm, IDS, **N_LAYER),
        "CTRL": _model("CTRL", "LMHeadModel", IDS, **N_LAYER, dff=80),
        "CodeGen": _model("CodeGen", lm, IDS, **{**N_LAYER, "n_embd": 64}, rotary_dim=8),
        "GPT-J": _model("GPTJ", lm, IDS, **N_LAYER, rotary_dim=8),
        "GPT-NeoX": _model("GPTNeoX", lm, IDS, **TEXT),
        "GPT-Neo": _model(
            "GPTNeo",
            lm,
            IDS,
            **TEXT,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
        "OPT": _model("OPT", lm, IDS, **TEXT, ffn_dim=80, word_embed_proj_dim=20),
        "BLOOM": _model("Bloom", lm, IDS, **TEXT, n_layer=2, n_head=4),
        "Falcon": _model("Falcon", lm, IDS, **TEXT),
        "Falcon new": _model("Falcon", lm, IDS, **TEXT, new_decoder_architecture=True, num_kv_heads=2),
        "MPT": _model("Mpt", lm, IDS, vocab_size=100, d_model=48, n_layers=2, n_heads=4, max_seq_len=64),
        "Gemma 3": _model("Gemma3", lm, IDS, config="Gemma3TextConfig", **GROUPED, sliding_window=8),
        "Mamba": _model("Mamba", lm, IDS, **TEXT, state_size=6, time_step_rank=5),
        "Mamba2": _model("Mamba2", lm, IDS, **TEXT, state_size=6, num_heads=8, head_dim=12, n_groups=2, chunk_size=4),
        "Falcon-Mamba": _model("FalconMamba", lm, IDS, **TEXT, state_size=6, time_step_rank=5),
        "RWKV": _model("Rwkv", lm, IDS, **TEXT, attention_hidden_size=40, context_length=64),
        "DeepSeek-V2": _model(
            "DeepseekV2", lm, IDS, **{**EXPERTS, **latent, "num_key_value_heads": 4}, n_routed_experts=4, n_group=1
        ),
        "DeepSeek-V3": _model(
            "DeepseekV3",
            lm,
            IDS,
            **{**EXPERTS, **latent, "num_key_value_heads": 4, "head_dim": 8},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        "Qwen3-Next": _model(
            "Qwen3Next",
            lm,
            IDS,
            **EXPERTS,
            shared_expert_intermediate_size=28,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=10,
            layer_types=["linear_attention", "full_attention"],
        ),
        "Qwen2-MoE": _model("Qwen2Moe", lm, IDS, **EXPERTS, shared_expert_intermediate_size=28),
        "DBRX": _model(
            "Dbrx",
            lm,
            IDS,
            **SPECIAL,
            vocab_size=100,
            d_model=48,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 80, "moe_num_experts": 3, "moe_top_k": 2},
        ),
        "Jamba": _model(
            "Jamba",
            lm,
            IDS,
            **EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=6,
        ),
        "Bamba": _model(
            "Bamba",
            lm,
            IDS,
            **GROUPED,
            attn_layer_indices=[1],
            mamba_n_heads=8,
            mamba_d_head=12,
            mamba_d_state=6,
            mamba_chunk_size=4,
        ),
        "RecurrentGemma": _model(
            "RecurrentGemma", lm, IDS, **TEXT, num_key_value_heads=2, lru_width=48, attention_window_size=8
        ),
        "JetMoE": _model("JetMoe", lm, IDS, **EXPERTS, kv_channels=12),
        "LFM2": _model("Lfm2", lm, IDS, **GROUPED, layer_types=["conv", "full_attention"]),
        "MiniMax": _model("MiniMax", lm, IDS, **EXPERTS, block_size=4),
        "BioGPT": _model("BioGpt", lm, IDS, **TEXT),
        "XGLM": _model(
            "XGLM", lm, IDS, **TEXT, d_model=48, num_layers=2, attention_heads=4, ffn_dim=80, max_position_embedding=64
        ),
        "Mixtral batched": _model("Mixtral", lm, IDS, **EXPERTS, experts_implementation="batched_mm"),
        "Qwen3-MoE batched": _model("Qwen3Moe", lm, IDS, **EXPERTS, experts_implementation="batched_mm"),
        "StableLM": _model("StableLm", lm, IDS, **{**GROUPED, "hidden_size": 64, "head_dim": 16}),
        "dots.llm1": _model(
            "Dots1", lm, IDS, **EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1
        ),
        "Nemotron": _model("Nemotron", lm, IDS, **GROUPED),
        "xLSTM": _model("xLSTM", lm, IDS, **TEXT, num_heads=4, num_blocks=2, chunk_size=4),
        "ImageGPT": _model("ImageGPT", "ForCausalImageModeling", IDS, **N_LAYER),
    }
    grouped = {
        "Llama": "Llama",
        "Mistral": "Mistral",
        "Qwen2": "Qwen2",
        "Qwen3": "Qwen3",
        "Gemma": "Gemma",
        "Gemma 2": "Gemma2",
        "Phi": "Phi",
        "Phi-3": "Phi3",
        "OLMo": "Olmo",
        "OLMo 2": "Olmo2",
        "Starcoder2": "Starcoder2",
        "Cohere": "Cohere",
        "Cohere 2": "Cohere2",
        "Granite": "Granite",
        "GLM": "Glm",
        "GLM-4": "Glm4",
        "Persimmon": "Persimmon",
        "Helium": "Helium",
        "ERNIE 4.5": "Ernie4_5",
        "SmolLM3": "SmolLM3",
        "EXAONE 4": "Exaone4",
        "Arcee": "Arcee",
        "BitNet": "BitNet",
        "Apertus": "Apertus",
        "Seed-OSS": "SeedOss",
        "DiffLlama": "DiffLlama",
    }
    experts = {
        "Mixtral": "Mixtral",
        "Qwen3-MoE": "Qwen3Moe",
        "OLMoE": "Olmoe",
        "Granite-MoE": "GraniteMoe",
        "Phi-3.5-MoE": "Phimoe",
        "GPT-OSS": "GptOss",
    }
    models |= {name: _model(prefix, lm, IDS, **GROUPED) for name, prefix in grouped.items()}
    return models | {name: _model(prefix, lm, IDS, **EXPERTS) for name, prefix in experts.items()}


def _seq2seq() -> dict[str, Factory]:
    lm = "ForConditionalGeneration"
    models = {
        "Switch Transformers": _model("SwitchTransformers", lm, PAIR, **T5, num_experts=3, expert_capacity=8),
        "Long-T5": _model("LongT5", lm, PAIR, **T5, local_radius=3),
        "M2M-100": _model("M2M100", lm, PAIR, **SEQ2SEQ),
        "BigBird-Pegasus": _model("BigBirdPegasus", lm, PAIR, **SEQ2SEQ, attention_type="original_full"),
        "LED": _model(
            "LED",
            lm,
            {"input_ids": (2, 16), "decoder_input_ids": (2, 9)},
            **SEQ2SEQ,
            attention_window=[4, 4],
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        "Marian": _model("Marian", "MTModel", PAIR, **SEQ2SEQ),
        "FSMT": _model("FSMT", lm, PAIR, **SEQ2SEQ, src_vocab_size=100, tgt_vocab_size=100, langs=["en", "de"]),
        "ProphetNet": _model(
            "ProphetNet",
            lm,
            PAIR,
            **SPECIAL,
            vocab_size=100,
            hidden_size=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=72,
            max_position_embeddings=64,
        ),
    }
    t5 = {"T5": "T5", "mT5": "MT5", "UMT5": "UMT5"}
    bart = {
        "BART": "Bart",
        "mBART": "MBart",
        "Pegasus": "Pegasus",
        "Pegasus-X": "PegasusX",
        "Blenderbot": "Blenderbot",
        "Blenderbot small": "BlenderbotSmall",
        "PLBart": "PLBart",
    }
    models |= {name: _model(prefix, lm, PAIR, **T5) for name, prefix in t5.items()}
    models["T5 gated"] = _model("T5", lm, PAIR, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return models | {name: _model(prefix, lm, PAIR, **SEQ2SEQ) for name, prefix in bart.items()}


def _speech() -> dict[str, Factory]:
    generation = "ForConditionalGeneration"
    stepped: dict[str, Any] = {"input_features": (2, 8, 40), "decoder_input_ids": (2, 9)}
    models = {
        "Whisper": _model(
            "Whisper",
            generation,
            stepped,
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        "Speech2Text": _model(
            "Speech2Text",
            generation,
            {"input_features": (2, 40, 8), "decoder_input_ids": (2, 9)},
            **SEQ2SEQ,
            input_feat_per_channel=8,
            conv_channels=24,
            max_source_positions=40,
            max_target_positions=32,
        ),
        "Moonshine": _model(
            "Moonshine",
            generation,
            {"input_values": (2, 4000), "decoder_input_ids": (2, 9)},
            **TEXT,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
        ),
        "Audio Spectrogram Transformer": _model(
            "AST",
            "ForAudioClassification",
            {"input_values": (2, 40, 16)},
            **{**PATCHES, "patch_size": 8},
            max_length=40,
            num_mel_bins=16,
            frequency_stride=4,
            time_stride=4,
        ),
        "SEW": _model("SEW", "ForCTC", AUDIO, **WAVE, squeeze_factor=2),
        "SEW-D": _model("SEWD", "ForCTC", AUDIO, **WAVE, squeeze_factor=2),
        "EnCodec": _model(
            "Encodec",
            "Model",
            {"input_values": (2, 1, 640)},
            num_filters=4,
            hidden_size=12,
            codebook_size=16,
            codebook_dim=12,
            upsampling_ratios=[4, 2],
            num_lstm_layers=1,
        ),
        "Wav2Vec2 layer norm": _model(
            "Wav2Vec2", "ForCTC", AUDIO, **WAVE, feat_extract_norm="layer", do_stable_layer_norm=True
        ),
    }
    waves = {
        "Wav2Vec2": "Wav2Vec2",
        "HuBERT": "Hubert",
        "WavLM": "WavLM",
        "UniSpeech": "UniSpeech",
        "UniSpeech-SAT": "UniSpeechSat",
        "Wav2Vec2-Conformer": "Wav2Vec2Conformer",
        "Data2Vec audio": "Data2VecAudio",
    }
    return models | {name: _model(prefix, "ForCTC", AUDIO, **WAVE) for name, prefix in waves.items()}


def _vision() -> dict[str, Factory]:
    classifier = "ForImageClassification"
    patches = {
        "ViT": "ViT",
        "DeiT": "DeiT",
        "BEiT": "Beit",
        "Data2Vec vision": "Data2VecVision",
        "DINOv2": "Dinov2",
        "DINOv2 with registers": "Dinov2WithRegisters",
        "ViT-MSN": "ViTMSN",
        "I-JEPA": "IJepa",
    }
    stages = {
        "ConvNeXt": "ConvNext",
        "ConvNeXt V2": "ConvNextV2",
        "ResNet": "ResNet",
        "RegNet": "RegNet",
        "PoolFormer": "PoolFormer",
    }
    models = {name: _model(prefix, classifier, IMAGE, **PATCHES) for name, prefix in patches.items()}
    models |= {name: _model(prefix, classifier, IMAGE, **STAGES, num_stages=4) for name, prefix in stages.items()}
    resnet: dict[str, Any] = {
        "model_type": "resnet",
        **STAGES,
        "embedding_size": 16,
        "layer_type": "basic",
        "out_features": ["stage4"],
    }
    detr: dict[str, Any] = {
        **SEQ2SEQ,
        "num_queries": 5,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
    }
    return models | {
        "DINOv3": _model("DINOv3ViT", "Model", IMAGE, **PATCHES, num_register_tokens=2),
        "Swin": _model("Swin", classifier, IMAGE, **WINDOWS),
        "Swin V2": _model("Swinv2", classifier, IMAGE, **WINDOWS),
        "Donut-Swin": _model("DonutSwin", "ForImageClassification", IMAGE, **WINDOWS),
        "Swin2SR": _model("Swin2SR", "ForImageSuperResolution", IMAGE, **{**WINDOWS, "image_size": 64}),
        "SegFormer": _model(
            "Segformer",
            "ForSemanticSegmentation",
            IMAGE,
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=28,
        ),
        "SegFormer classifier": _model("Segformer", classifier, IMAGE, depths=[1, 1, 1, 1]),
        "DETR": _model("Detr", "ForObjectDetection", IMAGE, **detr, backbone_config=resnet),
        "YOLOS": _model("Yolos", "ForObjectDetection", IMAGE, **{**PATCHES, "image_size": [64, 64]}),
        "ViT-MAE": _model("ViTMAE", "Model", {**IMAGE, "noise": (2, 16)}, **PATCHES),
        "MobileViT": _model(
            "MobileViT",
            classifier,
            IMAGE,
            image_size=64,
            hidden_sizes=[24, 32, 40],
            neck_hidden_sizes=[16, 24, 24, 32, 40, 48, 56],
        ),
        "BiT": _model("Bit", classifier, IMAGE, **STAGES, embedding_size=16, num_groups=2),
        "TextNet": _model(
            "TextNet", classifier, IMAGE, image_size=[64, 64], stem_out_channels=16, hidden_sizes=[16, 20, 24, 32, 40]
        ),
        "MobileViTV2": _model("MobileViTV2", classifier, IMAGE, image_size=64, width_multiplier=0.5),
        "MobileNet V1": _model("MobileNetV1", classifier, IMAGE, image_size=64, depth_multiplier=0.25),
        "MobileNet V2": _model("MobileNetV2", classifier, IMAGE, image_size=64, depth_multiplier=0.25),
        "LeViT": _model(
            "Levit",
            classifier,
            IMAGE,
            image_size=64,
            hidden_sizes=[32, 48, 64],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        "PVT": _model("Pvt", classifier, IMAGE, **STAGES, num_attention_heads=[1, 2, 4, 4]),
        "PVT V2": _model("PvtV2", classifier, IMAGE, **STAGES, num_attention_heads=[1, 2, 4, 4]),
        "FocalNet": _model("FocalNet", classifier, IMAGE, image_size=64, embed_dim=16, depths=[1, 1, 1, 1]),
        "CvT": _model("Cvt", classifier, IMAGE, embed_dim=[16, 32, 48], num_heads=[1, 2, 4], depth=[1, 2, 3]),
        "SwiftFormer": _model("SwiftFormer", classifier, IMAGE, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 40]),
        "EfficientNet": _model(
            "EfficientNet",
            classifier,
            IMAGE,
            image_size=64,
            width_coefficient=0.5,
            depth_coefficient=0.5,
            hidden_dim=640,
        ),
        "Hiera": _model(
            "Hiera",
            classifier,
            IMAGE,
            image_size=[64, 64],
            embed_dim=24,
            depths=[1, 1, 1],
            num_heads=[1, 2, 4],
            masked_unit_size=[4, 4],
            query_stride=[2, 2],
            num_query_pool=2,
        ),
        "DPT": _model(
            "DPT",
            "ForDepthEstimation",
            IMAGE,
            **{**PATCHES, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 24, 32, 40],
            fusion_hidden_size=20,
        ),
        "GLPN": _model(
            "GLPN",
            "ForDepthEstimation",
            IMAGE,
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=28,
        ),
        "ViTDet": _model("VitDet", "Model", IMAGE, **PATCHES, pretrain_image_size=64, window_size=2),
        "TimeSformer": _model(
            "Timesformer", "ForVideoClassification", CLIP, **{**PATCHES, "image_size": 32}, num_frames=4
        ),
        "VideoMAE": _model(
            "VideoMAE", "ForVideoClassification", CLIP, **{**PATCHES, "image_size": 32}, num_frames=4, tubelet_size=2
        ),
        "ViViT": _model(
            "Vivit",
            "ForVideoClassification",
            CLIP,
            **{**PATCHES, "image_size": 32},
            num_frames=4,
            tubelet_size=[2, 16, 16],
        ),
        "UperNet": _model(
            "UperNet",
            "ForSemanticSegmentation",
            IMAGE,
            backbone_config={
                "model_type": "convnext",
                **STAGES,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            hidden_size=28,
            auxiliary_channels=20,
            auxiliary_in_channels=32,
        ),
        "Mask2Former": _model(
            "Mask2Former",
            "ForUniversalSegmentation",
            IMAGE,
            backbone_config={
                "model_type": "swin",
                **WINDOWS,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 4, 4],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=48,
            encoder_layers=1,
            decoder_layers=2,
            dim_feedforward=48,
            num_attention_heads=4,
            num_queries=5,
        ),
    }


def _modalities() -> dict[str, Factory]:
    return {
        "CLIP": _model("CLIP", "Model", BOTH, **TOWERS),
        "CLIPSeg": _model("CLIPSeg", "Model", BOTH, **TOWERS),
        "SigLIP": _model("Siglip", "Model", BOTH, **TOWERS),
        "Chinese-CLIP": _model("ChineseCLIP", "Model", BOTH, **TOWERS),
        "AltCLIP": _model("AltCLIP", "Model", BOTH, **TOWERS),
        "X-CLIP": _model(
            "XCLIP",
            "Model",
            {"input_ids": (3, 12), "pixel_values": (2, 4, 3, 64, 64)},
            **{
                **TOWERS,
                "vision_config": {
                    **PATCHES,
                    "mit_hidden_size": 20,
                    "mit_intermediate_size": 40,
                    "mit_num_hidden_layers": 1,
                    "mit_num_attention_heads": 4,
                    "num_frames": 4,
                },
            },
            prompt_num_attention_heads=4,
        ),
        "GroupViT": _model(
            "GroupViT",
            "Model",
            BOTH,
            text_config=TEXT,
            vision_config={
                **PATCHES,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 0],
            },
            projection_dim=20,
            projection_intermediate_dim=28,
        ),
        "BLIP": _model(
            "Blip",
            "ForConditionalGeneration",
            BOTH,
            text_config={**TEXT, "encoder_hidden_size": 48},
            vision_config=PATCHES,
            projection_dim=20,
        ),
        "BLIP for retrieval": _model(
            "Blip",
            "ForImageTextRetrieval",
            BOTH,
            text_config={**TEXT, "encoder_hidden_size": 48},
            vision_config=PATCHES,
            image_text_hidden_size=20,
        ),
        "ViLT": _model("Vilt", "Model", {**BOTH, "pixel_mask": (2, 64, 64)}, **{**TEXT, **PATCHES}),
        "GIT": _model("Git", "ForCausalLM", BOTH, **TEXT, vision_config=PATCHES),
        "OWL-ViT": _model("OwlViT", "Model", BOTH, **TOWERS),
        "BridgeTower": _model(
            "BridgeTower",
            "Model",
            {**BOTH, "attention_mask": (2, 12)},
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            text_config={**TEXT, "hidden_size": 64},
            vision_config={**PATCHES, "hidden_size": 64},
        ),
        "FLAVA": _model("Flava", "TextModel", IDS, config="FlavaTextConfig", **TEXT),
        "Wav2Vec2-BERT": _model(
            "Wav2Vec2Bert", "ForCTC", {"input_features": (2, 20, 16)}, **WAVE, feature_projection_input_dim=16
        ),
        "Decision Transformer": _model(
            "DecisionTransformer",
            "Model",
            {"states": (2, 5, 6), "actions": (2, 5, 3), "returns_to_go": (2, 5, 1), "timesteps_ids": (2, 5)},
            **N_LAYER,
            hidden_size=48,
            state_dim=6,
            act_dim=3,
            max_ep_len=120,
        ),
    }


def _series() -> dict[str, Factory]:
    past: Shapes = {"past_values": (2, 32, 3)}
    return {
        "PatchTST": _model(
            "PatchTST",
            "ForPrediction",
            past,
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            ffn_dim=80,
            prediction_length=8,
        ),
        "PatchTSMixer": _model(
            "PatchTSMixer",
            "ForPrediction",
            past,
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=20,
            num_layers=2,
            prediction_length=8,
        ),
        "Time Series Transformer": _model(
            "TimeSeriesTransformer",
            "Model",
            SERIES_INPUTS,
            **SERIES,
            d_model=48,
            encoder_ffn_dim=80,
            decoder_ffn_dim=72,
        ),
        "Informer": _model(
            "Informer", "Model", SERIES_INPUTS, **SERIES, d_model=48, encoder_ffn_dim=80, decoder_ffn_dim=72
        ),
        "Autoformer": _model(
            "Autoformer", "Model", SERIES_INPUTS, **SERIES, d_model=48, encoder_ffn_dim=80, decoder_ffn_dim=72
        ),
    }


def _model(prefix: str, head: str, shapes: Shapes, *, config: str = "", **options: Any) -> Factory:
    """A model of a class such as BertForMaskedLM, with a BertConfig of these options."""

    def make() -> Example:
        import transformers

        transformers.logging.set_verbosity_error()
        settings = getattr(transformers, config or f"{prefix}Config")(**options)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
        # A name such as inputs_ids says how to draw the values of an argument with another name.
        renamed = {"inputs_ids": "inputs", "timesteps_ids": "timesteps"}
        values = {renamed.get(name, name): value for name, value in inputs(shapes).items()}
        return example(getattr(transformers, prefix + head)(settings), **values)

    return make

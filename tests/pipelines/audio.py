"""Sound: AudioLDM, AudioLDM 2, Stable Audio, LongCat."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from tests.pipelines.parts import calm, unet
from tests.pipelines.registry import PROMPTS, entry
from tests.pipelines.transformers_parts import t5_text
from tests.support.tiny import NOISE_SCHEDULE, WIDTH, autoencoder

SOUND: dict[str, Any] = {"output_type": "np", "guidance_scale": 5.0, "audio_length_in_s": 0.064}
RATE = 16_000


def vocoder() -> nn.Module:
    """Makes 64 samples of each line of a spectrogram with 8 bands."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=RATE, upsample_initial_channel=16, upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )  # fmt: skip
    network = transformers.SpeechT5HifiGan(config)
    calm(network, 8.0)  # louder: its weights are next to nothing
    return network


def spectrogram() -> diffusers.AutoencoderKL:
    return autoencoder(in_channels=1, out_channels=1)


def audio_tokenizer() -> Any:
    """Of bytes."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def clap_text() -> transformers.ClapTextConfig:
    return transformers.ClapTextConfig(
        vocab_size=len(audio_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=40,
        pad_token_id=1,
    )


def clap() -> nn.Module:
    audio = transformers.ClapAudioConfig(
        spec_size=32,
        window_size=4,
        num_mel_bins=16,
        patch_size=4,
        patch_stride=[4, 4],
        patch_embeds_hidden_size=8,
        depths=[1, 1],
        num_hidden_layers=2,
        num_attention_heads=[1, 1],
        hidden_size=16,
        projection_dim=WIDTH,
        enable_fusion=False,
    )
    config = transformers.ClapConfig(
        text_config=clap_text().to_dict(), audio_config=audio.to_dict(), projection_dim=WIDTH
    )
    return transformers.ClapModel(config)


def listener() -> transformers.ClapFeatureExtractor:
    return transformers.ClapFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1
    )


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)


def projected(**config: Any) -> diffusers.UNet2DConditionModel:
    """The prompt is a class."""
    return unet(
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True, cross_attention_dim=(8, 16), **config,
    )  # fmt: skip


@entry(**SOUND)
def audio_ldm() -> diffusers.AudioLDMPipeline:
    return diffusers.AudioLDMPipeline(
        vae=spectrogram(),
        text_encoder=transformers.ClapTextModelWithProjection(clap_text()),
        tokenizer=audio_tokenizer(),
        unet=projected(),
        scheduler=ddim(),
        vocoder=vocoder(),
    )


@entry(**SOUND, prompt=lambda number: PROMPTS[number] or "noise", max_new_tokens=4)
def audio_ldm2() -> diffusers.AudioLDM2Pipeline:
    """GPT-2 makes a caption from the outputs of CLAP and T5."""
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        vocab_size=16,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    text = t5_text("_2")
    text["tokenizer_2"].model_max_length = 32
    network = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(None, WIDTH, WIDTH),
        attention_head_dim=2,
    )
    return diffusers.AudioLDM2Pipeline(
        vae=spectrogram(),
        text_encoder=clap(),
        tokenizer=audio_tokenizer(),
        **text,
        projection_model=diffusers.AudioLDM2ProjectionModel(
            text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=WIDTH
        ),
        language_model=transformers.GPT2LMHeadModel(config),
        feature_extractor=listener(),
        unet=network,
        scheduler=ddim(),
        vocoder=vocoder(),
    )


# Transformers


def t5_limited() -> dict[str, Any]:
    """For pipelines that pad to the tokenizer's own length."""
    text = t5_text()
    text["tokenizer"].model_max_length = 32
    return text


@entry(audio_end_in_s=lambda number: 2.0 + number / 4, output_type="pt", guidance_scale=5.0)
def stable_audio() -> diffusers.StableAudioPipeline:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return diffusers.StableAudioPipeline(
        transformer=transformer,
        vae=vae,
        projection_model=diffusers.StableAudioProjectionModel(WIDTH, WIDTH, 0, 32),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
        **t5_limited(),
    )


@entry(audio_duration_s=2.0, guidance_scale=4.0, output_type="np")
def long_cat_audio_dit() -> diffusers.LongCatAudioDiTPipeline:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=16,
    )
    return diffusers.LongCatAudioDiTPipeline(transformer=transformer, vae=vae, **t5_limited())

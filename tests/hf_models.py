"""Tiny random models of Hugging Face."""

from typing import Any

import transformers

from tests.tiny import randomize


def tiny_llama(is_tied: bool) -> Any:
    """A random `LlamaForCausalLM`."""
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=20,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=is_tied,
    )
    return randomize(transformers.LlamaForCausalLM(config), 0).eval()


def tiny_whisper(form: str) -> Any:
    """A random Whisper: a class with encoder and decoder by its name, or the "encoder" alone."""
    config = transformers.WhisperConfig(
        vocab_size=31,
        num_mel_bins=5,
        d_model=12,
        encoder_layers=3,
        encoder_attention_heads=3,
        encoder_ffn_dim=17,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=13,
        max_source_positions=19,
        max_target_positions=11,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    if form == "encoder":
        return randomize(transformers.WhisperModel(config).encoder, 0).eval()
    return randomize(getattr(transformers, form)(config), 0).eval()

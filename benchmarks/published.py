"""The published towers that the benchmarks run at their real sizes, without their weights."""

from transformers import LlamaConfig, PreTrainedConfig, SmolLM3Config, WhisperConfig

WHISPER_BASE = WhisperConfig(
    d_model=512,
    encoder_layers=6,
    encoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_layers=1,  # unused
    decoder_attention_heads=8,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)

TOWERS: dict[str, PreTrainedConfig] = {
    "openai/whisper-base": WHISPER_BASE,
    "openai/whisper-large-v3-turbo": WhisperConfig(
        d_model=1280,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        num_mel_bins=128,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM3-3B": SmolLM3Config(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    ),
}
"""Their configs, by the ids that the presets name."""

"""The named configs that `train_tpu.py` starts from."""

import dataclasses

from flax_projector.config.models import ProjectorConfig
from flax_projector.config.train import (
    CTCConfig,
    DataConfig,
    OptimizerConfig,
    PromptConfig,
    SpecAugmentConfig,
    TrainConfig,
)

DEMO_SPEECH = "examples/demo/speech"
"""Where the demo's clips are in the repository; they are not part of the installed package."""

RECIPE = "tiny-audio's recipe at commit 060e18c"
"""What the presets of real sizes follow; docs/design.md lists what differs on purpose."""

_WHISPER_BASE_SMOLLM2 = TrainConfig(
    encoder="openai/whisper-base",
    llm="HuggingFaceTB/SmolLM2-135M-Instruct",
    projector=ProjectorConfig(encoder_dim=512, llm_dim=576, projector_pool_stride=2),
    out="runs/whisper-base-smollm2-135m",
    data=DataConfig(batch_size=24),
    accumulation_steps=3,
    spec_augment=SpecAugmentConfig(mask_time_prob=0.05),
    init_output_scale="auto",
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "demo": (
        "Spoken commands on two CPU cores in minutes: what `make demo` runs.",
        dataclasses.replace(
            _WHISPER_BASE_SMOLLM2,
            projector=ProjectorConfig(encoder_dim=512, llm_dim=576, projector_pool_stride=4),
            out="runs/demo",
            prompt=PromptConfig(system=""),
            data=DataConfig(
                train=(f"{DEMO_SPEECH}/train.jsonl",),
                eval=(
                    f"{DEMO_SPEECH}/heldout_seen_voices.jsonl",
                    f"{DEMO_SPEECH}/heldout_unseen_voices.jsonl",
                ),
                window_secs=4.0,
                bucket_secs=(2.1, 2.5, 4.0),
                batch_size=4,
                max_text_tokens=20,
                eval_batch_size=64,
                cache_features=True,
            ),
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=40),
            ctc=CTCConfig(num_steps=600),
            accumulation_steps=1,
            spec_augment=SpecAugmentConfig(),
            dtype="float32",
            num_steps=1000,
            eval_every_steps=100,
            save_every_steps=100,
            max_new_tokens=24,
        ),
    ),
    "whisper-base-smollm2-135m": (
        f"The smallest pair of real towers, with {RECIPE}.",
        _WHISPER_BASE_SMOLLM2,
    ),
    "whisper-turbo-smollm3-3b": (
        f"tiny-audio's published pair of towers, with {RECIPE}.",
        dataclasses.replace(
            _WHISPER_BASE_SMOLLM2,
            encoder="openai/whisper-large-v3-turbo",
            llm="HuggingFaceTB/SmolLM3-3B",
            projector=ProjectorConfig(encoder_dim=1280, llm_dim=2048, projector_pool_stride=2),
            out="runs/whisper-turbo-smollm3-3b",
            remat="gates",
        ),
    ),
    "tiny": (
        "A few steps with towers of a few parameters, to test a set-up: pass both folders.",
        TrainConfig(
            encoder="whisper-tiny-random",
            llm="llama-tiny-random",
            projector=ProjectorConfig(encoder_dim=24, llm_dim=40, projector_hidden_dim=32),
            out="runs/tiny",
            data=DataConfig(
                eval_batch_size=8, window_secs=2.0, bucket_secs=(1.0, 2.0), max_text_tokens=20
            ),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            dtype="float32",
            num_steps=6,
            log_every_steps=1,
            eval_every_steps=0,
            save_every_steps=2,
            max_new_tokens=5,
        ),
    ),
}

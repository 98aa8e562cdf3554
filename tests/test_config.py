"""Configuration: defaults, checks, and what may change when a run is resumed."""

import dataclasses
import functools
import re
from typing import Annotated

import pytest

from flax_projector.config import (
    PRESETS,
    Changes,
    CTCConfig,
    DataConfig,
    DistributedConfig,
    Llama3RopeScaling,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    ProjectorConfig,
    PromptConfig,
    SpecAugmentConfig,
    TrainConfig,
    WhisperConfig,
    changes,
    fields,
    from_json,
    to_json,
)

WHISPER = {
    "num_mel_bins": 80,
    "d_model": 12,
    "encoder_layers": 1,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 8,
}
LLAMA = {
    "vocab_size": 7,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 2,
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("encoder_dim", 3.5, "a whole number"),
        ("encoder_dim", "64", "a whole number"),
        ("encoder_dim", True, "a whole number"),
        ("encoder_dim", None, "a whole number"),
        ("projector_hidden_dim", 2.5, "a whole number or None"),
        ("projector_init_std", float("inf"), "a finite number"),
        ("rms_norm_eps", float("nan"), "a finite number"),
        ("rms_norm_eps", "1e-6", "a finite number"),
    ],
)
def test_a_field_that_is_no_number_is_an_error(name, value, expected):
    config = ProjectorConfig(encoder_dim=3, llm_dim=5)
    object.__setattr__(config, name, value)  # the types of `__init__` may be checked themselves
    with pytest.raises(ValueError) as error:
        config.__post_init__()
    assert str(error.value) == f"ProjectorConfig.{name} = {value!r}: must be {expected}"


@pytest.mark.parametrize("hidden", [None, 0])
def test_hidden_dim_falls_back_to_four_times_the_llm(hidden):
    config = ProjectorConfig(encoder_dim=3, llm_dim=5, projector_hidden_dim=hidden)
    assert config.hidden_dim == 20


@pytest.mark.parametrize(
    ("cls", "valid", "wrong", "message"),
    [
        (ProjectorConfig, {"encoder_dim": 3, "llm_dim": 5}, {"encoder_dim": 0}, "encoder_dim = 0"),
        (
            ProjectorConfig,
            {"encoder_dim": 3, "llm_dim": 5},
            {"projector_dropout": 1.0, "projector_pool_stride": 0},
            "projector_pool_stride = 0: must be at least 1\n.*projector_dropout = 1.0",
        ),
        (WhisperConfig, WHISPER, {"encoder_attention_heads": 5}, "multiple of encoder_attention"),
        (LlamaConfig, LLAMA, {"num_key_value_heads": 4}, "multiple of num_key_value_heads = 4"),
        (MeshConfig, {}, {"fsdp": 0}, "fsdp = 0"),
        (DataConfig, {}, {"bucket_secs": (2.0, 1.0)}, "ascending"),
        (DataConfig, {}, {"bucket_secs": ()}, "not empty"),
        (DataConfig, {}, {"bucket_secs": (40.0,)}, "beyond the encoder's window of 30"),
        (DataConfig, {}, {"window_secs": 15.001}, "multiple of 0.02"),
    ],
)
def test_wrong_values_name_field_value_and_rule(cls, valid, wrong, message):
    cls(**valid)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        cls(**{**valid, **wrong})


CONFIGS = [
    *(WhisperConfig, LlamaConfig, Llama3RopeScaling, ProjectorConfig, PromptConfig, MeshConfig),
    *(DistributedConfig, DataConfig, OptimizerConfig, SpecAugmentConfig, CTCConfig, TrainConfig),
]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_annotation_is_a_rule_that_is_known(cls):
    """`check` would raise a TypeError for a note that it does not understand."""
    fields._rules(cls)
    number_rules = {name for name, rules in fields._rules(cls).items() if rules}
    without = set(fields.number_fields(cls)) - number_rules - {"seed"}
    assert not without, f"numbers without a rule: {sorted(without)}"


def test_an_unknown_annotation_is_an_error():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        size: Annotated[int, "positive"] = 1

    with pytest.raises(TypeError, match="no rule is known for the annotation 'positive'"):
        fields.check(Odd())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_run_folder(name):
    config = PRESETS[name][1]
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("value", ["auto", 0.13, 3.0])
def test_the_last_norm_starts_at_a_positive_number_or_auto(value):
    config = dataclasses.replace(PRESETS["tiny"][1], init_output_scale=value)
    assert from_json(to_json(config)).init_output_scale == value


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), True, None, "aut", "0.1"])
def test_another_start_of_the_last_norm_is_an_error(value):
    config = dataclasses.replace(PRESETS["tiny"][1])
    object.__setattr__(config, "init_output_scale", value)  # types may be checked before the rule
    with pytest.raises(ValueError) as error:
        config.__post_init__()
    rule = "must be a finite number greater than 0, or auto"
    assert str(error.value) == f"--init-output-scale = {value!r}: {rule}"


RECIPE = {  # the residual experiment of tiny-audio at commit 060e18c
    "projector.projector_pool_stride": 2,  # 25 audio tokens per second
    "projector.projector_dropout": 0.0,
    "data.batch_size": 8 * 3,
    "accumulation_steps": 3,
    "data.bucket_secs": 15.0,  # the last one: longer clips are dropped
    "data.window_secs": 30.0,
    "num_steps": 20_000,
    "ctc.num_steps": 0,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 500,
    "optimizer.final_lr_rate": 0.0,  # the cosine ends at zero
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "spec_augment.mask_time_prob": 0.05,
    "spec_augment.mask_time_length": 10,
    "spec_augment.mask_time_min_masks": 2,
}


@pytest.mark.parametrize("preset", ["whisper-base-smollm2-135m", "whisper-turbo-smollm3-3b"])
@pytest.mark.parametrize(("option", "expected"), RECIPE.items())
def test_presets_of_real_sizes_equal_the_recipe_that_they_name(preset, option, expected):
    description, config = PRESETS[preset]
    assert "commit 060e18c" in description
    value = functools.reduce(getattr, option.split("."), config)
    assert (value[-1] if isinstance(value, tuple) else value) == expected


def test_unknown_saved_field_is_an_error():
    text = to_json(PRESETS["demo"][1]).replace('"seed"', '"sede"')
    with pytest.raises(ValueError, match=r"no field.*sede"):
        from_json(text)


def test_only_harmless_changes_pass_unnoticed():
    config = PRESETS["demo"][1]
    data = dataclasses.replace(config.data, batch_size=16)
    changed = dataclasses.replace(config, data=data, keep_checkpoints=9, mesh=MeshConfig(fsdp=2))
    found = changes(config, changed)
    assert list(found.refused.values()) == ["--data.batch-size: 4 -> 16"]
    assert list(found.allowed) == ["mesh.fsdp", "keep_checkpoints"]
    assert not found.moved


def test_what_says_where_a_process_runs_is_neither_saved_nor_compared():
    config = PRESETS["demo"][1]
    flags = DistributedConfig(coordinator="host:9", num_processes=2, process_id=1)
    ours = dataclasses.replace(config, distributed=flags)
    assert to_json(ours) == to_json(config) and "distributed" not in to_json(ours)
    assert changes(config, ours) == Changes({}, {}, {})
    by_0_1_0 = to_json(config).replace("{", '{"distributed": true,', 1)
    assert from_json(by_0_1_0) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"coordinator": "host:9"},
            "--distributed.coordinator must be given with --distributed.num-processes and "
            "--distributed.process-id",
        ),
        (
            {"num_processes": 1, "process_id": 0},
            "--distributed.num-processes and --distributed.process-id must be given with "
            "--distributed.coordinator",
        ),
        ({"num_processes": 2}, "--distributed.num-processes must be given with"),
        ({"num_processes": 0}, "--distributed.num-processes = 0: must be at least 1"),
        (
            {"coordinator": "host:9", "num_processes": 2, "process_id": 2},
            "--distributed.process-id = 2: must be less than --distributed.num-processes 2",
        ),
        ({"coordinator": "host:9", "num_processes": 2, "process_id": -1}, "-1: must be at least 0"),
        *(
            ({"coordinator": address}, "must be given as HOST:PORT")
            for address in ("", "host", "host:", ":9", "host:x", "host:0", "host:65536", "::1:9")
        ),
    ],
)
def test_flags_that_name_no_process_are_an_error(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DistributedConfig(**flags)


@pytest.mark.parametrize("address", ["host:9", "10.0.0.1:65535", "[::1]:8476", "a-0.b.c:1"])
def test_addresses_of_process_0(address):
    DistributedConfig(coordinator=address, num_processes=2, process_id=0)


def test_what_is_learnt_from_may_be_named_by_another_path():
    config = PRESETS["demo"][1]
    data = dataclasses.replace(config.data, train=("moved.jsonl",))
    moved = dataclasses.replace(config, data=data, encoder="a", llm="b", init_projector="c")
    found = changes(config, moved)
    assert list(found.moved) == ["encoder", "llm", "data.train", "init_projector"]
    assert not found.refused and not found.allowed


def test_labels_and_audio_tokens_stay_those_that_a_run_began_with():
    config = PRESETS["demo"][1]
    data = dataclasses.replace(config.data, text_case="lower", audio_tokens="window")
    found = changes(config, dataclasses.replace(config, data=data))
    assert list(found.refused) == ["data.audio_tokens", "data.text_case"]
    assert not found.allowed and not found.moved

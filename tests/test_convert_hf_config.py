"""config.json says the same on both sides, or the conversion stops."""

import dataclasses
import json

import pytest

from convert import hf_config
from convert.errors import ConversionError
from flax_projector.config import (
    DataConfig,
    LlamaConfig,
    ProjectorConfig,
    TrainConfig,
    WhisperConfig,
)
from tests.checkpoints import PROMPT, UPSTREAM

PROJECTOR = ProjectorConfig(5, 7, projector_pool_stride=3, rms_norm_eps=1e-8)
WHISPER = WhisperConfig(5, 6, 3, 2, 11, max_source_positions=13)
LLAMA = LlamaConfig(13, 12, 7, 3, 4, 2, head_dim=8, rms_norm_eps=1e-5, rope_theta=130000.0)


def projector_dict(config=PROJECTOR):
    return hf_config.projector_config_dict(config, dtype="bfloat16")


# Of LlamaConfig, under other names or in another form in config.json.
OUR_FIELDS = {"rope_scaling", "no_rope_layers", "qkv_bias", "o_bias", "qk_norm"}
CASES = {
    "projector": (hf_config.parse_projector, PROJECTOR, projector_dict()),
    "whisper": (
        hf_config.parse_whisper,
        WHISPER,
        {"model_type": "whisper", "activation_function": "gelu", **dataclasses.asdict(WHISPER)},
    ),
    "llama": (
        hf_config.parse_llama,
        LLAMA,
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            **{k: v for k, v in dataclasses.asdict(LLAMA).items() if k not in OUR_FIELDS},
            "rope_parameters": {"rope_type": "default", "rope_theta": LLAMA.rope_theta},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_config_comes_back(name) -> None:
    parse, config, data = CASES[name]
    assert parse(json.loads(hf_config.config_text(data))) == config


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("projector", "projector_type", "moe", "projector_type  = 'moe', supported: 'residual'"),
        ("projector", "model_type", "llama", "model_type  = 'llama', supported: 'asr_model'"),
        ("whisper", "activation_function", "relu", "= 'relu', supported: 'gelu'"),
        ("whisper", "scale_embedding", True, "scale_embedding  = True, supported: False"),
        ("whisper", "model_type", "bert", "model_type  = 'bert'"),
        ("llama", "hidden_act", "gelu", "hidden_act  = 'gelu', supported: 'silu'"),
        ("llama", "model_type", "gpt2", "model_type  = 'gpt2', supported: 'llama' or 'qwen2' or"),
        ("llama", "layer_types", ["full_attention", "linear_attention"], "= 'linear_attention'"),
        ("llama", "mlp_bias", True, "mlp_bias  = True, supported: False"),
        (
            "llama",
            "rope_scaling",
            {"type": "linear", "factor": 2},
            "rope_type  = 'linear', supp",
        ),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "llama3"},
            "missing  high_freq_factor ",
        ),
        ("llama", "rope_parameters", {"rope_type": "yarn"}, "rope_type  = 'yarn', supported: 'def"),
        ("llama", "is_causal", False, "is_causal  = False, supported: True"),
        ("llama", "sliding_window", 128, "sliding_window  = 128, supported: None"),
        ("llama", "quantization_config", {"bits": 4}, "quantization_config  = {'bits': 4}"),
    ],
)
def test_value_that_cannot_be_expressed_is_an_error(name, field, value, message) -> None:
    parse, _, data = CASES[name]
    with pytest.raises(ConversionError) as caught:
        parse({**data, field: value}, "here/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("here/config.json cannot be read as a ")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *[("projector", f) for f in ("encoder_dim", "projector_pool_stride", "model_type")],
        *[("whisper", f.name) for f in dataclasses.fields(WhisperConfig)],
        *[("llama", f) for f in ("vocab_size", "rms_norm_eps", "num_hidden_layers")],
    ],
)
def test_missing_field_is_an_error(name, field) -> None:
    parse, _, data = CASES[name]
    with pytest.raises(ConversionError, match=f"missing  {field}  is not in the file"):
        parse({k: v for k, v in data.items() if k != field})
    with pytest.raises(ConversionError, match=f"{field}  (is null|= None)"):
        parse({**data, field: None})


@pytest.mark.parametrize("value", ["7", -7, []])
def test_value_of_the_wrong_kind_is_an_error(value) -> None:
    with pytest.raises(ValueError, match=r"^here/config.json: "):
        hf_config.parse_whisper({**CASES["whisper"][2], "num_mel_bins": value}, "here/config.json")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model_type", ["llama"], "a string"),
        ("num_attention_heads", "4", "an integer"),
        ("num_attention_heads", True, "an integer"),
        ("hidden_size", 12.5, "an integer"),
        ("num_hidden_layers", "3", "an integer"),
        ("rope_scaling", "linear", "an object"),
        ("rope_scaling", ["linear", 2.0], "an object"),
        ("rope_parameters", 3, "an object"),
        ("layer_types", "full_attention", "a list"),
        ("no_rope_layers", {"0": 1}, "a list"),
        ("use_sliding_window", "false", "true or false"),
        ("attention_bias", 1, "true or false"),
    ],
)
def test_type_of_what_is_computed_with_is_checked(field, value, expected) -> None:
    with pytest.raises(ConversionError) as caught:
        hf_config.parse_llama({**CASES["llama"][2], field: value}, "here/config.json")
    assert str(caught.value).startswith("here/config.json cannot be read as a ")
    assert f"type  {field}  = {value!r}, expected {expected}" in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("factor", "8"), ("factor", None), ("factor", -1)])
def test_wrong_scaling_of_rope_is_an_error(field, value) -> None:
    rope = {"rope_parameters": LLAMA3 | {field: value}}
    with pytest.raises(ValueError, match=r"^here/config.json: "):
        hf_config.parse_llama({**CASES["llama"][2], **rope}, "here/config.json")


def test_layer_type_may_be_anything() -> None:
    data = {**CASES["llama"][2], "layer_types": ["full_attention", {"a": 1}, 3]}
    with pytest.raises(ConversionError, match=r"layer_types  = {'a': 1}, supported: 'full_atten"):
        hf_config.parse_llama(data)


def test_rope_theta_is_read_from_its_old_and_its_new_place() -> None:
    data = dict(CASES["llama"][2])
    old = {k: v for k, v in data.items() if k != "rope_parameters"}
    new = {k: v for k, v in data.items() if k != "rope_theta"}
    assert hf_config.parse_llama(old) == hf_config.parse_llama(new) == LLAMA
    neither = {k: v for k, v in old.items() if k != "rope_theta"}
    assert hf_config.parse_llama(neither).rope_theta == 10_000  # as transformers


def smollm3_dict(**changes) -> dict:
    return {**CASES["llama"][2], "model_type": "smollm3", "num_hidden_layers": 8, **changes}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (3, 7)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, (2, 5)),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 1, 0, 1]}, (0, 6)),
        ({"no_rope_layers": [0] * 8, "model_type": "llama"}, ()),
    ],
    ids=["absent", "interval", "marks", "another family"],
)
def test_layers_without_rope_are_those_of_transformers(changes, layers) -> None:
    assert hf_config.parse_llama(smollm3_dict(**changes)).no_rope_layers == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [0, 1]}, "no_rope_layers  has 2 marks for 8 layers"),
        ({"no_rope_layers": [0, 1, 1, "x"] * 2}, "no_rope_layers  = .*, expected marks of 0 or 1"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval  = 0, expected at least 1"),
        ({"no_rope_layer_interval": None}, "no_rope_layer_interval  = None, expected at least 1"),
        ({"no_rope_layer_interval": 2.5}, "no_rope_layer_interval  = 2.5, expected an integer"),
    ],
)
def test_layers_without_rope_that_make_no_sense_are_an_error(changes, message) -> None:
    with pytest.raises(ConversionError, match=message):
        hf_config.parse_llama(smollm3_dict(**changes))


@pytest.mark.torch
@pytest.mark.parametrize("family", hf_config.LLAMA_FAMILY)
def test_absent_fields_are_what_transformers_takes_them_to_be(family) -> None:
    import transformers

    names = ("vocab_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    data = {name: CASES["llama"][2][name] for name in names}
    data |= {"num_attention_heads": 64, "hidden_size": 256, "num_hidden_layers": 5}
    ours = hf_config.parse_llama({"model_type": family, **data})
    theirs = transformers.AutoConfig.for_model(family, **data)
    for name in ("num_key_value_heads", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 64)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    marks = getattr(theirs, "no_rope_layers", [1] * 5)
    assert ours.no_rope_layers == tuple(i for i in range(5) if not marks[i])


def test_rope_type_may_be_absent() -> None:
    data = {**CASES["llama"][2], "rope_parameters": {"rope_theta": LLAMA.rope_theta}}
    assert hf_config.parse_llama(data) == LLAMA


@pytest.mark.parametrize(("family", "biases"), [("llama", (True, True)), ("qwen2", (True, False))])
def test_biases_of_qwen2_are_fixed_in_its_code(family, biases) -> None:
    data = {**CASES["llama"][2], "model_type": family, "attention_bias": True}
    config = hf_config.parse_llama(data)
    assert (config.qkv_bias, config.o_bias) == biases


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_sliding_window_is_refused_if_it_is_used(family) -> None:
    data = {**CASES["llama"][2], "model_type": family}
    hf_config.parse_llama({**data, "sliding_window": 4096, "use_sliding_window": False})
    hf_config.parse_llama({**data, "sliding_window": 4096})
    with pytest.raises(ConversionError, match="sliding_window  = 128, supported: None"):
        hf_config.parse_llama({**data, "sliding_window": 128, "use_sliding_window": True})
    if family == "smollm3":  # has no window unless it says so
        hf_config.parse_llama({**data, "use_sliding_window": True})
    else:
        with pytest.raises(ConversionError, match="sliding_window  = 4096, supported: None"):
            hf_config.parse_llama({**data, "use_sliding_window": True})


def test_odd_head_dim_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"LlamaConfig.head_dim = 7: must be a multiple of .* = 2"):
        hf_config.parse_llama({**CASES["llama"][2], "head_dim": 7})


@pytest.mark.parametrize("absent", [{}, {"head_dim": None}])
def test_absent_head_dim_follows_from_the_heads(absent) -> None:
    data = {k: v for k, v in CASES["llama"][2].items() if k != "head_dim"}
    assert hf_config.parse_llama(data | absent | {"hidden_size": 24}).head_dim == 24 // 4


@pytest.mark.parametrize(("stored", "hidden"), [(None, 28), (0, 28), (11, 11)])
def test_hidden_dim_may_be_left_open(stored, hidden) -> None:
    data = projector_dict() | {"projector_hidden_dim": stored}
    assert hf_config.parse_projector(data).hidden_dim == hidden


def test_absent_projector_type_is_the_residual_one() -> None:
    data = {k: v for k, v in projector_dict().items() if k != "projector_type"}
    assert hf_config.parse_projector(data) == PROJECTOR


def test_trained_projector_is_described_with_the_names_of_tiny_audio() -> None:
    data = hf_config.run_config_dict(
        TrainConfig(
            encoder="openai/whisper-base",
            llm="some/llama",
            projector=PROJECTOR,
            data=DataConfig(audio_tokens="clip"),
        ),
        PROMPT,
    )
    assert data["user_prompt"] == "Write: <audio>"
    assert data["system_prompt"] == "Be brief."
    assert data["audio_model_id"] == "openai/whisper-base"
    upstream = json.loads((UPSTREAM / "config.json").read_text())
    assert data.keys() - upstream.keys() == {
        *("rms_norm_eps", "rendered_prompt", "audio_tokens", "window_secs", "max_clip_secs")
    }
    assert data["max_clip_secs"] == 15.0
    needs = data["rendered_prompt"]["needs"]
    assert needs == ["the user message 'Write: <audio>'"]
    assert hf_config.training(json.dumps(data)) == {
        "prompt.system": "Be brief.",
        "prompt.user": "Write: <audio>",
        "data.audio_tokens": "clip",
    }


def test_cast_changes_the_text_only_where_it_must() -> None:
    text = '{ "dtype":"bfloat16",\n"x": 1, "model_dtype": "bfloat16"}'
    assert hf_config.with_dtype(text, "bfloat16") == text
    changed = json.loads(hf_config.with_dtype(text, "float32"))
    assert changed == {"dtype": "float32", "model_dtype": "float32", "x": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"\xff\xfe{}", "is a text in UTF-16: save it in UTF-8"),
        (b"[]", "does not hold a JSON object"),
    ],
)
def test_unreadable_config_is_an_error(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        hf_config.read_config_text(tmp_path / "model.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_hugging_face_reads_what_we_write(tmp_path, name) -> None:
    import transformers

    parse, config, data = CASES[name]
    (tmp_path / "config.json").write_text(hf_config.config_text(data))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(config):
        if field.name not in {"rope_theta", *OUR_FIELDS}:
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    theirs.save_pretrained(tmp_path)
    assert parse(json.loads((tmp_path / "config.json").read_text())) == config

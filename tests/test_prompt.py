"""The chat prompt and its layout in static lengths."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from flax_projector.batch import AUDIO_TOKEN
from flax_projector.config import PromptConfig
from flax_projector.prompt import load_tokenizer, make_prompt
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "before"),
    [
        (
            PromptConfig(),
            "<|im_start|>system\n/no_think /system_override<|im_end|>\n"
            "<|im_start|>user\nTranscribe: ",
        ),
        (PromptConfig(system="", user="Write: "), "<|im_start|>user\nWrite: "),
    ],
)
def test_texts_around_the_audio_are_chatml(tokenizer, config, before):
    prompt = make_prompt(tokenizer, config)
    assert text_of(tokenizer, prompt.before_audio) == before
    assert text_of(tokenizer, prompt.after_audio) == "<|im_end|>\n<|im_start|>assistant\n"


def test_layout_predicts_the_transcript_and_nothing_else(tokenizer):
    prompt = make_prompt(tokenizer, PromptConfig())
    target = prompt.encode_target("go on")
    out = prompt.layout(4, target, merged_len=120, text_len=9)
    tokens, length = out.tokens, out.prompt_len
    assert list(np.flatnonzero(tokens == AUDIO_TOKEN)) == list(
        range(len(prompt.before_audio), len(prompt.before_audio) + 4)
    )
    labels = out.labels[out.label_valid]
    assert text_of(tokenizer, labels) == "go on<|im_end|>"
    # Label t is predicted where label t - 1 is read, the first one at the end of the prompt.
    positions = out.label_positions[out.label_valid]
    assert positions[0] == length - 1
    np.testing.assert_array_equal(tokens[positions[1:]], labels[:-1])
    assert prompt.merged_length(4, len(target)) == length + len(target) - 1


@pytest.mark.parametrize(("merged_len", "text_len"), [(20, 30), (120, 3)])
def test_what_does_not_fit_is_an_error_not_a_cut(tokenizer, merged_len, text_len):
    prompt = make_prompt(tokenizer, PromptConfig(system=""))
    with pytest.raises(ValueError, match="need length"):
        prompt.layout(4, prompt.encode_target("go on"), merged_len=merged_len, text_len=text_len)


def test_decoding_stops_at_the_end_of_turn(tokenizer):
    prompt = make_prompt(tokenizer, PromptConfig())
    ids = (*prompt.encode_target("go on"), *tokenizer.encode("and on").ids)
    assert prompt.decode(ids) == "go on"


def test_a_tokenizer_without_chatml_is_refused():
    with pytest.raises(ValueError, match="only ChatML models are supported"):
        make_prompt(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), PromptConfig())


def test_missing_tokenizer_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)

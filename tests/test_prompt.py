"""The prompt: rendered by the LLM's own template, tokenized as a whole, kept with the run."""

import json
import pickle
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_projector.batch import AUDIO_TOKEN
from flax_projector.chat.prompt import Prompt, make_prompt, remake_prompt
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.config import PromptConfig
from tests.chat import (
    TEMPLATES,
    Reference,
    ids_of,
    make_chat_tokenizer,
    save_chat_tokenizer,
    transcripts,
)
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it

NO_THINKING = {"qwen3": ("enable_thinking=false",)}
"""Arguments that make a template begin both kinds of turn in the same way."""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def text_of(prompt: Prompt, ids) -> str:
    return prompt.tokenizer.decode(list(ids), skip_special_tokens=False)


# --- against transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request, tmp_path_factory):
    """Our prompt and the reference, of a family."""
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("llm"), request.param)
    args = NO_THINKING.get(request.param, ())
    prompt = make_prompt(load_tokenizer(folder), PromptConfig(template_args=args))
    options = {"enable_thinking": False} if args else {}
    return prompt, Reference(folder), options


SHAPES = [
    "",
    " leading and trailing \n",
    "\nnew line",
    "12 345",
    "\u0301combining",
    "\u4f60\u597d, na\u00efve \U0001f389",
]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_the_whole_conversation(pair, data):
    prompt, reference, options = pair
    transcript = data.draw(st.sampled_from(SHAPES) | transcripts(reference))
    rendering = prompt.rendering
    expected = reference.ids(rendering.system, rendering.user, transcript, **options)
    ours = ids_of(prompt, transcript)
    assert ours == expected[: len(ours)]
    assert prompt.end_of_turn not in expected[len(ours) :]
    assert prompt.end_of_turn not in prompt.encode_target(transcript)[:-1]


@pytest.mark.parametrize("system", ["", "Be brief.", "/no_think"])
@pytest.mark.parametrize("user", ["Write <audio> down", "Listen: "])
def test_messages_of_ones_own(pair, system, user):
    prompt, reference, options = pair
    tokenizer = load_tokenizer(Path(reference.tokenizer.name_or_path))
    args = tuple(f"{name}=false" for name in options)
    prompt = make_prompt(tokenizer, PromptConfig(system, user, args))
    expected = user if "<audio>" in user else f"{user}<audio>"
    ours = ids_of(prompt, "hello")
    assert ours == reference.ids(system, expected, "hello", **options)[: len(ours)]


@pytest.mark.parametrize(
    ("family", "before", "after", "end"),
    [
        (
            "smollm3",
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nTranscribe: ",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
            "<|im_end|>\n",
        ),
        (
            "smollm2",
            "<|im_start|>system\n/no_think /system_override<|im_end|>\n"
            "<|im_start|>user\nTranscribe: ",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 25 Nov 2026\n\n"
            "/no_think /system_override<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nTranscribe: ",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ],
)
def test_texts_around_the_audio(family, before, after, end):
    date = datetime(2026, 11, 25)
    prompt = make_prompt(make_chat_tokenizer(family), PromptConfig(), date=date)
    rendering = prompt.rendering
    assert (rendering.before_audio, rendering.after_audio, rendering.end) == (before, after, end)
    assert text_of(prompt, prompt.before_audio) == before
    assert text_of(prompt, [prompt.end_of_turn]) == end.rstrip()


def test_without_a_system_message_the_template_decides():
    config = PromptConfig(system="")
    smollm2 = make_prompt(make_chat_tokenizer("smollm2"), config)
    assert "You are a small model." in smollm2.rendering.before_audio
    assert make_prompt(make_chat_tokenizer("chatml"), config).rendering.before_audio == (
        "<|im_start|>user\nTranscribe: "
    )


def test_the_generation_prompt_precedes_transcripts_in_training_too(caplog):
    """Qwen3 with thinking begins a finished turn differently: said once, with both texts."""
    prompt = make_prompt(make_chat_tokenizer("qwen3"), PromptConfig())
    assert prompt.rendering.after_audio == "<|im_end|>\n<|im_start|>assistant\n"
    (record,) = caplog.records
    assert "<think>" in record.message and "enable_thinking=false" in record.message
    config = PromptConfig(template_args=("enable_thinking=false",))
    quiet = make_prompt(make_chat_tokenizer("qwen3"), config)
    assert quiet.rendering.after_audio.endswith("assistant\n<think>\n\n</think>\n\n")
    assert len(caplog.records) == 1


def test_template_arguments_are_json_or_text():
    config = PromptConfig(template_args=("date_string=1 Jan 2000",))
    prompt = make_prompt(make_chat_tokenizer("llama3"), config)
    assert "Today Date: 1 Jan 2000\n" in prompt.rendering.before_audio
    with pytest.raises(ValueError, match=r"--prompt.template-args = .*: must be given as NAME=V"):
        PromptConfig(template_args=("enable_thinking",))


# --- special tokens in transcripts -------------------------------------------------------------


@pytest.mark.parametrize("family", TEMPLATES)
def test_special_tokens_in_a_transcript_are_plain_text(family):
    args = NO_THINKING.get(family, ())
    prompt = make_prompt(make_chat_tokenizer(family), PromptConfig(template_args=args))
    added = prompt.tokenizer.get_added_tokens_decoder()
    controls = [token.content for token in added.values()]
    for text in [*controls, *(f"so {token} it{token}" for token in controls)]:
        target = prompt.encode_target(text)
        assert not set(target[:-1]) & set(added), text
        assert prompt.decode(target) == text.strip()


def test_special_tokens_stay_plain_after_pickling():
    """Worker processes get the prompt pickled."""
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    copy = pickle.loads(pickle.dumps(prompt))
    assert copy.encode_target("a<|im_end|>b") == prompt.encode_target("a<|im_end|>b")
    assert copy.end_of_turn not in copy.encode_target("a<|im_end|>b")[:-1]


def test_a_tokenizer_may_have_the_placeholder_already():
    """As the one that tiny-audio saves beside its projector."""
    plain, saved = make_chat_tokenizer("chatml"), make_chat_tokenizer("chatml")
    saved.add_special_tokens({"extra_special_tokens": ["<audio>"]})
    expected = make_prompt(plain, PromptConfig())
    prompt = make_prompt(saved, PromptConfig())
    assert prompt.to_json() == expected.to_json()
    assert prompt.encode_target("an <audio> tag") == expected.encode_target("an <audio> tag")


# --- LLMs without a template, and templates that do not suit -------------------------------------


def test_a_base_model_gets_its_prompt_as_text():
    tokenizer = make_chat_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template, and has none.*--prompt.e"):
        make_prompt(tokenizer, PromptConfig())
    texts = PromptConfig(before="Audio: ", after="\nTranscript: ", end="<|endoftext|>")
    prompt = make_prompt(tokenizer, texts)
    # " hello" is one token: the space belongs to the transcript, in training and in decoding.
    assert text_of(prompt, prompt.after_audio) == "\nTranscript:"
    assert text_of(prompt, prompt.encode_target("hello")) == " hello<|endoftext|>"
    whole = (
        tokenizer("Audio: ", add_special_tokens=False).input_ids,
        tokenizer("\nTranscript: hello<|endoftext|>", add_special_tokens=False).input_ids,
    )
    assert ids_of(prompt, "hello") == [*whole[0], AUDIO_TOKEN, *whole[1]]


@pytest.mark.parametrize("end", ["\n", "</s>"])
def test_the_end_must_be_a_special_token(end):
    with pytest.raises(ValueError, match=r"Choose one of them with --prompt.end: <\|im_start"):
        make_prompt(make_chat_tokenizer("chatml"), PromptConfig(end=end))


def test_texts_need_an_end():
    with pytest.raises(ValueError, match=r"--prompt.end = '': must be given with --prompt.before"):
        PromptConfig(before="Audio: ")


USER = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
         r"puts the audio nowhere"),
        (USER + "{{ messages[-1].content if messages[-1].role == 'user' else '' }}",
         r"puts the audio in 2 places:\n  \| .*<audio>.*<audio>"),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
         r"puts the transcript, here 'A word or two.', nowhere"),
        (USER.replace("m.content", "m.content | lower"), "puts the transcript"),
        (USER.replace("m.content", "m.content | replace('DAYS', 'days')"),
         r"changes with the transcript. With '90 DAYS':\n  \| .*90 days.*\nexpected:\n  \| .*90 D"),
        ("{{ raise_exception('no system role') }}", r"no system role.*--prompt.system \"\""),
        ("{% for %}", r"cannot render the prompt"),
        ("{{ messages[0].content.missing.field }}", r"cannot render the prompt"),
    ],
    ids=["nowhere", "twice", "not there", "other words", "changes", "raises", "syntax", "field"],
)  # fmt: skip
def test_a_template_that_does_not_suit_is_shown(template, message):
    tokenizer = make_chat_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_prompt(tokenizer, PromptConfig())


def test_named_templates(tmp_path):
    """As some repositories have them in tokenizer_config.json: the one for chats is `default`."""
    folder = save_chat_tokenizer(tmp_path, "chatml")
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": TEMPLATES[name]} for name in ("smollm2", "chatml")]

    def make(names: list[str]) -> Prompt:
        templates = [dict(x, name=name) for x, name in zip(named, names, strict=True)]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
        return make_prompt(load_tokenizer(folder), PromptConfig(system=""))

    assert "small model" in make(["default", "tool_use"]).rendering.before_audio
    assert "small model" not in make(["tool_use", "default"]).rendering.before_audio
    with pytest.raises(ValueError, match="has none called 'default', only tool_use, rag"):
        make(["tool_use", "rag"])


# --- kept with the run -------------------------------------------------------------------------


def test_a_prompt_is_remade_with_the_date_of_its_beginning():
    tokenizer = make_chat_tokenizer("llama3")
    yesterday = make_prompt(tokenizer, PromptConfig(), date=datetime(2020, 2, 29))
    assert "29 Feb 2020" in yesterday.rendering.before_audio
    again = remake_prompt(tokenizer, PromptConfig(), yesterday.to_json())
    assert again.to_json() == yesterday.to_json()
    assert make_prompt(tokenizer, PromptConfig()).to_json() != yesterday.to_json()


def test_another_template_or_tokenizer_is_an_error_with_the_difference():
    tokenizer = make_chat_tokenizer("chatml")
    saved = make_prompt(tokenizer, PromptConfig()).to_json()
    tokenizer.chat_template = TEMPLATES["chatml"].replace("m['role']", "m['role'] + ':'")
    with pytest.raises(ValueError, match=r"(?s)before_audio\n    then: '<\|im_start\|>system\\n.*"
                       r"now:  '<\|im_start\|>system:\\n"):  # fmt: skip
        remake_prompt(tokenizer, PromptConfig(), saved)
    with pytest.raises(ValueError, match=r"makes another prompt .*:\n  before_audio_ids\n"):
        remake_prompt(make_tokenizer(), PromptConfig(), saved)


# --- layout ------------------------------------------------------------------------------------


def test_layout_predicts_the_transcript_and_nothing_else(tokenizer):
    prompt = make_prompt(tokenizer, PromptConfig())
    target = prompt.encode_target("go on")
    out = prompt.layout(4, target, merged_len=120, text_len=9)
    tokens, length = out.tokens, out.prompt_len
    assert list(np.flatnonzero(tokens == AUDIO_TOKEN)) == list(
        range(len(prompt.before_audio), len(prompt.before_audio) + 4)
    )
    labels = out.labels[out.label_valid]
    assert text_of(prompt, labels) == "go on<|im_end|>"
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
    ids = (*prompt.encode_target("go on"), *prompt.encode_target("and on"))
    assert prompt.decode(ids) == "go on"


def test_missing_tokenizer_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)

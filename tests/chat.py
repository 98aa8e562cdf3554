"""Small chat models of the families that we support: their templates, and tokenizers with merges.

The templates are ours, and behave as the published ones where it matters for a prompt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flax_projector.batch import AUDIO_TOKEN
from flax_projector.chat.prompt import Prompt

CHATML = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Without a system message, it writes one of its own.
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a small model.<|im_end|>\n"
    "{% endif %}" + CHATML
)

# Flags in the system message are orders, not text. Without /system_override there is a page with
# the date; with /no_think there is an empty think block before every answer.
SMOLLM3 = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set think = '' if '/no_think' not in system else '<think>\\n\\n</think>\\n' -%}
{%- set text = system.replace('/no_think', '').replace('/system_override', '').strip() -%}
<|im_start|>system
{% if '/system_override' in system -%}
{{ text }}<|im_end|>
{% else -%}
## Metadata

Today Date: {{ strftime_now("%d %B %Y") }}

{{ text }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' + think + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' + think }}{%- endif -%}
"""

# A finished turn always has a think block, the turn to continue only if thinking is turned off.
QWEN3 = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set parts = m.content.split('</think>') -%}
{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + parts[-1].lstrip('\\n') -}}
{{ '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- if not date_string is defined -%}
{%- set date_string = strftime_now("%d %b %Y") -%}
{%- endif -%}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' -}}
{{- 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' -}}
{%- for m in messages if m.role != 'system' -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Only </s> is a token of its own; the other markers are text.
TINYLLAMA = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "smollm3": SMOLLM3,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "tinyllama": TINYLLAMA,
}

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|end_of_text|>",
)
_TEXT = """\
system user assistant Transcribe: transcript thought think Today Date: November Cutting Knowledge
the hello world of speech, and a model which hears. What was said? 1 2 3 100 2026 go on. "No," he
said; (it was late) [noise] don't can't I'll \u00e9t\u00e9 na\u00efve \u4f60\u597d
\n\n  end.\n\n\tend\n"""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer as the family has it, trained on a few words, with the family's template."""
    if family == "tinyllama":
        tokenizer, special = _sentencepiece(), ("<s>", "</s>")
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    elif family == "llama3":
        tokenizer, special = _byte_level(_LLAMA3_SPLIT), _LLAMA3_TOKENS
        names = {"bos_token": special[0], "eos_token": "<|eot_id|>"}
    else:
        is_gpt2 = family in ("chatml", "smollm2")
        tokenizer, special = _byte_level(None if is_gpt2 else _LLAMA3_SPLIT), _CHATML_TOKENS
        names = {"bos_token": special[0], "eos_token": special[1]}
    tokenizer.add_special_tokens(list(special))
    if family == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    if family in ("qwen3", "smollm3"):  # not special, as in the published ones
        tokenizer.add_tokens([AddedToken(x, normalized=False) for x in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATES[family], **names
    )


def save_chat_tokenizer(folder: Path, family: str) -> Path:
    """Writes the family's tokenizer as Hugging Face does; returns the folder."""
    make_chat_tokenizer(family).save_pretrained(folder)
    return folder


# --- what a conversation should be -------------------------------------------------------------


class Reference:
    """What tiny-audio does: `AutoTokenizer`, <audio> as a special token, the whole conversation."""

    def __init__(self, folder: str | Path):
        """Reads the tokenizer from an LLM's folder."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_special_tokens({"extra_special_tokens": ["<audio>"]})
        self.audio = self.tokenizer.convert_tokens_to_ids("<audio>")

    def ids(
        self, system: str | None, user: str, transcript: str | None = None, **options: Any
    ) -> list[int]:
        """The whole conversation's, with AUDIO_TOKEN in the place of the audio.

        Without a transcript it ends with the generation prompt.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        if transcript is not None:
            messages.append({"role": "assistant", "content": transcript.strip()})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=transcript is None, **options
        )
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [AUDIO_TOKEN if number == self.audio else number for number in ids]


def ids_of(prompt: Prompt, transcript: str) -> list[int]:
    """Ours, from the beginning to the end of turn."""
    target = prompt.encode_target(transcript)
    return [*prompt.before_audio, AUDIO_TOKEN, *prompt.after_audio, *target]


def transcripts(reference: Reference) -> st.SearchStrategy[str]:
    """Texts of any kind, except those that spell a token which was added to the vocabulary."""
    added = reference.tokenizer.get_added_vocab()
    letters = "aZ09 .,'\"\n\r\t\u00e9\u0301\u4f60\U0001f389<|>/"
    texts = st.one_of(st.text(max_size=20), st.text(letters, max_size=20))
    return texts.filter(lambda text: not any(token in text for token in [*added, "\ufdd0"]))


def _byte_level(split: str | None) -> Tokenizer:
    """Byte-level BPE; single digits and GPT-2's split, unless another is given."""
    tokenizer = Tokenizer(models.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = pre_tokenizers.Digits(individual_digits=True)
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, [_TEXT], initial_alphabet=alphabet)


def _sentencepiece() -> Tokenizer:
    """BPE over characters, with spaces as letters of words and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    data = json.loads(_trained(tokenizer, _TEXT.split(), special_tokens=tokens).to_str())
    return Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))  # bytes are not special


def _trained(tokenizer: Tokenizer, texts: Sequence[str], **options: Any) -> Tokenizer:
    trainer = BpeTrainer(vocab_size=600, min_frequency=1, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

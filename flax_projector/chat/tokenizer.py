"""The LLM's tokenizer, and how transcripts become token ids."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from flax_projector.file_types import recognise_any

_ANCHOR = "\ufdd0"
"""A token of our own in front of a text, which keeps the tokenizer from treating it as the
beginning of everything. Not a character: no text contains it."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Reads a fast tokenizer, with its chat template, from an HF folder. Needs no PyTorch.

    Raises:
      ValueError: if the folder has none, or its files cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the LLM's folder must have a fast tokenizer")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # on damaged files the library raises all kinds of errors
        files = [*Path(folder).glob("*.json"), *Path(folder).glob("*.jinja")]
        raise ValueError(
            recognise_any(files) or f"the tokenizer in {folder} cannot be read: {error}"
        ) from error


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """The text as it is; special tokens are not added, but recognised."""
    return tokenizer.encode(text, add_special_tokens=False)


def with_placeholder(tokenizer: Tokenizer, placeholder: str) -> tuple[Tokenizer, int]:
    """A copy that has the placeholder as a special token, as tiny-audio adds it; and its id."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(placeholder, normalized=False)])
    (number,) = encode(copy, placeholder).ids
    return copy, number


def control_tokens(tokenizer: Tokenizer, prompt: str) -> dict[int, str]:
    """The tokens that structure a conversation: id -> content.

    Args:
      tokenizer: the LLM's.
      prompt: the rendered prompt. Tokens that were added to the vocabulary and occur in it, like
        Qwen3's <think>, count as special, even if they are not marked so.
    """
    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or (token.content.strip() and token.content in prompt)
    }


class TextTokenizer:
    """Encodes texts of others: a control token that is spelt out in them is plain text.

    The ids are those that the text has within a conversation, after a control token. Those of a
    text that spells no control token are the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Collection[str]):
        """Makes a copy of the tokenizer.

        Args:
          tokenizer: the LLM's.
          controls: the control tokens.
        """
        data = json.loads(tokenizer.to_str())
        for token in data["added_tokens"]:
            token["special"] = token["content"] in controls
        self._tokenizer = Tokenizer.from_str(json.dumps(data))
        self._tokenizer.add_tokens([AddedToken(_ANCHOR, special=False, normalized=False)])

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts; several threads share the work."""
        self._tokenizer.encode_special_tokens = True  # as text; pickling forgets it
        anchored = [_ANCHOR + text.replace(_ANCHOR, "") for text in texts]
        found = self._tokenizer.encode_batch_fast(anchored, add_special_tokens=False)
        return [encoding.ids[1:] for encoding in found]

    def to_str(self) -> str:
        """All that the ids depend on."""
        return self._tokenizer.to_str()

"""A training step in PyTorch, written as one writes it with transformers: what ours must equal.

It shares no code with ours. Clips go through the model one at a time, so nothing is padded or
masked; transformers places the labels; and the optimizer, its schedule and the clipping are the
usual ones. Gradients are of the projector alone, which is updated in place.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from flax_projector.chat.prompt import Prompt
from flax_projector.config import OptimizerConfig


class Clip(NamedTuple):
    """An utterance: its waveform at 16 kHz, and what is said."""

    samples: np.ndarray
    text: str


class TorchSpeechLLM:
    """Whisper's encoder, a projector and an LLM, in f32."""

    def __init__(
        self, encoder: str, llm: str, projector: nn.Module, prompt: Prompt, *, window_secs: int
    ) -> None:
        """Loads both towers.

        Args:
          encoder: HF folder of the Whisper model.
          llm: HF folder of the LLM, with its tokenizer.
          projector: the part that is trained.
          prompt: gives the token ids around the audio.
          window_secs: length that clips are padded to for the encoder.
        """
        options: Any = {"attn_implementation": "eager", "dtype": torch.float32}
        whisper = transformers.WhisperModel.from_pretrained(encoder, **options)
        self.encoder = _with_window(whisper.get_encoder().eval(), 50 * window_secs)
        self.features = transformers.WhisperFeatureExtractor(
            feature_size=whisper.config.num_mel_bins, chunk_length=window_secs
        )
        self.projector = projector
        self.llm: Any = transformers.AutoModelForCausalLM.from_pretrained(llm, **options)
        self.llm.eval().requires_grad_(False)
        self.embed = self.llm.get_input_embeddings()
        file = str(Path(llm) / "tokenizer.json")
        self.tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
        self.prompt = prompt

    def hear(self, samples: np.ndarray) -> torch.Tensor:
        """[A, D] audio tokens of a clip. Frames after its end are left out."""
        mel = self.features(samples, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            frames = self.encoder(mel).last_hidden_state
        num_frames = math.ceil(len(samples) / 320)  # 50 a second
        return self.projector(frames[:, :num_frames])[0]

    def cross_entropy(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, int]:
        """The mean over the labels of all clips, their texts and ends of turn; and their number."""
        end_of_turn = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        targets = [[*self._encode(clip.text), end_of_turn] for clip in clips]
        num_labels = sum(len(target) for target in targets)
        losses = []
        for clip, target in zip(clips, targets, strict=True):
            before, after, spoken = (
                self.embed(torch.tensor(ids))
                for ids in (self.prompt.before_audio, self.prompt.after_audio, target)
            )
            prompt = torch.cat([before, self.hear(clip.samples), after])  # [L - T, D]
            output = self.llm(
                inputs_embeds=torch.cat([prompt, spoken])[None],
                labels=torch.tensor([[-100] * len(prompt) + target]),  # -100 is no label
                num_items_in_batch=num_labels,  # what the sum is divided by
            )
            losses.append(output.loss)
        return torch.stack(losses).sum(), num_labels

    def ctc(self, clips: Sequence[Clip], classes: Sequence[int]) -> tuple[torch.Tensor, int]:
        """CTC of the audio tokens: its mean over the labels that can be spelt; and their number.

        Args:
          clips: in a clip that is too short to be spelt, no label is counted.
          classes: token ids whose embeddings score the audio tokens, the blank first.
        """
        rows, losses, num_labels = self.embed(torch.tensor(classes)), [], 0
        for clip in clips:
            labels = torch.tensor([classes.index(token) for token in self._encode(clip.text)])
            scores = (self.hear(clip.samples) @ rows.T).log_softmax(-1)  # [A, Z]
            lengths = torch.tensor(len(scores)), torch.tensor(len(labels))
            loss = F.ctc_loss(scores, labels, *lengths, blank=0, reduction="sum")
            if torch.isfinite(loss):
                losses.append(loss)
                num_labels += len(labels)
        return torch.stack(losses).sum() / num_labels, num_labels

    def ctc_classes(self, texts: Iterable[str]) -> list[int]:
        """The blank, and every token of the texts."""
        tokens = {token for text in texts for token in self._encode(text)}
        return [self.tokenizer.convert_tokens_to_ids("<|endoftext|>"), *tokens]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _with_window(encoder: Any, num_frames: int) -> Any:
    """An encoder with this window; that of transformers takes one frame for each position."""
    kept = encoder.embed_positions.weight[:num_frames]
    encoder.embed_positions = nn.Embedding.from_pretrained(kept)
    encoder.config.max_source_positions = num_frames
    return encoder


class TorchOptimizer:
    """AdamW with PyTorch's own betas and eps, after clipping; warm-up, then cosine decay to 0."""

    def __init__(
        self, module: nn.Module, config: OptimizerConfig, *, learning_rate: float, num_steps: int
    ) -> None:
        """Decays matrices only.

        Args:
          module: is trained.
          config: gives the decay, the warm-up and the norm above which gradients are scaled down.
          learning_rate: at the end of the warm-up.
          num_steps: after which the learning rate is 0.
        """
        self.module, self.clip_norm = module, config.clip_norm
        matrices = [p for p in module.parameters() if p.ndim == 2]
        vectors = [p for p in module.parameters() if p.ndim == 1]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        self.schedule = transformers.get_cosine_schedule_with_warmup(
            self.adamw, config.warmup_steps, num_steps
        )

    def step(self) -> float:
        """One update by the gradients in the module; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()
        return norm.item()

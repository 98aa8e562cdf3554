"""Transcribes clips with PyTorch and transformers alone.

Reads a folder that `python -m convert to-torch RUN FOLDER --hf-folder` wrote, and the towers that
its config.json names. A server needs nothing of flax-projector, and no JAX.

Example:
  python serve.py FOLDER clip1.wav clip2.wav    # 16 kHz, mono, 16 bits
"""

import json
import math
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperModel,
)

SAMPLE_RATE, SAMPLES_PER_FRAME = 16_000, 320


class Transcriber:
    """Whisper's encoder, the trained projector and the LLM."""

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: str | None = None,
        llm: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads everything.

        Args:
          folder: the exported folder.
          encoder: hub id or folder of the encoder; None takes the one that config.json names.
          llm: the same for the LLM.
          device: that computes.
          dtype: that it computes in.
        """
        folder = Path(folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.device, self.dtype = device, dtype
        self.features = WhisperFeatureExtractor.from_pretrained(folder)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        whisper: Any = WhisperModel.from_pretrained(
            encoder or self.config["audio_model_id"], dtype=dtype
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            llm or self.config["text_model_id"], dtype=dtype
        )
        self.encoder: Any = whisper.encoder.eval().to(device)
        self.llm: Any = model.eval().to(device)
        self.llm.generation_config = GenerationConfig.from_pretrained(folder)
        self.weights = {
            name.removeprefix("projector."): tensor.to(device, dtype)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.window = round(self.config["window_secs"] * SAMPLE_RATE)  # in samples
        self._set_window(self.window // SAMPLES_PER_FRAME)

    def _set_window(self, num_frames: int) -> None:
        """The encoder of transformers takes as many frames as it has positions."""
        positions = self.encoder.embed_positions.weight[:num_frames]
        self.encoder.embed_positions = nn.Embedding.from_pretrained(positions)
        self.encoder.config.max_source_positions = num_frames

    @torch.inference_mode()
    def __call__(self, clips: Sequence[np.ndarray]) -> list[str]:
        """Transcribes a batch of clips: float32 samples at 16 kHz, no longer than the window."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.tokens(clips)]
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def tokens(self, clips: Sequence[np.ndarray]) -> list[list[int]]:
        """The token ids of the transcripts, without the end of turn."""
        prompt = self.config["rendered_prompt"]
        before, after = (
            self._embed(prompt["before_audio_ids"]),
            self._embed(prompt["after_audio_ids"]),
        )
        rows = [torch.cat([before, audio, after]) for audio in self._hear(clips)]
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]  # on the left: texts go on at the same place
        inputs = torch.stack(
            [F.pad(row, (0, 0, n, 0)) for row, n in zip(rows, padding, strict=True)]
        )
        mask = torch.arange(length) >= torch.tensor(padding)[:, None]
        output = self.llm.generate(
            inputs_embeds=inputs, attention_mask=mask.long().to(self.device)
        ).tolist()
        end = prompt["end_of_turn_id"]
        return [ids[: ids.index(end)] if end in ids else ids for ids in output]

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.llm.get_input_embeddings()(
            torch.tensor(ids, dtype=torch.long, device=self.device)
        )

    def _hear(self, clips: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The audio tokens of every clip: those of the clip alone, or of the whole window."""
        if any(len(clip) > self.window for clip in clips):
            raise ValueError(f"a clip is longer than {self.config['window_secs']} s: cut it")
        mel = self.features(
            list(clips),
            sampling_rate=SAMPLE_RATE,
            padding="max_length",
            max_length=self.window,
            return_tensors="pt",
        ).input_features.to(self.device, self.dtype)
        frames = self.encoder(mel).last_hidden_state
        if self.config["audio_tokens"] == "clip":
            counts = [math.ceil(len(clip) / SAMPLES_PER_FRAME) for clip in clips]
        else:
            counts = [frames.shape[1]] * len(clips)
        return [self._project(x[:n]) for x, n in zip(frames, counts, strict=True)]

    def _project(self, frames: torch.Tensor) -> torch.Tensor:
        """tiny-audio's ResidualAudioProjector."""
        w, stride = self.weights, self.config["projector_pool_stride"]
        x = F.pad(frames, (0, 0, 0, -len(frames) % stride)).reshape(-1, stride * frames.shape[1])
        x = self._norm(F.linear(x, w["input_proj.weight"], w["input_proj.bias"]), "ln_input")
        for i in range(self.config["projector_num_layers"]):
            fc1, fc2 = f"layers.{i}.fc1", f"layers.{i}.fc2"
            h = F.gelu(F.linear(x, w[f"{fc1}.weight"], w[f"{fc1}.bias"]))
            x = x + F.linear(h, w[f"{fc2}.weight"], w[f"{fc2}.bias"])
            x = self._norm(x, f"layer_norms.{i}")
        return x

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide, eps = x.float(), self.config["rms_norm_eps"]
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return self.weights[f"{name}.weight"] * normed.to(x.dtype)


def read_wav(path: str) -> np.ndarray:
    """The samples of a file of 16 kHz, mono, 16 bits."""
    with wave.open(path) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (SAMPLE_RATE, 1, 2):
            raise ValueError(f"{path} has {form}, expected {SAMPLE_RATE} Hz, 1 channel, 2 bytes")
        data = file.readframes(file.getnframes())
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def main(folder: str, *paths: str) -> None:
    """Prints the transcript of every file."""
    texts = Transcriber(folder)([read_wav(path) for path in paths])
    sys.stdout.writelines(f"{path}\t{text}\n" for path, text in zip(paths, texts, strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

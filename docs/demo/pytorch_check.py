"""Proves that a trained run is the same model in PyTorch.

Builds the speech LLM from Hugging Face's Whisper encoder and Llama and from the projector that
`python -m convert to-torch` wrote, runs held-out clips through it and through ours, stage by stage,
and writes a table of the largest differences. Exits with 1 unless every transcript is the same,
token for token.

Example:

  python docs/demo/pytorch_check.py --run runs/demo --projector runs/demo/pytorch \\
      --manifest docs/demo/speech/heldout_unseen_voices.jsonl --out runs/demo/parity.json
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from convert.models import PROJECTOR
from convert.torch_files import open_torch
from convert.torch_projector import ResidualAudioProjector
from flax_projector import config as configs
from flax_projector.__main__ import Listener
from flax_projector.audio import load_audio
from flax_projector.config import SAMPLE_RATE, TrainConfig
from flax_projector.manifest import ManifestRow, read_manifest
from flax_projector.projector import output_length
from flax_projector.prompt import Prompt
from flax_projector.whisper import log_mel, num_encoder_frames

log = logging.getLogger("flax_projector.demo")


class TorchSpeechLLM:
    """Whisper encoder -> exported projector -> Llama, in PyTorch, one clip at a time, f32."""

    def __init__(self, config: TrainConfig, projector: Path, prompt: Prompt):
        """Loads the towers that the run names and the exported projector."""
        eager = {"attn_implementation": "eager", "dtype": torch.float32}
        whisper = transformers.WhisperModel.from_pretrained(config.encoder, **eager)
        self.encoder = _shorten_window(whisper.encoder.eval(), config.data.window_secs)
        self.features = transformers.WhisperFeatureExtractor(
            feature_size=whisper.config.num_mel_bins, chunk_length=round(config.data.window_secs)
        )
        self.llm: Any = transformers.AutoModelForCausalLM.from_pretrained(config.llm, **eager)
        self.llm.eval()
        self.projector = _load_projector(projector)
        self.prompt, self.max_new_tokens = prompt, config.max_new_tokens

    @torch.no_grad()
    def __call__(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Every stage of a clip, and its greedy tokens."""
        n = self.features.n_samples
        padded = np.pad(samples, (0, n - len(samples)))
        extracted = self.features(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        mel = extracted.input_features
        frames = self.encoder(mel).last_hidden_state
        audio = self.projector(frames[:, : num_encoder_frames(len(samples))])
        embed = self.llm.get_input_embeddings()
        before, after = (
            embed(torch.tensor([ids]))
            for ids in (self.prompt.before_audio, self.prompt.after_audio)
        )
        inputs = torch.cat([before, audio, after], dim=1)
        logits = self.llm(inputs_embeds=inputs).logits[:, -1]
        tokens = self.llm.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.prompt.end_of_turn,
            pad_token_id=self.prompt.end_of_turn,
        )
        stages = {"log-mel": mel, "encoder frames": frames, "audio tokens": audio}
        arrays = {name: value[0].numpy() for name, value in stages.items()}
        return {**arrays, "first logits": logits[0].numpy(), "tokens": tokens[0].numpy()}


def _shorten_window(encoder, window_secs: float):
    """Lets HF's encoder take a window below 30 s: it insists on the length of its positions."""
    positions = round(window_secs * 50)
    kept = encoder.embed_positions.weight[:positions]
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(kept)
    encoder.config.max_source_positions = positions
    return encoder


def _load_projector(folder: Path) -> ResidualAudioProjector:
    return ResidualAudioProjector.from_tensors(PROJECTOR.read_config(folder), open_torch(folder))


def jax_stages(listener: Listener, samples: np.ndarray) -> dict[str, np.ndarray]:
    """The stages of one clip in JAX, up to the first logits."""
    loaded, config = listener.loaded, listener.config
    model = loaded.model
    prompt = loaded.prompt
    padded = jnp.pad(jnp.asarray(samples), (0, config.data.window_samples - len(samples)))[None]
    mel = log_mel(padded, model.encoder.config.num_mel_bins)
    frames, valid = model.encode(loaded.encoder_params, padded, jnp.array([len(samples)]))
    audio = model.embed_audio(listener.projector_params, frames, valid)
    num_tokens = output_length(int(valid.sum()), config.projector.projector_pool_stride)
    audio = audio[:, :num_tokens]
    length = prompt.merged_length(audio.shape[1], 1)
    layout = prompt.layout(audio.shape[1], (prompt.end_of_turn,), merged_len=length, text_len=1)
    inputs = model.merge(loaded.llm_params, jnp.asarray(layout["tokens"])[None], audio)
    logits = model.label_logits(
        loaded.llm_params, inputs, jnp.asarray(layout["label_positions"])[None]
    )
    stages = {"log-mel": mel, "encoder frames": frames, "audio tokens": audio}
    arrays = {name: np.asarray(value[0]) for name, value in stages.items()}
    return {**arrays, "first logits": np.asarray(logits[0, 0])}


def trim(ids: list[int], end: int) -> list[int]:
    """Ids up to and with the end of turn."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare(run: Path, projector: Path, rows: list[ManifestRow]) -> dict:
    """Both frameworks on the same clips: largest difference per stage, and all tokens."""
    config = configs.from_json((run / "config.json").read_text())
    listener = Listener(run)
    ours = {t.id: t for t in listener.transcribe(rows)}
    oracle = TorchSpeechLLM(config, projector, listener.loaded.prompt)
    end = listener.loaded.prompt.end_of_turn
    stages: dict[str, dict[str, float]] = {}
    clips = []
    for row in rows:
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        theirs = oracle(samples)
        for name, value in jax_stages(listener, samples).items():
            error = float(np.abs(value - theirs[name]).max())
            scale = float(np.sqrt(np.mean(np.square(theirs[name]))))
            worst = stages.setdefault(name, {"max_abs_error": 0.0, "rms": scale})
            worst["max_abs_error"] = max(worst["max_abs_error"], error)
        jax_ids = trim(list(ours[row.id].tokens), end)
        torch_ids = trim(theirs["tokens"].tolist(), end)
        clips.append(
            {
                "id": row.id,
                "reference": row.text,
                "jax": ours[row.id].hypothesis,
                "torch": listener.loaded.prompt.decode(torch_ids),
                "same_tokens": jax_ids == torch_ids,
                "num_tokens": len(torch_ids),
            }
        )
        log.info("%s: %s", row.id, "same" if clips[-1]["same_tokens"] else "DIFFERENT")
    return {"stages": stages, "clips": clips}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="finished run folder")
    parser.add_argument("--projector", type=Path, required=True, help="exported HF folder")
    parser.add_argument("--manifest", type=Path, required=True, help="held-out utterances")
    parser.add_argument("--count", type=int, default=10, help="utterances to compare")
    parser.add_argument("--out", type=Path, required=True, help="JSON report")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    jax.config.update("jax_default_matmul_precision", "highest")
    rows, _ = read_manifest(args.manifest)
    rows = rows[:: max(1, len(rows) // args.count)][: args.count]
    report = compare(args.run, args.projector, rows)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, stage in report["stages"].items():
        log.info("%-15s max abs error %.1e (rms %.2g)", name, stage["max_abs_error"], stage["rms"])
    same = sum(clip["same_tokens"] for clip in report["clips"])
    log.info("PyTorch gives the same tokens for %d of %d utterances", same, len(rows))
    sys.exit(0 if same == len(rows) else 1)


if __name__ == "__main__":
    main()

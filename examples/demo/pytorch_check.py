"""Checks that a trained run is the same model in PyTorch.

Builds the speech LLM in PyTorch, from Hugging Face's Whisper encoder and Llama and the projector
that `python -m convert to-torch` wrote. Runs held-out clips through it and through the model in
JAX, compares the two stage by stage, and writes the largest differences to a JSON file. The exit
code is 1 unless every transcript is the same, token for token.

Example:

  python examples/demo/pytorch_check.py --run runs/demo --projector runs/demo/pytorch \\
      --manifest examples/demo/speech/heldout_unseen_voices.jsonl --out runs/demo/parity.json
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
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
from flax_projector.batch import Bucket, empty_batch
from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig, TrainConfig
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.data.rows import ManifestRow
from flax_projector.inference.listen import Listener
from flax_projector.lengths import FRAME_SECS, SAMPLE_RATE, num_audio_tokens, num_encoder_frames
from flax_projector.logs import is_terminal
from flax_projector.models.whisper import log_mel
from flax_projector.run_folder import RunFolder

log = logging.getLogger("flax_projector.demo")


class TorchSpeechLLM:
    """Whisper encoder -> exported projector -> Llama, in PyTorch, one clip at a time, f32."""

    def __init__(self, config: TrainConfig, projector: Path, prompt: Prompt):
        """Loads the exported projector and the towers that the run's config names."""
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
        self.data = config.data

    @torch.no_grad()
    def __call__(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the output of every stage for one clip, and its greedy tokens."""
        n = self.features.n_samples
        padded = np.pad(samples, (0, n - len(samples)))
        extracted = self.features(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        mel = extracted.input_features
        frames = self.encoder(mel).last_hidden_state
        audio = self.projector(frames[:, : num_heard_frames(samples, self.data)])
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


def num_heard_frames(samples: np.ndarray, data: DataConfig) -> int:
    """Returns how many encoder frames of a clip become audio tokens."""
    return data.window_frames if data.whole_window else num_encoder_frames(len(samples))


def _shorten_window(encoder, window_secs: float):
    """Makes HF's encoder accept a window below 30 s; it demands as many frames as positions."""
    positions = round(window_secs / FRAME_SECS)
    kept = encoder.embed_positions.weight[:positions]
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(kept)
    encoder.config.max_source_positions = positions
    return encoder


def _load_projector(folder: Path) -> ResidualAudioProjector:
    return ResidualAudioProjector.from_tensors(PROJECTOR.read_config(folder), open_torch(folder))


def jax_stages(listener: Listener, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the output of every stage in JAX for one clip, up to the first logits."""
    loaded, config = listener.loaded, listener.config
    model, prompt = loaded.model, loaded.prompt
    num_frames = num_heard_frames(samples, config.data)
    num_tokens = num_audio_tokens(num_frames, config.projector.projector_pool_stride)
    length = prompt.merged_length(num_tokens, 1)
    batch = empty_batch(
        Bucket(config.data.window_frames, length, 1),
        num_rows=1,
        fill=prompt.end_of_turn,
        audio_shape={"samples": (config.data.window_samples,)},
    )
    layout = prompt.layout(num_tokens, (prompt.end_of_turn,), merged_len=length, text_len=1)
    batch.set_row(0, samples, num_frames, layout)
    batch = jax.tree.map(jnp.asarray, batch)

    mel = log_mel(batch.samples, model.encoder.config.num_mel_bins)
    frames = model.encode(loaded.encoder_params, batch.samples)
    audio = model.embed_audio(listener.projector_params, frames, batch.frame_valid)
    inputs = model.merge(loaded.llm_params, batch, audio)
    logits = model.label_logits(loaded.llm_params, inputs, batch.label_positions)
    return {
        "log-mel": np.asarray(mel[0]),
        "encoder frames": np.asarray(frames[0]),
        "audio tokens": np.asarray(audio[0, :num_tokens]),
        "first logits": np.asarray(logits[0, 0]),
    }


def trim(ids: list[int], end: int) -> list[int]:
    """Returns the ids up to the end of turn, and the end of turn itself."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare(run: Path, projector: Path, rows: Sequence[ManifestRow]) -> dict:
    """Runs both models on the clips; returns the largest difference per stage, and all tokens."""
    config = RunFolder(run).read_config()
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
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument(
        "--projector", type=Path, required=True, help="HF folder of the exported projector"
    )
    parser.add_argument(
        "--manifest", type=Path, required=True, help="manifest of held-out utterances"
    )
    parser.add_argument("--count", type=int, default=10, help="number of utterances to compare")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the differences")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    if not is_terminal():
        transformers.utils.logging.disable_progress_bar()
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

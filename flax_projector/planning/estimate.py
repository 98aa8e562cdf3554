"""How long a step takes, what limits it, and what it needs of a host: estimates, by formulas."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flax_projector.batch import Bucket
from flax_projector.chips import Chip
from flax_projector.config import DataConfig
from flax_projector.data.batch_plan import assign
from flax_projector.lengths import SAMPLE_RATE, num_audio_tokens
from flax_projector.models.speech_llm import SpeechLLM
from flax_projector.planning.compiled import AbstractRun, CompiledStep
from flax_projector.planning.program import Program
from flax_projector.planning.speech import Speech
from flax_projector.planning.topology import Topology
from flax_projector.training.throughput import FlopCounter, make_flop_counter

DECODED_PER_CORE = {"wav": 2.97 * 3600, "flac": 0.94 * 3600, "mp3 at 44.1 kHz": 0.33 * 3600}
"""Seconds of speech that a core reads in a second, as measured: docs/benchmarks.md."""
STORED_BYTES_PER_SEC = {"wav": 2 * SAMPLE_RATE, "flac": SAMPLE_RATE}
"""Bytes of a second of speech at 16 kHz in 16 bits; flac takes about half."""


def needed_flops(
    model: SpeechLLM, count: FlopCounter, bucket: Bucket, rows: int, window_frames: int
) -> float:
    """FLOPs that a step's program computes for some rows, padding and recomputation included.

    `FlopCounter` for rows that fill the bucket, and besides

      4 S^2 E per clip and encoder layer     scores and weighted sums of attention
      14 L (P + L) H d / 2 per LLM layer     likewise: 4 forward, 10 backward, the causal half; P is
                                             the length of the prefix
      2 (N_layers - F D) per token           with remat "layers": what the backward pass recomputes,
                                             all but the last product of a layer, F wide; and
                                             attention's 4 once more; "products": only these
      4 F D per token and layer              with remat "attention": gate and up;
                                             "gates": half of it
      402 (400 + M) per mel frame            the log-mel: Fourier transform and M filters

    Args:
      model: the modules.
      count: of the model.
      bucket: the static lengths.
      rows: number of rows.
      window_frames: frames that the encoder computes for a clip; 0 if frames are kept.
    """
    encoder, llama = model.encoder.config, model.llm.config
    length, prefix = bucket.merged_len - model.prefix_len, model.prefix_len
    audio = num_audio_tokens(bucket.num_frames, model.projector.config.projector_pool_stride)
    counts = {
        "num_clips": rows,
        "num_audio_tokens": rows * audio,
        "num_tokens": rows * length,
        "num_labels": rows * bucket.text_len,
    }
    flops = count({name: float(number) for name, number in counts.items()})
    flops += 4 * rows * window_frames**2 * encoder.d_model * encoder.encoder_layers
    heads = llama.num_attention_heads * llama.head_dim * llama.num_hidden_layers
    keeps_attention = model.llm.remat in ("none", "gates", "attention")
    products = 14 if keeps_attention else 18
    flops += products * rows * length * (prefix + length) * heads / 2
    wide = llama.hidden_size * llama.intermediate_size * llama.num_hidden_layers  # one of the MLPs'
    recomputed = {"layers": count.layers - wide, "attention": 2 * wide, "gates": wide}
    flops += 2 * recomputed.get(model.llm.remat, 0) * rows * length
    if window_frames:
        flops += rows * 2 * window_frames * 2 * 201 * (400 + encoder.num_mel_bins)
    return flops


@dataclass(frozen=True)
class Estimate:
    """What is expected of a step; times are in seconds, bytes are of a chip.

    Attributes:
      secs: of the step: all parts together.
      parts: what it consists of. On TPUs by the compiler's estimate; on GPUs, whose compiler
        estimates nothing, by the FLOPs or the bytes of every operation and what is attained of the
        chip's peaks; "kernels" by formula, "collectives" those that computation does not hide.
      roofline: the least that computing, HBM, links and network would take, each alone.
      limit: which of them is the longest.
      model_flops: FLOPs that the model needs, by the formula of `FlopCounter`, over all chips.
      program_flops: FLOPs that the program computes, by the formula of `needed_flops`, likewise.
      mfu: `model_flops` as a share of what the chips could compute meanwhile.
      audio_secs: speech in the step.
      audio_hours_per_chip_hour: hours of speech that a chip trains on in an hour.
      sent_bytes: what leaves a chip over the links of its slice.
      network_bytes: what leaves it for other slices.
      host_audio_secs_per_sec: speech that a host reads.
      host_cores: that it needs for this, by the format of the clips.
      host_read_bytes_per_sec: that it reads, by the format of the clips.
      host_to_chips_bytes_per_sec: that it sends to its chips.
    """

    secs: float
    parts: dict[str, float]
    roofline: dict[str, float]
    limit: str
    model_flops: float
    program_flops: float
    mfu: float
    audio_secs: float
    audio_hours_per_chip_hour: float
    sent_bytes: float
    network_bytes: float
    host_audio_secs_per_sec: float
    host_cores: dict[str, float]
    host_read_bytes_per_sec: dict[str, float]
    host_to_chips_bytes_per_sec: float


@dataclass(frozen=True)
class Contents:
    """What the batches of a bucket hold on average, counted as in `train_step.batch_counts`.

    Attributes:
      num_batches: in an epoch.
      counts: of a batch.
      audio_secs: of a batch.
    """

    num_batches: int
    counts: dict[str, float]
    audio_secs: float


def contents_of(speech: Speech, model: SpeechLLM, config: DataConfig) -> dict[Bucket, Contents]:
    """The mean contents of each bucket's batches; a bucket without batches of its own has none."""
    batches, utterances = speech.batches, speech.utterances
    number_of, first = Counter(), {}
    for index in range(len(batches)):
        bucket = batches.bucket(index)
        number_of[bucket] += 1
        first.setdefault(bucket, index)
    assigned = assign(utterances, config)
    stride, found = model.projector.config.projector_pool_stride, {}
    for number, bucket in enumerate(batches.buckets):
        if not number_of[bucket]:
            continue
        mine = assigned == number
        rows = sum(clip is not None for clip in batches.members(first[bucket]))
        secs = float(np.mean(utterances.durations[mine])) if mine.any() else 0.0
        labels = float(np.mean(utterances.num_labels[mine])) if mine.any() else 0.0
        audio = float(np.mean(num_audio_tokens(utterances.max_frames[mine], stride)))
        tokens = audio + labels + speech.prompt.merged_length(0, 0) - model.prefix_len
        counts = {
            "num_clips": float(rows),
            "num_audio_tokens": rows * audio,
            "num_tokens": rows * tokens,
            "num_labels": rows * labels,
        }
        found[bucket] = Contents(number_of[bucket], counts, rows * secs)
    return found


def estimate(
    run: AbstractRun, topology: Topology, step: CompiledStep, program: Program, contents: Contents
) -> Estimate:
    """What is expected of a step.

    Args:
      run: what was compiled.
      topology: what it was compiled for.
      step: the compiled step.
      program: what it does.
      contents: what its batches hold.
    """
    chip, num_chips, data = topology.chip, topology.num_chips, run.config.data
    window = 0 if data.cache_features else data.window_frames
    count = make_flop_counter(
        (run.state.params, *run.frozen), run.model.llm.config, window_frames=window
    )
    model_flops = count(contents.counts)
    program_flops = needed_flops(run.model, count, step.bucket, step.num_rows, window)
    links, network, exposed = _traffic(program, topology)
    roofline = {
        "compute": program_flops / num_chips / chip.peak_flops,
        "HBM": program.hbm_bytes / chip.hbm_bandwidth,
        "links": links / chip.link_bandwidth,
        "network": network / chip.network_bandwidth,
    }
    parts = _parts(program, chip)
    kernel_flops = sum(kernel.flops for kernel in program.kernels)
    parts["kernels"] = kernel_flops / (chip.attained.kernels * chip.peak_flops)
    parts["collectives"] = exposed
    secs = sum(parts.values())
    return Estimate(
        secs=secs,
        parts=parts,
        roofline=roofline,
        limit=max(roofline, key=lambda name: roofline[name]),
        model_flops=model_flops,
        program_flops=program_flops,
        mfu=model_flops / (secs * num_chips * chip.peak_flops),
        audio_secs=contents.audio_secs,
        audio_hours_per_chip_hour=contents.audio_secs / secs / num_chips,
        sent_bytes=links,
        network_bytes=network,
        **_host(topology, step, contents, secs),
    )


def _parts(program: Program, chip: Chip) -> dict[str, float]:
    """Seconds of all operations but kernels and collectives."""
    if chip.clock is not None:
        return {part: cycles / chip.clock for part, cycles in program.cycles.items()}
    parts: dict[str, float] = defaultdict(float)
    for each in program.operations:
        computing = each.flops / (chip.attained.products * chip.peak_flops)
        moving = each.hbm_bytes / (chip.attained.hbm * chip.hbm_bandwidth)
        parts[each.part] += each.count * max(computing, moving)
    return dict(parts)


def _traffic(program: Program, topology: Topology) -> tuple[float, float, float]:
    """Bytes that leave a chip over links and over the network, and seconds that nothing hides."""
    chip, links, network, exposed = topology.chip, 0.0, 0.0, 0.0
    for each in program.collectives:
        crosses = each.crosses_slices or (
            not topology.is_tpu and each.group > topology.slice_size and topology.num_slices > 1
        )
        if crosses:
            network += each.sent
        else:
            links += each.sent
        if not each.is_hidden:
            exposed += each.sent / (chip.network_bandwidth if crosses else chip.link_bandwidth)
    return links, network, exposed


def _host(topology: Topology, step: CompiledStep, contents: Contents, secs: float) -> dict:
    hosts = topology.num_chips / topology.chips_per_host
    audio = contents.audio_secs / secs / hosts
    return {
        "host_audio_secs_per_sec": audio,
        "host_cores": {name: audio / rate for name, rate in DECODED_PER_CORE.items()},
        "host_read_bytes_per_sec": {n: audio * rate for n, rate in STORED_BYTES_PER_SEC.items()},
        "host_to_chips_bytes_per_sec": topology.chips_per_host * step.batch_bytes / secs,
    }


def mixture(steps: Sequence[tuple[Estimate, Contents]], topology: Topology) -> Mapping[str, float]:
    """An epoch of all buckets.

    Returns:
      "step_secs", the mean; "mfu"; "audio_hours_per_chip_hour".
    """
    total = sum(contents.num_batches for _, contents in steps)
    secs = sum(each.secs * contents.num_batches for each, contents in steps)
    audio = sum(each.audio_secs * contents.num_batches for each, contents in steps)
    flops = sum(each.model_flops * contents.num_batches for each, contents in steps)
    chips = topology.num_chips
    return {
        "step_secs": secs / total,
        "mfu": flops / (secs * chips * topology.chip.peak_flops),
        "audio_hours_per_chip_hour": audio / secs / chips,
    }


def decoding_of(
    found: tuple[int, Program], max_new_tokens: int, chip: Chip, sharing: int
) -> dict[str, float]:
    """How fast an evaluation decodes.

    The time of a token is that of the loop over tokens: on TPUs the compiler's estimate, on GPUs
    what reading and writing its bytes takes at the bandwidth that is attained.

    Args:
      found: rows of a chip, and the program.
      max_new_tokens: the most tokens of a row; the first is decoded before the loop.
      chip: the chip.
      sharing: how many chips compute a row together.

    Returns:
      "rows", of a chip and those that share them; "token_secs"; "tokens_per_sec", of a chip; and
      "hbm_secs", the least that the bytes of a token take.
    """
    rows, program = found
    loops = [loop for loop in program.loops.values() if loop.count == max_new_tokens]
    hbm_secs = sum(loop.hbm_bytes for loop in loops) / chip.hbm_bandwidth
    secs = hbm_secs / chip.attained.hbm
    if chip.clock is not None:
        secs = sum(loop.cycles for loop in loops) / chip.clock
    return {
        "rows": rows,
        "token_secs": secs,
        "tokens_per_sec": rows / secs / sharing if secs else 0.0,
        "hbm_secs": hbm_secs,
    }

"""Converts checkpoints between PyTorch and Flax, bit for bit.

Recognises projectors, Whisper encoders and Llama models by config.json or by their tensors' names.

Every conversion ends by reading the result, converting it back and comparing every byte.

examples:
  flax-projector-convert to-flax tiny-audio-checkpoint/ converted/
  flax-projector-convert to-flax outputs/ converted/ --step 2000    # outputs/checkpoint-2000
  flax-projector-convert to-flax best.pt converted/ \\
      --encoder-dim 1280 --rms-norm-eps 1e-6 --projector-dropout 0  # without a config.json
  flax-projector-convert to-flax openai/whisper-base whisper-flax/  # downloads it from the hub
  flax-projector-convert to-torch runs/demo/projector/ for-the-server/
  flax-projector-convert to-torch runs/demo/ projector.pt --step 480 --prefix ""
  flax-projector-convert to-torch converted/ half.safetensors --dtype bfloat16
  flax-projector-convert to-torch runs/demo/ for-the-server/ --hf-folder
  flax-projector-convert to-flax outputs/ runs/continued/ --trainer # the optimizer too: for
  flax-projector-convert to-torch runs/first/ checkpoint/ --trainer # a training to go on
  flax-projector-convert verify for-the-server/ converted/
  flax-projector-convert inspect for-the-server/

exit codes:
  0    done, or from `verify`: both are the same model
  1    from `verify`: they are not
  2    an error
  130  Ctrl-C
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, subcommand
from tyro.conf import arg as option

from flax_projector.logs import setup_logging, start_in_utf8

_log = logging.getLogger("convert")

DTypeName = Literal["float32", "float16", "bfloat16"]


def _shown(metavar: str | None = None, default: str = "") -> Any:
    """How --help shows an option that tyro would show with "(default: None)"."""
    return option(metavar=metavar, help_behavior_hint=default)


_LATEST = _shown("N", "(default: the latest)")
_EVERY_BIT = _shown("{float32,float16,bfloat16}", "(default: keep every bit)")


@dataclass(frozen=True)
class ProjectorFields:
    """Needed for a projector that has no config.json, or whose config.json lacks a field."""

    encoder_dim: Annotated[int | None, _shown("INT")] = None
    """Width of the encoder's frames."""
    projector_pool_stride: Annotated[int | None, _shown("INT")] = None
    """Encoder frames per audio token."""
    projector_dropout: Annotated[float | None, _shown("FLOAT")] = None
    """Dropout rate of training."""
    rms_norm_eps: Annotated[float | None, _shown("FLOAT")] = None
    """Epsilon of the norms."""

    def given(self) -> dict[str, Any]:
        """The fields that were given."""
        return {name: x for name, x in dataclasses.asdict(self).items() if x is not None}


_ProjectorFields = Annotated[ProjectorFields, option(name="projector config")]


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    dtype: Annotated[DTypeName | None, _EVERY_BIT] = None
    """Cast to this dtype first."""
    overwrite: Annotated[bool, _shown()] = False
    """Replace what an earlier conversion wrote."""
    no_verify: Annotated[bool, _shown()] = False
    """Do not convert back and compare."""

    def options(self) -> dict[str, Any]:
        """The options that both directions take."""
        return {
            "dtype": self.dtype,
            "overwrite": self.overwrite,
            "verify": not self.no_verify,
        }


@dataclass(frozen=True)
class ToFlax(_Conversion):
    """PyTorch checkpoint (HF or Trainer folder, or file) -> Flax folder."""

    src: Annotated[Positional[str], _shown("SRC")]
    """What to convert: a folder, a file, or the id of a model on the Hugging Face hub."""
    dst: Annotated[Positional[str], _shown("DST")]
    """The folder to write."""
    step: Annotated[int | None, _LATEST] = None
    """Which checkpoint-N of a Trainer folder."""
    ignore: Annotated[UseAppendAction[tuple[str, ...]], _shown("PATTERN")] = ()
    """Leave out tensors that match, like 'head.*'; may be repeated. They do not come back."""
    trainer: Annotated[bool, _shown()] = False
    """SRC is a checkpoint-N of the HF Trainer: take its optimizer along, and make a run folder that
    train_tpu.py continues."""
    fields: _ProjectorFields = ProjectorFields()

    def run(self) -> int:
        """Converts."""
        if self.trainer:
            return self._hand_over()
        from convert import to_flax

        dst = to_flax(
            self.src,
            self.dst,
            step=self.step,
            given=self.fields.given(),
            ignore=self.ignore,
            **self.options(),
        )
        _log.info("wrote %s", dst)
        return 0

    def _hand_over(self) -> int:
        from flax_projector.handover.to_run import to_run

        if self.dtype is not None or self.ignore:
            raise ValueError(
                "--trainer goes with neither --dtype nor --ignore: a run keeps everything, in "
                "float32"
            )
        dst = to_run(
            self.src,
            self.dst,
            step=self.step,
            given=self.fields.given(),
            overwrite=self.overwrite,
            verify=not self.no_verify,
        )
        _log.info("wrote %s", dst)
        return 0


@dataclass(frozen=True)
class ToTorch(_Conversion):
    """Flax folder or training run -> HF folder, or .safetensors or .pt file."""

    src: Annotated[Positional[str], _shown("SRC")]
    """What to convert: a folder."""
    dst: Annotated[Positional[str], _shown("DST")]
    """The folder to write; or a .safetensors, .pt, .pth or .bin file, for the weights alone."""
    step: Annotated[int | None, _LATEST] = None
    """Which checkpoint of a training run."""
    prefix: Annotated[str | None, _shown("TEXT", '(default: "projector." for a projector)')] = None
    """What the names of the tensors begin with."""
    trainer: Annotated[bool, _shown()] = False
    """SRC is the folder of a training run: take its optimizer along, and make a checkpoint-N that
    the HF Trainer continues."""
    hf_folder: Annotated[bool, _shown()] = False
    """Also write what tiny-audio saves beside the weights: the tokenizer with the audio token, the
    chat template, a config.json with both towers', how clips are read and texts generated."""
    audio_model_id: Annotated[str | None, _shown("ID", "(default: as the run has it)")] = None
    """Of --hf-folder: what config.json calls the encoder, a hub id or a path on the server."""
    text_model_id: Annotated[str | None, _shown("ID", "(default: as the run has it)")] = None
    """Of --hf-folder: what config.json calls the LLM."""

    def run(self) -> int:
        """Converts."""
        if self.trainer or self.hf_folder:
            return self._write_whole()
        if self.audio_model_id or self.text_model_id:
            raise ValueError("--audio-model-id and --text-model-id need --hf-folder")
        from convert import to_torch

        dst = to_torch(
            self.src,
            self.dst,
            step=self.step,
            prefix=self.prefix,
            **self.options(),
        )
        _log.info("wrote %s", dst)
        return 0

    def _write_whole(self) -> int:
        """Writes a folder for tiny-audio, with more in it than the projector."""
        names = {"audio_model_id": self.audio_model_id, "text_model_id": self.text_model_id}
        if self.trainer and (self.hf_folder or any(names.values())):
            raise ValueError("--trainer does not go with --hf-folder: write two folders")
        if self.prefix is not None:
            raise ValueError("--prefix is for weights alone: a folder has tiny-audio's names")
        if self.trainer:
            from flax_projector.handover.to_trainer import to_trainer

            dst = to_trainer(self.src, self.dst, step=self.step, **self.options())
        else:
            from convert.hf_folder import to_hf_folder

            dst = to_hf_folder(self.src, self.dst, step=self.step, **names, **self.options())
        _log.info("wrote %s", dst)
        return 0


@dataclass(frozen=True)
class Verify:
    """Compares two checkpoints: configs, every byte of every tensor, and outputs of projectors."""

    a: Annotated[Positional[str], _shown("A")]
    """A checkpoint of PyTorch or of Flax, or a model's id on the hub. Projectors run in PyTorch."""
    b: Annotated[Positional[str], _shown("B")]
    """The other one, in any of these forms. Projectors run in Flax, on the same random input."""
    step: Annotated[int | None, _LATEST] = None
    """Which checkpoint, of A or B or both."""
    ignore: Annotated[UseAppendAction[tuple[str, ...]], _shown("PATTERN")] = ()
    """Leave out tensors of PyTorch that match, as `to-flax` does; may be repeated."""
    fields: _ProjectorFields = ProjectorFields()

    def run(self) -> int:
        """Compares, and prints what differs."""
        from convert import verify
        from convert.report import comparison_text

        result = verify(
            self.a, self.b, step=self.step, given=self.fields.given(), ignore=self.ignore
        )
        sys.stdout.write(comparison_text(result))
        return 0 if result.is_same else 1


@dataclass(frozen=True)
class Inspect:
    """Shows which model a checkpoint holds, whether it converts, its config and its tensors."""

    path: Annotated[Positional[str], _shown("PATH")]
    """A checkpoint of PyTorch or of Flax, or the id of a model on the Hugging Face hub."""
    step: Annotated[int | None, _LATEST] = None
    """Which checkpoint, where there are several."""

    def run(self) -> int:
        """Prints what the headers show."""
        from convert import inspect
        from convert.report import summary_text

        sys.stdout.write(summary_text(inspect(self.path, step=self.step)))
        return 0


_Command = (
    Annotated[ToFlax, subcommand("to-flax")]
    | Annotated[ToTorch, subcommand("to-torch")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Inspect, subcommand("inspect")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      The exit code, as of `diff`: 0 done or the same, 1 different, 2 an error; 130 on Ctrl-C.
    """
    command = tyro.cli(
        _Command,
        prog="flax-projector-convert",
        description=__doc__,
        args=argv,
        config=(OmitArgPrefixes, FlagCreatePairsOff),
    )
    try:
        return command.run()
    except (ValueError, OSError) as error:
        _log.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        _log.error("interrupted")
        return 130


def cli() -> int:
    """Entry point of the program: also sets up logging, and leaves accelerators to others."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    start_in_utf8()
    setup_logging("%(message)s")
    return main()


if __name__ == "__main__":
    sys.exit(cli())

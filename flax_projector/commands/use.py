"""What the commands take that use a projector."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from flax_projector.commands.decoding import Decoding
from flax_projector.config import MeshConfig

if TYPE_CHECKING:  # JAX takes its time; `--help` should not
    from flax_projector.inference.listen import Listener


@dataclass(frozen=True, kw_only=True)
class Use(Decoding):
    """What the commands take that use a projector."""

    run: Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Folder of a train_tpu.py run, on a disk or in a bucket. Or a projector from elsewhere: a
    folder that `python -m convert to-flax` wrote, or tiny-audio's, with its config.json."""
    projector: Annotated[str | None, tyro.conf.arg(metavar="best|final|STEP|PATH")] = None
    """Which projector: the best or the final one of the run, that of a checkpoint, or any other
    that the converter reads. If not given: the final one or, if the run has not ended, that of its
    newest checkpoint."""
    encoder: str | None = None
    """The encoder, if it is no longer where the run found it, or the projector does not say which:
    an HF folder, URL or hub id."""
    llm: str | None = None
    """The same for the LLM."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def listener(self) -> "Listener":
        """Loads the run."""
        from flax_projector.inference.listen import Listener

        return Listener(
            self.run,
            projector=self.projector,
            encoder=self.encoder,
            llm=self.llm,
            mesh=self.mesh,
            decoding=self.decoding(),
        )

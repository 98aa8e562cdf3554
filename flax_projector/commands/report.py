"""A run as a page to look at."""

import logging
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes one HTML page about a run or several, with curves, scores and clips to listen to.

    Training writes it, too, whenever it has evaluated.
    """

    runs: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(at least one)")
        ]
    ]
    """Folders of train_tpu.py runs, or those that `evaluate --out` wrote."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.html")] = None
    """The page. If not given: RUN/report.html, if there is only one."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")] = ()
    """Manifests or data sets with the clips of held-out sets. If not given: where the run found
    them, but only manifests are read."""

    def __call__(self) -> None:
        """Logs where the page is."""
        import jax

        from flax_projector.report.writing import write_report

        jax.config.update("jax_platforms", "cpu")  # accelerators are not needed, and may be in use
        file = write_report(self.runs, out=self.out, sources=self.data)
        log.info("report written: %s", file)

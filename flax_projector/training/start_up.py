"""How long a start takes, from the beginning of the program to its first step."""

import logging
import time

log = logging.getLogger(__name__)


class StartUp:
    """Times the phases of a start, one after the other."""

    def __init__(self, phase: str):
        """Begins with a phase."""
        self._secs: dict[str, float] = {}
        self._phase, self._since = phase, time.monotonic()

    def enter(self, phase: str) -> None:
        """Ends the phase before, and begins another."""
        now = time.monotonic()
        self._secs[self._phase] = now - self._since
        self._phase, self._since = phase, now

    def finish(self) -> dict[str, float]:
        """Ends the last phase, and logs all of them in one line.

        Returns:
          Seconds by phase, as metrics.
        """
        self.enter("")
        phases = ", ".join(f"{phase} {secs:.1f}" for phase, secs in self._secs.items())
        log.info("the first step is done after %.1f s: %s", sum(self._secs.values()), phases)
        return {f"start_secs/{name.replace(' ', '_')}": secs for name, secs in self._secs.items()}

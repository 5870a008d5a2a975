"""That nothing stays behind of who is gone."""

from __future__ import annotations

import os
import time

from conftest import Daemon, eventually


class Baseline:
    """What the daemon holds when nobody is there."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        # Its user has been there, and has a socket: see mount/controls.py.
        os.stat(daemon.mount / ".control")
        self.regions = set(os.listdir(daemon.mount))
        self.held = self._held()
        same = 0
        for _ in range(100):
            # What is foreign is closed by a thread, in its own time.
            time.sleep(0.05)
            before, self.held = self.held, self._held()
            same = same + 1 if before == self.held else 0
            if same == 5:
                break

    def _held(self) -> tuple[float, ...]:
        daemon = self.daemon
        return (
            daemon.metric("sharers"),
            daemon.metric("tasks"),
            # A keeper, once there has been a file, stays.
            daemon.descriptors() - len(list(daemon.run.glob("users/*/keeper"))),
            len(daemon.shm_objects()),
        )

    def back(self) -> bool:
        # A task that was about to end, then, is no loss.
        return all(now <= then for now, then in zip(self._held(), self.held, strict=True))

    def check(self) -> None:
        try:
            eventually(self.back, f"back to {self.held}")
        except AssertionError:
            print("there is now:", self._held())
            raise
        assert set(os.listdir(self.daemon.mount)) == self.regions

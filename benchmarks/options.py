"""The options that all benchmarks have: how much to measure, and where it goes."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks import results

Plan = TypeVar("Plan")


class Options(Generic[Plan]):
    """A command line; more options go to its `parser`."""

    def __init__(self, about: str | None, plans: tuple[Plan, Plan, Plan], less: str) -> None:
        """`about`: the script's own words; `plans`: full, quick, smoke; `less`: what quick is."""
        self._plans = plans
        self.parser = argparse.ArgumentParser(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        size = self.parser.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help=less)
        size.add_argument("--smoke", action="store_true", help="to see that everything runs")
        self.parser.add_argument(
            "--results", type=Path, default=results.RESULTS, help="directory for the JSON"
        )

    def parse(self, longest: int = 0) -> tuple[argparse.Namespace, Plan]:
        """What was given, and how much that is.

        From then on a signal is an exception, so that everything is taken down; and so is the
        end of `longest` seconds.
        """
        arguments = self.parser.parse_args()
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        signal.alarm(longest)
        full, quick, smoke = self._plans
        return arguments, quick if arguments.quick else smoke if arguments.smoke else full

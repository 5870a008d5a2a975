"""Jobs on a Ray cluster, and the image that they use."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import Cluster, Machine, cluster
from conftest import BASE, MiB, temporary

URL = "s3://indexes/wiki.img"
PARTS = [8 * MiB] * 3 + [2 * MiB]
NUMBERS = sum(PARTS) // 8
SUM = NUMBERS * (NUMBERS - 1) // 2
PUSH = f"""
import json
import signal
import numpy as np
from libmshare import Region
with Region.create("wiki", {sum(PARTS)}, start={BASE}) as region:
    region.ndarray({NUMBERS}, np.int64)[:] = range({NUMBERS})
    print(json.dumps(region.push("file://DIRECTORY/indexes/wiki.img").digest))
    region.unlink()
"""
BEGIN = f"""
import json, os
import numpy as np, ray
from libmshare import *
from libmshare.ray import everywhere
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(log_to_driver=False)

def on(node):
    return dict(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))

def nodes():
    found = {{each["NodeManagerAddress"]: each["NodeID"] for each in ray.nodes() if each["Alive"]}}
    return [found[address] for address in sorted(found)]

def say(value):
    print("SAYS", json.dumps(value), flush=True)

@ray.remote(max_retries=0)
def look(region, part=0, parts=1):
    numbers = region.ndarray({NUMBERS}, np.int64)
    return region.start, region.name, int(numbers[part::parts].sum())
"""


class Job:
    """A program on a machine, in the cluster; it says values, and goes on at a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def says(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("SAYS "):  # Ray prints, too
                return json.loads(line.removeprefix("SAYS "))
        pytest.fail(f"it ended: {self.process.communicate()[1]}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        print(self.process.communicate(timeout=200)[1])
        return self.process.returncode


@contextlib.contextmanager
def job(machine: Machine, program: str) -> Iterator[Job]:
    with machine.start("python", "-c", BEGIN + program) as process:
        try:
            yield Job(process)
        finally:
            process.kill()


@pytest.fixture(scope="module", name="made")
def made_fixture() -> Iterator[Cluster]:
    with temporary() as directory, cluster(directory) as made:
        first = made.machines[0]
        first.python(PUSH.replace("DIRECTORY", str(made.switch.store.directory)))
        yield made


@pytest.fixture(name="machines")
def machines_fixture(made: Cluster) -> Iterator[list[Machine]]:
    made.switch.fetched()
    yield made.machines
    for each in made.machines:
        each.clear()

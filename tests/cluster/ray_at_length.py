"""libmshare.ray on a real Ray cluster: what goes wrong, and nodes that come and go.

`make test-ray` runs it: several jobs, each with processes of its own on each node, and a third
machine.
"""

from __future__ import annotations

import os
import re

import pytest
from cluster import Cluster, Machine
from conftest import BASE, eventually
from jobs import PARTS, SUM, URL, job
from jobs import machines_fixture as _machines  # noqa: F401 - a fixture
from jobs import made_fixture as _made  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes networks and mounts, which is root's"),
]


def test_what_goes_wrong_says_where_and_a_killed_job_leaves_nothing(
    made: Cluster, machines: list[Machine]
) -> None:
    machines[1].python("from libmshare import *\nRegion.create('wiki', '2M').close()\nprint(0)")
    program = f"""
def fails(*words, **more):
    try:
        everywhere(*words, **more)
    except MshareError as error:
        say([type(error).__name__, str(error)])
fails("{URL}")
fails("{URL}", nodes=["nosuch"])
fails("{URL}", memory=1 << 60)
fails("{URL}", timeout=0)
fails("s3://indexes/nosuch.img")
input()
with everywhere("{URL}", keep=False) as wiki:
    say(ray.get([look.options(**on(each)).remote(wiki.region) for each in nodes()]))
    say(os.getpid())
    input()
"""
    with job(machines[0], program) as told:
        for kind, pattern in (
            ("RegionExists", f"on node {machines[1].address}: a region of that name exists"),
            ("MshareError", "nosuch is no living node"),
            ("NoMemory", r"on node 10.99.0.\d Ray has \d+ bytes"),
            ("Busy", r"not filled in 0 s: 10.99.0.1, 10.99.0.2;"),
            ("ImageError", "it is not in the store"),
        ):
            found = told.says()
            assert found[0] == kind and re.search(pattern, found[1]), found
        for each in machines:  # that no holder was left is seen here
            each.clear()
        made.switch.fetched()
        told.go_on()
        assert [[start, total] for start, _, total in told.says()] == [[BASE, SUM]] * 2
        assert sorted(made.switch.fetched()) == sorted(2 * PARTS)
        assert [each.regions() for each in machines] == [[], []]
        assert all(each.memory() for each in machines)
        machines[0].run("kill", "-9", told.says())
        assert told.ends() != 0
    eventually(lambda: not any(each.memory() for each in machines), "that all is given back")


def test_nodes_come_and_go(made: Cluster, machines: list[Machine]) -> None:
    program = f"""
with everywhere("{URL}") as wiki, everywhere("{URL}", keep=False) as unnamed:
    say(len(nodes()))
    input()
    late = nodes()[2]
    try:
        ray.get(look.options(**on(late)).remote(wiki.region))
    except ray.exceptions.RaySystemError as error:
        say(str(error))
    try:
        everywhere("{URL}", nodes=[late])
    except NotMounted as error:
        say(str(error))
    input()
    there = look.options(**on(late) | dict(num_cpus=0))
    for sent in (wiki.region, unnamed.region):
        say(ray.get([there.remote(sent, i, 2) for i in range(2)]))
        input()
with everywhere("{URL}") as wiki:
    say(len(wiki.nodes))
    input()
    say(ray.get([look.options(**on(each)).remote(wiki.region) for each in nodes()[:2]]))
with everywhere("{URL}") as wiki:  # before Ray knows, or it has just learnt it
    say(len(wiki.nodes))
"""
    with job(machines[0], program) as told:
        assert told.says() == 2
        made.switch.fetched()
        late = made.add(serves=False)
        told.go_on()
        assert "no msharefs is" in told.says()
        assert f"on node {late.address}: no msharefs is" in (text := told.says())
        assert "start msharefsd" in text
        late.serve()
        told.go_on()
        for names in (["wiki"], ["wiki", "wiki-"]):  # the second one's has a number
            rows = told.says()
            assert {row[0] for row in rows} == {BASE} and sum(row[2] for row in rows) == SUM
            assert [each[:5] for each in late.regions()] == names
            assert sorted(made.switch.fetched()) == sorted(PARTS)
            told.go_on()
        assert told.says() == 3
        assert late.regions() == ["wiki"]
        machines.remove(late)
        late.end()
        told.go_on()
        assert told.says() == [[BASE, "wiki", SUM]] * 2
        assert told.says() == 2
        assert told.ends() == 0
        assert made.switch.fetched() == []

"""libmshare.ray on a real Ray cluster: two machines of their own, each with its own daemon.

It is run by `make test-ray`, with ray_at_length.py; a cluster takes half a minute to start, and on
a busy machine minutes.  What needs no cluster is in test_sent.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from cluster import Cluster, Machine
from conftest import BASE
from jobs import NUMBERS, PARTS, SUM, URL, job
from jobs import machines_fixture as _machines  # noqa: F401 - a fixture
from jobs import made_fixture as _made  # noqa: F401 - a fixture
from pages import DOCS, blocks

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes networks and mounts, which is root's"),
]


def test_each_node_fetches_once_and_no_other_job_does(
    made: Cluster, machines: list[Machine]
) -> None:
    """The other jobs are those of docs/beyond.md, as they stand there."""
    program = f"""
with everywhere("{URL}") as wiki:
    say([sorted(wiki.nodes) == sorted(nodes()), ray.available_resources()["memory"]])
    say(ray.get([look.options(**on(nodes()[i % 2])).remote(wiki.region, i, 8) for i in range(8)]))

    @ray.remote
    def pass_on(region, node):
        return ray.get(look.options(**on(node)).remote(region))

    say(ray.get(pass_on.options(**on(nodes()[0])).remote(wiki.region, nodes()[1])))
say(ray.cluster_resources()["memory"])
"""
    with job(machines[0], program) as told:
        everywhere, memory = told.says()
        rows = told.says()
        assert {tuple(row[:2]) for row in rows} == {(BASE, "wiki")}
        assert sum(row[2] for row in rows) == SUM
        assert told.says() == [BASE, "wiki", SUM]
        assert everywhere and told.says() - memory == 2 * sum(PARTS)
        assert told.ends() == 0
    assert sorted(made.switch.fetched()) == sorted(2 * PARTS)
    assert [each.regions() for each in machines] == [["wiki"]] * 2
    shown = [each.text for each in blocks(DOCS / "beyond.md") if "import ray" in each.text]
    programs = [machines[0].start("python", "-c", each) for each in shown]
    said = [each.communicate(timeout=200) for each in programs]
    assert [each.returncode for each in programs] == [0, 0], said
    (search, _), (double, _) = said
    content = np.arange(NUMBERS).tobytes()
    counts = [content.count(word) for word in (b"to", b"be", b"or", b"not")]
    assert search.splitlines()[-1] == str(counts)
    assert double == ""
    assert made.switch.fetched() == []

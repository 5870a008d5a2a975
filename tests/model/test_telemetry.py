"""What is counted, and how much of it is shown."""

from __future__ import annotations

from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from msharefsd.link import board
from msharefsd.telemetry import byregion, metrics
from msharefsd.telemetry.counts import Counts
from msharefsd.telemetry.figures import duration
from msharefsd.telemetry.metrics import BUCKETS, Metrics


def parsed(text: bytes) -> dict[str, Metric]:
    found = text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call] # theirs
    return {family.name: family for family in found}


def figures(number: int) -> byregion.Figures:
    label = f'r{number}"\\n{{}}'
    return byregion.Figures(number << 20, 2, 7, label, Counts(number, 5, 6))


async def test_only_the_largest_have_figures_of_their_own() -> None:
    count = byregion.MOST + 50
    text = Metrics(lambda: ()).render((), byregion.families(map(figures, range(count))))
    found = parsed(text)
    by_region = [family for name, family in found.items() if name.startswith("msharefs_region_")]
    assert len(by_region) == 5
    for family in by_region:
        labels = {sample.labels["region"] for sample in family.samples}
        assert labels == {figures(number).label for number in range(50, count)}
        assert {sample.labels["uid"] for sample in family.samples} == {"7"}
    (left_out,) = found["msharefs_regions_left_out"].samples
    assert left_out.value == 50
    faults = found["msharefs_region_faults"]
    assert (faults.type, max(sample.value for sample in faults.samples)) == ("counter", count - 1)


async def test_histograms_of_several_processes_add_up() -> None:
    one, other = Metrics(lambda: ()), Metrics(lambda: ())
    for seconds in (BUCKETS[0], 0.0003, 0.3, 100.0):
        one.service.observe("memory", seconds)
        other.service.observe("memory", seconds)
    other.service.observe("file", 0.0003)
    family = parsed(one.render(other.samples()))["msharefs_fault_seconds"]
    values = {
        (sample.name, sample.labels["source"], sample.labels.get("le")): sample.value
        for sample in family.samples
    }
    assert family.type == "histogram"
    assert values["msharefs_fault_seconds_bucket", "memory", str(BUCKETS[0])] == 2
    assert values["msharefs_fault_seconds_bucket", "memory", "0.0005"] == 4
    assert values["msharefs_fault_seconds_bucket", "memory", "+Inf"] == 8
    assert values["msharefs_fault_seconds_count", "memory", None] == 8
    assert values["msharefs_fault_seconds_count", "file", None] == 1
    assert round(values["msharefs_fault_seconds_sum", "memory", None], 4) == 200.6007
    # What a process had counted that has ended is known by these.
    assert {name for name, _, _ in values} == {
        f"msharefs_fault_seconds{ending}" for ending in ("_bucket", "_sum", "_count")
    }
    assert {"_bucket", "_sum", "_count", "_total"} == set(metrics.COUNTED)


def test_the_board_has_counts() -> None:
    fd = board.make()
    one, other = board.Board(fd), board.Board(fd)
    slots = [one.take() for _ in range(3)]
    for slot in slots:
        one.set(slot, 10 * slot + 1)
        one.set_sharers(slot, 10 * slot + 2)
        one.set_counts(slot, Counts(slot, 1 << 50, 2).numbers())
    for slot in slots:
        assert (other.get(slot), other.sharers(slot)) == (10 * slot + 1, 10 * slot + 2)
        assert other.counts(slot) == (slot, 1 << 50, 2)
    one.give_back(slots[1])
    assert other.counts(slots[1]) == board.NONE
    last = board.SLOTS - 1
    one.set_counts(last, (1, 2, 3))
    assert other.counts(last) == (1, 2, 3)
    for nowhere in (board.NOWHERE, board.SLOTS):
        assert other.counts(nowhere) == board.NONE
    one.set_counts(board.NOWHERE, (1, 1, 1))
    one.close()
    other.close()


def test_how_long() -> None:
    told = [duration(seconds) for seconds in (0.9, 42, 423, 18720, 273600)]
    assert told == ["0 s", "42 s", "7 min 3 s", "5 h 12 min", "3 d 4 h"]

"""A short run of the fuzzer, always over the same inputs: its bad columns are empty."""

import random
from collections import Counter

import pytest

from fuzz_inputs import TARGETS, make_seeds, verdict

INPUTS = {"pictures": 400, "clips": 100, "rows": 150, "adapters": 100, "weights": 20, "configs": 60}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_or_refused_by_name(seeds, tmp_path, target):
    bad, columns = [], Counter()
    for i in range(INPUTS[target]):
        one = TARGETS[target](seeds, tmp_path, random.Random(f"test/{target}/{i}"))
        column, said = verdict(one)
        columns[column] += 1
        if column not in ("accepted", "clear"):
            bad.append((i, one.label, column, said))
    assert not bad
    assert columns["accepted"] and columns["clear"]

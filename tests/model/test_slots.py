"""The slots together: in these combinations every value of a slot meets every value of every other."""

import itertools

import pytest
from allpairspy import AllPairs

from slot_harness import SLOTS, check_everything, combined

PAIRWISE = [dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])]


def test_each_pair_of_values_is_there() -> None:
    for (slot, values), (other, others) in itertools.combinations(SLOTS.items(), 2):
        for pair in itertools.product(values, others):
            assert any((choice[slot], choice[other]) == pair for choice in PAIRWISE), (slot, other, pair)


@pytest.mark.parametrize("choice", PAIRWISE, ids=lambda choice: ", ".join(choice.values()))
def test_combination(choice: dict[str, str]) -> None:
    """Against the papers; gradients, causality, cache, checkpoint, generation: see `slot_harness`."""
    check_everything(combined(choice))

"""Combinations of the model's slots: every value of a slot meets every value of every other slot."""

import dataclasses
import itertools
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from allpairspy import AllPairs

from glassgpt.config.model import ModelConfig
from slot_harness import SLOTS, check_everything, combined

PAIRWISE = [dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])]


# Sizes, and settings with their own tests: dropout and initialisation (test_gpt.py) and kernels, which
# `check_everything` compares.
NOT_SLOTS = {"vocab_size", "vocab_multiple", "context_length", "n_layer", "n_head", "n_embd"}
NOT_SLOTS |= {"dropout", "residual_init", "attention"}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if f.name not in NOT_SLOTS])
def test_every_value_of_the_config_is_in_the_slot_table(name: str) -> None:
    """A new variant that is missing from `slot_harness.SLOTS` would be untested."""
    settings = [setting for values in SLOTS.values() for setting in values.values()]
    tested = {getattr(ModelConfig(), name), *(setting[name] for setting in settings if name in setting)}
    hint: Any = get_type_hints(ModelConfig)[name]
    values = set(get_args(hint)) if get_origin(hint) is Literal else {True, False} if hint is bool else set()
    assert values <= tested, f"add {values - tested} to slot_harness.SLOTS"
    assert len(tested) > 1, f"add a value of {name} to slot_harness.SLOTS"


def test_each_pair_of_values_is_combined() -> None:
    for (slot, values), (other, others) in itertools.combinations(SLOTS.items(), 2):
        for pair in itertools.product(values, others):
            assert any((choice[slot], choice[other]) == pair for choice in PAIRWISE), (slot, other, pair)


@pytest.mark.parametrize("choice", PAIRWISE, ids=lambda choice: ", ".join(choice.values()))
def test_a_combination_has_all_properties_of_a_model(choice: dict[str, str]) -> None:
    """It equals the papers' formulas and satisfies the other checks of `slot_harness.check_everything`."""
    check_everything(combined(choice))

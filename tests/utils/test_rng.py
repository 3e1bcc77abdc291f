"""States of random number generators."""

from unittest import mock

import pytest
import torch

from glassgpt.utils.rng import device_rng


def test_the_state_of_mps_is_restored_after_an_error() -> None:
    with (
        mock.patch("torch.mps.get_rng_state", return_value="state"),
        mock.patch("torch.mps.set_rng_state") as set_state,
        pytest.raises(ZeroDivisionError),
        device_rng(torch.device("mps")),
    ):
        raise ZeroDivisionError
    set_state.assert_called_once_with("state")

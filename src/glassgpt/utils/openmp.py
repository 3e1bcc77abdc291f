"""A setting of OpenMP that has to be made before torch is imported."""

import os


def limit_spinning() -> None:
    """Let GNU's OpenMP threads wait for each other by spinning only briefly. Call before importing torch.

    By default they spin a hundred times longer: if another program uses the cores, each of a training step's hundreds
    of parallel regions may lose a whole time slice. The user's own setting is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")

"""Environment variables of the numerical libraries: one that is set before torch is imported, and those that matter."""

import os

# OpenMP, MKL, oneDNN, torch, cuBLAS and cuDNN read their settings from variables with these prefixes. Many of them
# change sums: OMP_THREAD_LIMIT, OMP_DYNAMIC, MKL_CBWR, ONEDNN_DEFAULT_FPMATH_MODE, NVIDIA_TF32_OVERRIDE.
_PREFIXES = tuple("OMP_ KMP_ GOMP_ MKL_ ONEDNN_ DNNL_ ATEN_ TORCH_ALLOW_TF32_ NVIDIA_TF32_ CUBLAS CUDNN_".split())
# These change how threads wait, where they run and what is printed. A run restores its number of threads itself.
_WITHOUT_EFFECT = frozenset(
    "OMP_NUM_THREADS MKL_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME OMP_PROC_BIND OMP_PLACES "
    "KMP_AFFINITY GOMP_CPU_AFFINITY OMP_STACKSIZE OMP_DISPLAY_ENV OMP_DISPLAY_AFFINITY MKL_VERBOSE".split()
)


def limit_spinning() -> None:
    """Let GNU's OpenMP threads wait for each other by spinning only briefly. Call before importing torch.

    By default they spin a hundred times longer: if another program uses the cores, each of a training step's hundreds
    of parallel regions may lose a whole time slice. The user's own setting is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def numeric_variables() -> str:
    """The variables that are set and may change the bits of a run: `MKL_CBWR=AVX2 OMP_DYNAMIC=true`."""
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES) and name not in _WITHOUT_EFFECT)
    return " ".join(f"{name}={os.environ[name]}" for name in names)

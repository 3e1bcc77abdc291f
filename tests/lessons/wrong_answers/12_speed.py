"""Wrong answers to the exercises of lesson 12, each with a different mistake."""

from torch import Tensor


def _overflows(m: Tensor, d: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    share = d * m.exp()
    return m.max(), share.sum() / m.max().exp(), share @ out / share.sum()


def _keeps_sums(m: Tensor, d: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    share = d * (m - m.max()).exp()
    return m.max(), d.sum(), share @ out / share.sum()


WRONG = {
    "least_seconds": [
        lambda flops, moved, peak, bandwidth: flops / peak + moved / bandwidth,
        lambda flops, moved, peak, bandwidth: flops / peak,
        lambda flops, moved, peak, bandwidth: moved / bandwidth,
        lambda flops, moved, peak, bandwidth: max(flops / bandwidth, moved / peak),
    ],
    "product_intensity": [
        lambda M, K, N, size: 2 * M * K * N / (M * K + K * N + M * N),
        lambda M, K, N, size: M * K * N / (size * (M * K + K * N + M * N)),
        lambda M, K, N, size: 2 * M * K * N / (size * (M * K + K * N)),
        lambda M, K, N, size: 2 * M * K * N / (size * K * N),
        lambda M, K, N, size: size * (M * K + K * N + M * N) / (2 * M * K * N),
    ],
    "merge_parts": [
        lambda m, d, out: (m.max(), d.sum(), out.mean(dim=0)),
        lambda m, d, out: (m.max(), d.sum(), d @ out / d.sum()),
        lambda m, d, out: (m.max(), d.sum(), m.softmax(dim=0) @ out),
        _overflows,
        _keeps_sums,
    ],
}

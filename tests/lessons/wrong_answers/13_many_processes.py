"""Wrong answers to the exercises of lesson 13, each with a different mistake."""

WRONG = {
    "numbers_sent": [
        lambda N, W: (W - 1) / W * N,
        lambda N, W: (W - 1) * N,
        lambda N, W: 2 * N,
        lambda N, W: 2 * (W - 1) * N,
    ],
    "bytes_per_parameter": [
        lambda stage, W: 16 / W,
        lambda stage, W: 16 if stage == 0 else sum([4, 4, 8][stage:]) + sum([4, 4, 8][:stage]) / W,
        lambda stage, W: 16,
        lambda stage, W: [16, 8 + 8 / W, 8 + 8 / W, 16 / W][stage],
    ],
    "mean_over_ranks": [
        lambda gradients, rows: gradients.mean(dim=0),
        lambda gradients, rows: rows.float() @ gradients,
        lambda gradients, rows: rows.float() @ gradients / len(rows),
        lambda gradients, rows: (gradients / rows[:, None]).sum(dim=0) * rows.sum() / len(rows) ** 2,
        lambda gradients, rows: gradients * rows[:, None] / rows.sum(),
    ],
}

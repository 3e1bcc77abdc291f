"""Wrong answers to the exercises of lesson 6, each with a different mistake."""

import torch

WRONG = {
    "cache_bytes": [
        lambda L, H, K, D, S, width: L * K * D * S * width,
        lambda L, H, K, D, S, width: 2 * L * H * D * S * width,
        lambda L, H, K, D, S, width: 2 * K * D * S * width,
        lambda L, H, K, D, S, width: 2 * L * K * D * width,
        lambda L, H, K, D, S, width: L * K * D * S,
    ],
    "split_heads": [
        lambda x, H: x.reshape(x.shape[0], H, x.shape[1], -1),
        lambda x, H: x.view(*x.shape[:2], H, -1),
        lambda x, H: x.view(*x.shape[:2], -1, H).permute(0, 3, 1, 2),
        lambda x, H: x.view(*x.shape[:2], H, -1).permute(0, 2, 3, 1),
    ],
    "expand_key_heads": [
        lambda W, H, K: W.repeat(H // K, 1),
        lambda W, H, K: W.repeat_interleave(H // K, dim=0),
        lambda W, H, K: W.view(K, len(W) // K, -1).repeat_interleave(H // K, dim=0).flatten(0, 1) * K / H,
        lambda W, H, K: W.view(K, len(W) // K, -1).repeat_interleave(H // K, dim=0),
        lambda W, H, K: torch.cat([W, torch.zeros(len(W) * (H // K - 1), W.shape[1])]),
    ],
}

"""Choose the next token: pure functions of logits (n, V) for n samples and a vocabulary of V."""

import torch
from torch import Tensor

from glassgpt.config.schema import SamplingConfig
from glassgpt.utils.errors import UserError


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to -inf (Fan et al., 2018). Logits equal to the k-th largest are kept."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to at least p (Holtzman et al., 2020)."""
    if p >= 1:
        return logits  # a float32 sum reaches 1 before the last tokens and would drop them
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    # A token stays if those before it sum to less than p, so the most likely token always stays.
    dropped = (probabilities.cumsum(dim=-1) - probabilities) >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the most likely token (Nguyen et al., 2024)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def sampling_distribution(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """The distribution (n, V) that tokens are drawn from: apply temperature, top-k, top-p and min-p in this order.

    Temperature 0 gives all probability to the most likely token.
    """
    logits = logits.float()
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The largest logit becomes 0 first, so that a tiny temperature gives -inf and not inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / settings.temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    return logits.softmax(dim=-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token (n,) from each distribution (n, V), by inversion: one random number per row.

    `torch.multinomial` draws V numbers per row, which takes a tenth of a step for 8 rows of GPT-2's vocabulary. The
    CPU's `generator` gives the same numbers for every device. Raises `UserError` if a probability is not finite.
    """
    if probabilities.device.type == "mps":
        probabilities = probabilities.cpu()  # MPS has no float64
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not sums[:, -1].isfinite().all():
        raise UserError("the model's probabilities are not finite: its weights diverged; use an earlier checkpoint")
    # Below 1 after rounding too: otherwise a last token without probability could be drawn.
    share = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * (1 - 2**-50)
    return torch.searchsorted(sums, share.to(sums.device) * sums[:, -1:], right=True).squeeze(1)

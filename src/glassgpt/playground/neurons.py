"""The requests of the view Feed-forward. Shapes: `T` tokens, `F` neurons of a block, `V` ids that can be generated."""

from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glassgpt.data.training_data import find_training_data
from glassgpt.interpretability.capture import at_least_float32, require_index
from glassgpt.interpretability.neurons import NeuronSearch, neuron_logits, neuron_values
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import Block
from glassgpt.playground.handlers import Answer, activations, ids_on_device
from glassgpt.playground.model_pool import LoadedModel
from glassgpt.playground.schemas import CaptureRequest, pack
from glassgpt.tokenizers.builtin import tokenizer_file
from glassgpt.utils.formatting import escape_token
from glassgpt.utils.rng import generator_for

SEARCH_TOKENS, WINDOW_TOKENS = 16_384, 128  # of a validation split, spread over all of it
BEFORE, AFTER = 40, 16  # tokens of an excerpt around the one with the largest value
KEPT_SEARCHES = 4  # of one model: its validation split and texts of the page


def neurons(loaded: LoadedModel, request: CaptureRequest, position: int, layer: int) -> Answer:
    """All neurons of a layer at one token: their values (F), and the norms of their output vectors (F)."""
    require_index("position", position, len(request.ids))
    values = neuron_values(loaded.model, layer, stream_at(loaded, request, layer)[position])
    arrays = {name: value.float() for name, value in vars(values).items() if value is not None}
    return pack({**arrays, "norms": output_vectors(loaded, layer).norm(dim=0)}, {})


def neuron(loaded: LoadedModel, request: CaptureRequest, position: int, layer: int, neuron: int, k: int = 10) -> Answer:
    """A neuron's value at each token (T), and the tokens whose logits it raises and lowers most, per unit of it."""
    require_index("position", position, len(request.ids))
    stream = stream_at(loaded, request, layer)
    logits = neuron_logits(loaded.model, activations(loaded, request), layer, neuron, position)[: loaded.vocab_size]
    require_finite(logits, loaded.model)
    top, bottom = (logits.topk(min(k, len(logits)), largest=largest) for largest in (True, False))
    arrays = {"top_ids": top.indices, "top": top.values, "bottom_ids": bottom.indices, "bottom": bottom.values}
    return pack({"values": neuron_values(loaded.model, layer, stream).post[:, neuron].float(), **arrays}, {})


def stream_at(loaded: LoadedModel, request: CaptureRequest, layer: int) -> Tensor:
    """The residual stream between a layer's attention and feed-forward (T, C)."""
    require_index("layer", layer, loaded.model.config.n_layer)
    one = activations(loaded, request).layers[layer]
    return one.resid_pre[0] + one.attn_out[0]


def output_vectors(loaded: LoadedModel, layer: int) -> Tensor:
    """The output vectors of a layer's neurons (C, F)."""
    return at_least_float32(cast(Block, loaded.model.blocks[layer]).feed_forward.down.weight)


def neuron_texts(loaded: LoadedModel, ids: list[int], layer: int, neuron: int) -> Generator[dict[str, Any]]:
    """The windows of the run's validation split in which a neuron's value is largest, after each step of the search.

    `ids` are searched instead if the model has no run or its data is not there. The search is kept, for all neurons.
    """
    require_index("layer", layer, loaded.model.config.n_layer)
    require_index("neuron", neuron, loaded.model.config.resolved_n_inner)
    search, source = search_of(loaded, ids)
    while True:
        if not search.is_done:
            search.advance()
        yield {
            "source": source, "searched": search.searched * search.windows.shape[1],
            "total": search.windows.numel(), "window": search.windows.shape[1],
            "texts": [excerpt(loaded, search, layer, neuron, i) for i in range(search.values.shape[1])],
        }  # fmt: skip
        if search.is_done:
            return


def search_of(loaded: LoadedModel, ids: Sequence[int]) -> tuple[NeuronSearch, str | None]:
    """The search of the model's validation split, and its name; otherwise that of a text, and None."""
    for key, search in loaded.searches.items():
        if isinstance(key, str):
            return search, key
    windows, name = validation_windows(loaded) or (ids_on_device(loaded, ids), None)
    key = tuple(ids) if name is None else name
    while key not in loaded.searches and len(loaded.searches) >= KEPT_SEARCHES:
        del loaded.searches[next(iter(loaded.searches))]
    return loaded.searches.setdefault(key, NeuronSearch(loaded.model, windows)), name


def validation_windows(loaded: LoadedModel) -> tuple[Tensor, str] | None:
    """Windows (N, T) of the validation splits, in random order, and their name; None if the data is not there."""
    config, fingerprint = loaded.config, loaded.data_fingerprint
    if config is None or fingerprint is None or loaded.tokenizer is None:
        return None
    data_config = config.data
    is_own = config.init_from is None and tokenizer_file(data_config.tokenizer) is None and not data_config.mixture
    data = find_training_data(data_config, None if is_own else loaded.tokenizer, fingerprint)
    streams = [] if data is None else [each.validation for each in data.datasets if len(each.validation)]
    if data is None or not streams:
        return None
    length = min(WINDOW_TOKENS, loaded.model.config.context_length, *map(len, streams))
    most = max(1, SEARCH_TOKENS // length // len(streams))
    parts = []
    for stream in streams:
        count = min(most, len(stream) // length)
        starts = torch.linspace(0, len(stream) - length, count, dtype=torch.float64).long()
        parts.append(torch.from_numpy(stream.windows(starts.numpy(), length)))
    windows = torch.cat(parts)
    require_index("token", int(windows.max()), loaded.vocab_size)  # a file was damaged
    order = torch.randperm(len(windows), generator=generator_for(0, "neuron texts"))
    return windows[order], f"validation split of {', '.join(data.names)}"


def excerpt(loaded: LoadedModel, search: NeuronSearch, layer: int, neuron: int, i: int) -> dict[str, Any]:
    """The i-th largest value of a neuron and the tokens around it; `at` is its token among these."""
    row, position = int(search.rows[layer, i, neuron]), int(search.positions[layer, i, neuron])
    start = max(0, position - BEFORE)
    ids = search.windows[row, start : position + AFTER + 1].tolist()
    tokenizer = loaded.tokenizer
    pieces = [str(i) if tokenizer is None else escape_token(tokenizer.decode_bytes([i], after=i)) for i in ids]
    return {"value": float(search.values[layer, i, neuron]), "pieces": pieces, "at": position - start}

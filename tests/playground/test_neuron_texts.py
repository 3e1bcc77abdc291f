"""A search for a neuron's texts that ends early is continued, also for another neuron."""

import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability import neurons as library
from glassgpt.interpretability.neurons import NeuronSearch
from glassgpt.model.gpt import GPT
from glassgpt.playground.model_pool import CaptureCache, LoadedModel
from glassgpt.playground.neurons import neuron_texts


def test_a_stopped_search_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is searched twice, and the source is the one that was searched, not the ids of the request."""
    monkeypatch.setattr(library, "BATCH_TOKENS", 4)
    model = GPT.create(ModelConfig(vocab_size=11, context_length=4, n_layer=1, n_head=1, n_embd=4), seed=1)
    loaded = LoadedModel("model", None, model, None, 0.0, CaptureCache())
    loaded.searches["a split"] = NeuronSearch(model, torch.arange(24).view(6, 4) % 11)
    first = neuron_texts(loaded, [1, 2], 0, 0)
    assert [next(first)["searched"], next(first)["searched"]] == [4, 8]
    first.close()  # as when the client leaves
    rest = list(neuron_texts(loaded, [1, 2], 0, 3))
    assert [part["searched"] for part in rest] == [12, 16, 20, 24]
    assert {part["source"] for part in rest} == {"a split"}
    assert [part["searched"] for part in neuron_texts(loaded, [1, 2], 0, 5)] == [24]

"""Every answer of the playground's API equals the tensors of the model itself."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import glassgpt
from glassgpt.interop.hf_models import export_hf
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.interventions import Edit, edited
from glassgpt.model.gpt import GPT
from glassgpt.playground.schemas import pack
from glassgpt.tokenizers.builtin import Tokenizer, gpt2_tokenizer
from glassgpt.utils.formatting import escape_token
from play_harness import GPT2_LIKE, WINDOWED, Client, serving, small_bpe, unpacked, write_run

TEXT = "the theban: abab thé"
NAMES = ("plain", "windowed", "bare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `plain` (bytes), `windowed` (BPE, all other options), `bare` (no tokenizer)."""
    folder = tmp_path_factory.mktemp("play")
    write_run(folder / "plain", GPT2_LIKE, steps=(1, 7))
    write_run(folder / "windowed", WINDOWED, small_bpe())
    model, _ = glassgpt.load(folder / "plain@1")
    export_hf(model, None, folder / "bare")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(*(folder / name for name in NAMES)) as served:
        yield served.client


@pytest.fixture(scope="module", params=range(2), ids=NAMES[:2])
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path, number: int) -> tuple[GPT, Tokenizer]:
    model, tokenizer = glassgpt.load(folder / NAMES[number])
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def model(loaded: tuple[GPT, Tokenizer]) -> GPT:
    return loaded[0]


@pytest.fixture(scope="module")
def ids(loaded: tuple[GPT, Tokenizer]) -> list[int]:
    return [int(i) for i in loaded[1].encode(TEXT)][:20]


def assert_equal(result: Any, expected: Tensor, tolerance: float = 0.0) -> None:
    """Assert exact equality, or equality within a tolerance if the two sides sum in different orders."""
    assert list(np.shape(result)) == list(expected.shape)
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=tolerance, atol=tolerance, equal_nan=True)


def run(model: GPT, ids: list[int]) -> Tensor:
    """Return the model's logits (T, V)."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]  # type: ignore[no-any-return]


def test_the_catalog_lists_the_references(client: Client, folder: Path) -> None:
    status, answer = client.get("/api/catalog")
    assert status == 200
    assert [(entry["id"], entry["kind"], entry["steps"], entry["best"]) for entry in answer["entries"]] == [
        (0, "run", [1, 7], 1),
        (1, "run", [1], 1),
        (2, "model", [], None),
    ]
    assert [entry["name"] for entry in answer["entries"]] == [str(folder / name) for name in NAMES]


def test_a_model_is_described(client: Client, model: GPT, number: int) -> None:
    facts = client.answer("model", model=number)
    config = model.config
    assert facts["config"]["n_layer"] == config.n_layer
    assert facts["config"]["window"] == config.window
    assert (facts["kv_heads"], facts["head_width"], facts["windows"]) == (
        config.resolved_n_kv_head,
        config.resolved_head_dim,
        config.windows,
    )
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {weight["name"]: weight["shape"] for weight in facts["weights"]} == {
        n: list(p.shape) for n, p in model.named_parameters()
    }
    assert facts["tables"] == (["embedding", "positions"] if number == 0 else ["embedding", "head"])
    assert client.answer("tokens", model=number, text=facts["default_text"])["ids"]


def test_each_step_gives_the_model_of_its_checkpoint(client: Client, folder: Path) -> None:
    for step in (1, 7, None):
        model, _ = glassgpt.load(f"{folder / 'plain'}@{step}" if step else folder / "plain")
        assert_equal(
            client.answer("next", model=0, step=step, ids=[1, 2, 3])["logits"], run(model, [1, 2, 3])[-1], 1e-5
        )
        assert client.answer("model", model=0, step=step)["step"] == (step or 7)
    for body in ({"step": 3}, {"step": -1}, {"step": 10**30}):
        status, answer = client.ask("model", model=0, **body)
        assert (status, "step" in answer["error"]) == (400, True)


def test_tokens_are_those_of_the_tokenizer(client: Client, loaded: tuple[GPT, Tokenizer], number: int) -> None:
    tokenizer = loaded[1]
    result = client.answer("tokens", model=number, text=TEXT)
    assert result["ids"] == tokenizer.encode(TEXT).tolist()
    parts = [bytes.fromhex(part) for part in result["bytes"]]
    assert b"".join(parts).decode() == TEXT
    assert result["pieces"] == [escape_token(part) for part in parts]
    assert result["partial"] == [part in (b"\xc3", b"\xa9") for part in parts]
    pieces = client.answer("vocabulary", model=number)["pieces"]
    assert len(pieces) == loaded[0].vocab_size
    assert [pieces[i] for i in result["ids"]] == result["pieces"]


def test_the_last_merge_gives_the_tokens(client: Client) -> None:
    states = client.answer("merges", model=1, text=TEXT)["states"]
    assert [escape_token(bytes([byte])) for byte in TEXT.encode()] == states[0]
    assert states[-1] == client.answer("tokens", model=1, text=TEXT)["pieces"]
    assert [len(a) > len(b) for a, b in itertools.pairwise(states)] == [True] * (len(states) - 1)
    assert client.ask("merges", model=0, text=TEXT)[0] == 400


def test_the_last_merge_of_gpt2_gives_its_tokens() -> None:
    from glassgpt.tokenizers.inspect import merge_states

    tokenizer = gpt2_tokenizer()
    for text in ("Hello  world's, naïve 日本語 antidisestablishmentarianism\n\n", " aaaa aaaaa", "\t"):
        ids = tokenizer.encode(text).tolist()
        assert merge_states(tokenizer, text)[-1] == [tokenizer.decode_bytes([i]) for i in ids]


def test_attention_equals_that_of_the_model(client: Client, model: GPT, ids: list[int], number: int) -> None:
    with torch.no_grad(), capture(model) as cache:
        model.hidden(torch.tensor([ids]))
    picture = client.answer("attention", model=number, ids=ids)
    weights = torch.stack([layer.pattern()[0] for layer in cache.layers])
    assert (picture["tokens"], picture["cells"]) == (len(ids), len(ids))
    assert_equal(picture["thumbnails"], (255 * weights).round().to(torch.uint8))
    assert_equal(picture["entropies"], torch.special.entr(weights).sum(-1).mean(-1) / np.log(2), 1e-5)
    assert max(picture["differences"]) < 1e-5
    for layer, head in ((0, 3), (1, 2)):
        kv = head // (model.config.n_head // model.config.resolved_n_kv_head)
        result = client.answer("head", model=number, ids=ids, layer=layer, head=head)
        # The product over one head is split into other blocks.
        assert_equal(result["pattern"], weights[layer, head], 1e-6)
        assert (result["kv_head"], result["window"]) == (kv, model.config.windows[layer])
        vectors = client.answer("vectors", model=number, ids=ids, layer=layer, head=head)
        layer_cache = cache.layers[layer]
        expected = {
            "q_norm": layer_cache.q_norm[0, head],
            "k_norm": layer_cache.k_norm[0, kv],
            "rot_q": layer_cache.rot_q[0, head],
            "rot_k": layer_cache.rot_k[0, kv],
            "v": layer_cache.v[0, kv],
        }
        for name, tensor in expected.items():
            assert_equal(vectors[name], tensor)
        scores = torch.tensor(vectors["rot_q"] @ vectors["rot_k"].T * vectors["scale"])
        recomputed = scores.masked_fill(~layer_cache.mask, -torch.inf).softmax(-1)
        assert_equal(result["pattern"], recomputed, 1e-5)
        assert_equal(vectors["kernel_out"], recomputed @ torch.tensor(vectors["v"]), 1e-5)


def test_the_flow_of_a_token_equals_hooks(client: Client, model: GPT, ids: list[int], number: int) -> None:
    with torch.no_grad(), capture(model) as cache:
        model.hidden(torch.tensor([ids]))
    for position, layer in ((0, 0), (len(ids) - 1, 1)):
        found, one = client.answer("flow", model=number, ids=ids, position=position, layer=layer), cache.layers[layer]
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
            assert_equal(found[name], getattr(one, name)[0, position])
        assert_equal(found["mlp_post"], one.mlp_post[0, position], 1e-5)  # computed for one token instead of all
        assert_equal(found["pattern"], one.pattern()[0, :, position], 1e-6)
        assert_equal(found["ln_final"], cache.ln_final[0, position])
        streams = torch.stack([torch.stack([each.resid_pre, each.resid_post]) for each in cache.layers])
        assert_equal(found["norms"][:, 2:], streams[:, :, 0, position].norm(dim=-1), 1e-6)


def test_predictions_follow_from_the_models_logits(client: Client, model: GPT, ids: list[int], number: int) -> None:
    logits = run(model, ids)
    p = logits.softmax(-1)
    result = client.answer("predictions", model=number, ids=ids)
    assert np.isnan(result["surprisal"][0])
    # Probabilities down to 1e-6 in float32.
    assert_equal(result["surprisal"][1:], -p[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].log2(), 1e-4)
    assert_equal(result["top_ids"], logits.topk(5).indices)
    assert_equal(result["top_p"], p.topk(5).values, 1e-5)
    assert_equal(result["entropy"], torch.special.entr(p).sum(-1) / np.log(2), 1e-4)
    for position in (None, 0, 4):
        result = client.answer("next", model=number, ids=ids, position=position)
        # The output head is applied to one row here, to all rows there.
        assert_equal(result["logits"], logits[-1 if position is None else position], 1e-5)


def test_the_last_depth_of_the_lens_equals_the_models_predictions(
    client: Client, model: GPT, ids: list[int], number: int
) -> None:
    watch = [5, ids[3]]
    result = client.answer("lens", model=number, ids=ids, start=2, stop=9, k=4, watch=watch)
    with torch.no_grad(), capture(model) as cache:
        model.hidden(torch.tensor([ids]))
    with torch.no_grad():
        logits = torch.stack([model.logits(model.norm(x[0, 2:9])) for x in cache.residual_stream])
    p = logits.softmax(-1)
    assert_equal(result["top_ids"], logits.topk(4).indices)
    assert_equal(result["top_p"], p.topk(4).values, 1e-5)
    assert_equal(result["watch_p"], p[..., watch], 1e-5)
    assert_equal(result["watch_rank"], torch.stack([(logits > logits[..., i : i + 1]).sum(-1) for i in watch], -1))
    assert_equal(result["norm"], torch.stack([x[0, 2:9].norm(dim=-1) for x in cache.residual_stream]), 1e-5)
    assert_equal(result["top_p"][-1], run(model, ids).softmax(-1)[2:9].topk(4).values, 1e-5)


def test_attribution_sums_to_the_logit(client: Client, model: GPT, ids: list[int], number: int) -> None:
    result = client.answer("attribution", model=number, ids=ids, position=6, token=9, against=12)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]))[0, 6]
        logits = model.head.weight @ hidden
    assert result["logit"] == pytest.approx(float(logits[9]), abs=1e-4)
    assert result["against_logit"] == pytest.approx(float(logits[12]), abs=1e-4)
    assert sum(part["value"] for part in result["parts"]) == pytest.approx(
        result["logit"] - result["against_logit"], abs=1e-4
    )
    assert result["capped"] == (number == 1)


@pytest.mark.parametrize(
    "edits",
    [
        [{"kind": "head", "layer": 1, "head": 2}],
        [{"kind": "feed_forward", "layer": 0, "by": "mean"}, {"kind": "position", "position": 2}],
        [{"kind": "residual", "layer": 0, "position": 3, "by": "patch"}],
    ],
    ids=lambda edits: edits[0]["kind"],
)
def test_edits_change_the_predictions(
    client: Client, model: GPT, ids: list[int], number: int, edits: list[dict[str, Any]]
) -> None:
    source = ids[::-1]
    with torch.no_grad():
        with capture(model) as cache:
            model.hidden(torch.tensor([source]))
        with edited(model, [Edit(**edit) for edit in edits], cache):
            expected = model.logits(model.hidden(torch.tensor([ids]))[0])
    body = {"model": number, "ids": ids, "edits": edits, "source": source}
    assert_equal(client.answer("next", **body)["logits"], expected[-1], 1e-5)
    assert_equal(client.answer("predictions", **body)["top_p"], expected.softmax(-1).topk(5).values, 1e-5)
    unedited = client.answer("next", model=number, ids=ids)["logits"]
    assert np.abs(unedited - expected[-1].numpy()).max() > 1e-3
    assert_equal(unedited, run(model, ids)[-1], 1e-5)  # the edits did not change the model


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"top_k": 9, "n": 3, "seed": 5}, {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01}],
)
def test_generated_text_equals_generate(
    client: Client, loaded: tuple[GPT, Tokenizer], ids: list[int], number: int, settings: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    # More tokens than the context holds.
    *lines, last = client.answer("write", model=number, ids=ids, max_new_tokens=30, **settings)
    pieces = list(glassgpt.generate(model, tokenizer, ids, max_new_tokens=30, **settings))
    assert [(line["sample"], line["token"], line["text"]) for line in lines] == [
        (p.sample, p.token_id, p.text) for p in pieces
    ]
    assert (last["done"], last["tokens"]) == (True, len(pieces))
    first = next(line for line in lines if line["sample"] == 0)
    assert first["p"] == pytest.approx(float(run(model, ids)[-1].softmax(-1)[first["token"]]), rel=1e-4)


def test_weights_tables_and_gradients_equal_the_models(client: Client, model: GPT, ids: list[int], number: int) -> None:
    table = model.embedding.weight.detach()
    centred = (table - table.mean(0)).double()
    result = client.answer("map", model=number, table="embedding")
    variances = torch.linalg.svdvals(centred).square()
    assert_equal(result["explained"], (variances / variances.sum())[:3].float(), 1e-5)
    assert_equal((result["points"] ** 2).sum(0), variances[:3].float(), 1e-4)
    near = client.answer("near", model=number, table="embedding", id=65, k=5)
    cosines = torch.nn.functional.cosine_similarity(table[65:66], table)
    cosines[65] = -2
    assert near["ids"] == cosines.topk(5).indices.tolist()
    assert_equal(near["cosines"], cosines.topk(5).values, 1e-5)
    name = "blocks.1.attention.qkv.weight"
    weight = model.get_parameter(name).detach()
    result = client.answer("weight", model=number, name=name, size=64)
    assert_equal(result["picture"], weight)
    assert result["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert result["largest"] == float(weight.abs().max())
    assert_equal(
        client.answer("spectrum", model=number, name=name)["singular_values"], torch.linalg.svdvals(weight), 1e-4
    )
    gradients = client.answer("gradients", model=number, ids=ids)
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    assert gradients["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradient = torch.autograd.grad(loss, model.get_parameter(name))[0]
    assert next(p for p in gradients["parts"] if p["name"] == name)["gradient_norm"] == pytest.approx(
        float(gradient.norm()), rel=1e-4
    )
    answer = client.answer("head_scores", model=number)
    assert np.shape(answer["head_scores"]) == (len(answer["head_types"]), model.config.n_layer, model.config.n_head)


def test_a_model_without_tokenizer_takes_ids(client: Client, folder: Path) -> None:
    facts = client.answer("model", model=2)
    assert facts["tokenizer"] is None
    assert client.answer("tokens", model=2, text=" 3 14\n15 ")["ids"] == [3, 14, 15]
    assert client.answer("vocabulary", model=2)["pieces"][255] == "255"
    assert "token ids" in client.ask("tokens", model=2, text="three")[1]["error"]
    assert_equal(
        client.answer("next", model=2, ids=[3, 14])["logits"],
        run(glassgpt.load(folder / "plain@1")[0], [3, 14])[-1],
        1e-5,
    )
    *lines, _ = client.answer("write", model=2, ids=[3, 14], max_new_tokens=4)
    assert [line["text"] for line in lines] == [f" {line['token']}" for line in lines]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tokens", {"text": ""}, "text"),
    ("tokens", {"text": "\ud800"}, "surrogate"),
    ("tokens", {"text": "a" * 20_001}, "20,000"),
    ("merges", {"text": "a"}, "byte-level BPE"),
    ("attention", {"ids": []}, "ids"),
    ("attention", {"ids": [256]}, "no token 256"),
    ("attention", {"ids": [-1]}, "no token -1"),
    ("attention", {"ids": [10**40]}, "no token 1000"),
    ("attention", {"ids": [1] * 25}, "limit is 24"),
    ("attention", {"ids": [1] * 1025}, "1,024"),
    ("attention", {"ids": [1.0]}, "ids must be a list"),
    ("attention", {"ids": [True]}, "ids must be a list"),
    ("attention", {"ids": [1], "edit": []}, "did you mean 'edits'"),
    ("attention", {"ids": [1], "edits": [{"kind": "head", "layer": 9, "head": 0}]}, "no layer 9"),
    ("attention", {"ids": [1], "edits": [{"kind": "head", "layer": 0, "head": 0, "by": "patch"}]}, "patch"),
    ("attention", {"ids": [1], "edits": [{"kind": "heads"}]}, "edits.kind must be"),
    ("attention", {"ids": [1], "edits": [{}]}, "edits.kind is missing"),
    ("attention", {"ids": [1], "edits": [7]}, "edits must be a list"),
    ("attention", {}, "ids is missing"),
    ("attention", {"ids": [1], "source": []}, "source"),
    ("head", {"ids": [1], "layer": 2, "head": 0}, "no layer 2"),
    ("head", {"ids": [1], "layer": 0, "head": -1}, "no head -1"),
    ("lens", {"ids": [1], "start": 0, "stop": 2}, "stop 2"),
    ("lens", {"ids": [1], "start": 0, "stop": 1, "watch": [999]}, "no token 999"),
    ("next", {"ids": [1], "position": 1}, "no position 1"),
    ("flow", {"ids": [1], "position": 1, "layer": 0}, "no position 1"),
    ("flow", {"ids": [1], "position": 0, "layer": 2}, "no layer 2"),
    ("write", {"ids": [1], "temperature": -0.1}, "temperature must be"),
    ("write", {"ids": [1], "top_k": 0}, "top_k must be"),
    ("write", {"ids": [1], "n": 9}, "n must be"),
    ("write", {"ids": [1], "max_new_tokens": 1025}, "max_new_tokens must be"),
    ("map", {"table": "head"}, "no table 'head'"),
    ("map", {"table": "../head"}, "no table '../head'"),
    ("near", {"table": "embedding", "id": 256}, "no row 256"),
    ("weight", {"name": "blocks.0"}, "blocks.0"),
    ("weight", {"name": "norm.weight", "size": 0}, "size must be"),
    ("spectrum", {"name": "norm.weight"}, "matrix"),
    ("gradients", {"ids": [1]}, "token"),
]


@pytest.mark.parametrize(("path", "body", "message"), REFUSED)
def test_the_error_message_names_the_mistake(client: Client, path: str, body: dict[str, Any], message: str) -> None:
    status, answer = client.ask(path, model=0, **body)
    assert (status, list(answer)) == (400, ["error"])
    assert message in answer["error"]
    assert len(answer["error"]) < 500


def test_packed_arrays_round_trip() -> None:
    """Arrays of all dtypes and empty arrays survive packing, for header lengths of every remainder modulo 8.

    NaN and infinity become null in the header, because JSON has no number for them.
    """
    for length in range(9):
        arrays: dict[str, Any] = {
            "a": torch.tensor([[1.5, float("nan")]], dtype=torch.float64),
            "b": torch.arange(3),
            "c": np.arange(5, dtype=np.uint8),
            "d": torch.zeros(0, 4),
            "e": torch.tensor(2.5, dtype=torch.float16),
            "f": np.array([[7, 65535]], dtype=">u2"),
        }
        result = unpacked(pack(arrays, {"text": "x" * length, "none": float("inf"), "deep": [{"nan": float("nan")}]}))
        assert (result["text"], result["none"], result["deep"]) == ("x" * length, None, [{"nan": None}])
        np.testing.assert_array_equal(result["a"], np.array([[1.5, np.nan]], dtype=np.float32))
        np.testing.assert_array_equal(result["f"], [[7, 65535]])
        dtypes = ["float32", "int32", "uint8", "float32", "float32", "uint16"]
        assert [result[name].dtype.name for name in "abcdef"] == dtypes
        assert [list(result[name].shape) for name in "abcdef"] == [[1, 2], [3], [5], [0, 4], [], [1, 2]]


def test_json_has_null_for_nan_and_infinity() -> None:
    from glassgpt.utils.files import json_text

    assert json.loads(json_text({"a": (float("nan"), -float("inf"), 1.5, "\udcff")})) == {
        "a": [None, None, 1.5, "\udcff"]
    }

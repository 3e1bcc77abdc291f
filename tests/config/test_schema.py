"""Config: validation errors, TOML round trips, derived values, and the recipes' numbers."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe, recipe_names, recipe_text
from glassgpt.config.schema import DataConfig, OptimConfig, ProbeConfig, SampleConfig, TrainConfig
from glassgpt.config.validation import flatten
from glassgpt.utils.errors import UserError

SMALL = TrainConfig(steps=10, batch_tokens=256, micro_batch_size=4, model=ModelConfig(context_length=16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # unknown keys, with the nearest name
        ({"stepps": 3}, ["'stepps'", "'steps'"]),
        ({"model": {"n_layers": 3}}, ["'model.n_layers'", "'n_layer'"]),
        ({"optim": {"learning": 3}}, ["'optim.learning'"]),
        # wrong types: a bool is not a whole number, a whole number is not a string, nan is not a number
        ({"model": {"n_layer": True}}, ["model.n_layer", "a whole number", "True"]),
        ({"model": {"n_layer": 2.0}}, ["model.n_layer", "a whole number", "2.0"]),
        ({"model": {"bias": 1}}, ["model.bias", "true or false", "1"]),
        ({"optim": {"lr": "1e-3"}}, ["optim.lr", "a number", "'1e-3'"]),
        ({"optim": {"lr": True}}, ["optim.lr", "a number", "True"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr", "a number", "nan"]),
        ({"data": {"source": 7}}, ["data.source", "a string", "7"]),
        ({"model": 3}, ["model", "3"]),
        ({"sample": {"top_k": "all"}}, ["sample.top_k", "a whole number or nothing", "'all'"]),
        # a choice lists the valid values
        ({"optim": {"schedule": "cosin"}}, ["optim.schedule", "'cosine' or 'linear' or 'constant'", "'cosin'"]),
        ({"model": {"position": "rotary"}}, ["model.position", "'learned' or 'rope'", "'rotary'"]),
        ({"precision": "fp8"}, ["precision", "'bfloat16'", "'fp8'"]),
        # values out of range
        ({"model": {"n_layer": 0}}, ["model.n_layer", "at least 1", "0"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout", "below 1", "1.0"]),
        ({"model": {"logit_softcap": 0.0}}, ["model.logit_softcap", "above 0"]),
        ({"data": {"validation_fraction": 1.0}}, ["data.validation_fraction", "below 1", "1.0"]),
        *(
            ({"data": {"encoding": name}}, ["data.encoding", repr(name), "'utf-8'"])
            for name in ("utf-9", "hex", "rot13", "undefined", "idna", "punycode", "a\0b", "")
        ),
        *(({"data": {"delimiter": each}}, ["data.delimiter", repr(each)]) for each in ("", ";;", '"', "\n", "\0")),
        ({"data": {"split_on": ""}}, ["data.split_on"]),
        ({"optim": {"lr": 0}}, ["optim.lr", "above 0", "0"]),
        ({"optim": {"beta2": 1.0}}, ["optim.beta2", "below 1"]),
        ({"optim": {"min_lr_ratio": 1.1}}, ["optim.min_lr_ratio", "at most 1"]),
        ({"sample": {"top_p": 0.0}}, ["sample.top_p", "above 0"]),
        ({"sample": {"prompt": ""}}, ["sample.prompt", "at least one character"]),
        ({"probe": {"prompts": "the"}}, ["probe.prompts", "a list, each item of it a string", "'the'"]),
        ({"probe": {"prompts": ["the", 3]}}, ["probe.prompts", "a list, each item of it a string", "3"]),
        ({"probe": {"prompts": ["the", ""]}}, ["probe.prompts", "at least one character"]),
        ({"probe": {"tokens": -1}}, ["probe.tokens", "at least 0"]),
        ({"seed": -1}, ["seed", "at least 0", "-1"]),
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        # combinations that are not possible
        ({"context_start": 6}, ["context_start", "model.context_length = 16", "8, 4, 2, 1", "6"]),
        ({"context_start": 16}, ["context_start", "8, 4, 2, 1", "16"]),
        ({"context_warmup": 0.0}, ["context_warmup", "above 0"]),
        ({"batch_tokens": 64, "batch_start": 24}, ["batch_start", "batch_tokens = 64", "32, 16", "24"]),
        ({"batch_tokens": 16, "batch_start": 8}, ["batch_start", "none exists", "8"]),
        ({"batch_warmup": 1.5}, ["batch_warmup", "at most 1"]),
        (
            {"batch_tokens": 64, "batch_start": 32, "steps": None, "epochs": 1.0},
            ["batch_start needs steps", "--steps N"],
        ),
        ({"model": {"n_embd": 128, "n_head": 5}}, ["model.n_head", "5", "model.n_embd", "128", "2, 4, 8"]),
        ({"model": {"n_embd": 36, "n_head": 12, "position": "rope"}}, ["even", "3", "model.n_head"]),
        ({"model": {"position": "rope", "head_dim": 5}}, ["even", "5", "model.head_dim"]),
        ({"model": {"n_kv_head": 5}}, ["model.n_kv_head", "model.n_head = 12", "4, 6", "5"]),
        ({"model": {"n_kv_head": 0}}, ["model.n_kv_head", "1, 2, 3", "0"]),
        ({"model": {"n_inner": 0}}, ["model.n_inner", "at least 1"]),
        ({"model": {"norm_eps": 0}}, ["model.norm_eps", "above 0"]),
        ({"model": {"norm_weight": False}}, ["model.norm_weight", "rmsnorm"]),
        ({"model": {"norm": "rmsnorm", "norm_bias": True}}, ["model.norm_bias", "layernorm"]),
        ({"model": {"window": 0}}, ["model.window", "from 1 to", "= 16"]),
        ({"model": {"window": 17}}, ["model.window", "16", "17"]),
        (
            {"model": {"window": 15, "window_globals": 4}},
            ["model.window", "context_length - window_globals = 12", "15"],
        ),
        ({"model": {"window": 8, "window_globals": -1}}, ["model.window_globals", "at least 0"]),
        ({"model": {"window_globals": 2}}, ["model.window_globals", "model.window"]),
        ({"model": {"window_pattern": "SL"}}, ["model.window_pattern", "model.window"]),
        ({"model": {"window": 8, "window_pattern": "SX"}}, ["model.window_pattern", "S and L", "'SX'"]),
        ({"model": {"window": 8, "window_pattern": "L"}}, ["model.window_pattern", "one of them S"]),
        ({"model": {"window": 8, "window_pattern": "SSSSSSSSSSSSL"}}, ["model.window_pattern", "12"]),
        ({"model": {"attention": "flex", "dropout": 0.1}}, ["model.attention", "flex", "dropout"]),
        ({"steps": 5, "epochs": 1.0}, ["steps or epochs"]),
        ({"steps": None}, ["steps or epochs"]),
        # batches that are not whole sequences of 16
        ({"batch_tokens": 250}, ["batch_tokens", "250", "model.context_length = 16", "240 or 256"]),
        ({"batch_tokens": 10}, ["batch_tokens", "10", "nearest: 16"]),
        ({"cpu_offload": True}, ["cpu_offload", "--strategy fsdp"]),
        ({"optim": {"skip_outliers": -1.0}}, ["optim.skip_outliers", "at least 0"]),
    ],
)
def test_an_invalid_value_is_refused_with_the_field_and_the_valid_values(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        SMALL.override(**changes)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert message.count("\n") < 2


@pytest.mark.parametrize("name", [name for name, _ in flatten(SMALL.to_dict() | {"epochs": 1.0})])
def test_no_number_is_unlimited(name: str) -> None:
    """Nor is its digits' number in the error: a number in hexadecimal may have more than Python prints."""
    section, _, key = name.rpartition(".")
    hints = get_type_hints(type(getattr(SMALL, section)) if section else TrainConfig)
    numbers = {int, float} & {hints[key], *get_args(hints[key])}
    for value in [10**50, 16**6000, 1e300][:: 1 if int in numbers else 2] if numbers else []:
        with pytest.raises(UserError, match=name) as caught:
            SMALL.override(**{section: {key: value}} if section else {key: value})
        assert len(str(caught.value)) < 300


def test_the_largest_model_and_batch_are_checked_quickly() -> None:
    begin = time.process_time()
    widths: dict[str, Any] = {"n_layer": 4096, "n_embd": 2**20, "n_head": 2**20, "n_inner": 2**27, "vocab_size": 2**27}
    config = SMALL.override(model=widths, batch_tokens=2**27)
    with pytest.raises(UserError, match="nearest"):
        config.sequences_per_process(7)
    with pytest.raises(UserError, match="n_head"):
        SMALL.override(model=widths | {"n_head": 2**20 - 1})
    with pytest.raises(UserError, match=r"model\.n_layer"):
        SMALL.override(model={"n_layer": 10**9})
    with pytest.raises(UserError, match="head_dim"):
        SMALL.override(model=widths | {"head_dim": 2**20})
    assert time.process_time() - begin < 1


def test_a_name_that_toml_cannot_hold_is_refused() -> None:
    invalid: list[dict[str, Any]] = [{"data": {"source": "\udcff.txt"}}, {"probe": {"prompts": ["a\ud800"]}}]
    for changes in (*invalid, {"init_from": "\udcff"}, {"device": "\udcff"}):
        with pytest.raises(UserError, match="Unicode"):
            SMALL.override(**changes)
    with_nul: list[dict[str, Any]] = [{"data": {"source": "a\0"}}, {"data": {"mixture": {"a\0": 1.0}}}]
    for changes in (*with_nul, {"hellaswag_file": "\0"}):
        with pytest.raises(UserError, match="NUL"):
            SMALL.override(**changes)
    assert SMALL.override(probe={"prompts": ["\0"]}).probe.prompts == ["\0"]


# Some operating system cannot have a directory of this name, or a shell reads it as something else.
@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "12:30", " run", "run ", "a\nb", "what?"])
def test_a_run_name_that_is_not_a_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="name must be"):
        SMALL.override(name=name)


def test_an_integer_for_a_float_field_is_stored_as_a_float() -> None:
    one = OptimConfig(lr=1)
    assert type(one.lr) is float
    assert one == OptimConfig(lr=1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps =\nseed = 3", ["my.toml", "not valid TOML", "line 1"]),
        ("steps = 3\nsteps = 4", ["my.toml", "not valid TOML"]),
        ("steps = 3\n[modell]\nn_layer = 1", ["my.toml", "'modell'", "'model'"]),
        ("steps = 3\n[optim]\nlr = '1e-3'", ["my.toml", "optim.lr"]),
        ("data = 'big.txt'", ["my.toml", '[data] with source = "big.txt"']),
        ("optim = 1e-3", ["my.toml", "[optim] with lr = 0.001"]),
        ("probe = ['a']", ["my.toml", '[probe] with prompts = ["a"]']),
        ("model = 'gpt2'", ["my.toml", "[model] with its settings"]),
        ("sample = 'To be'", ["my.toml", '[sample] with prompt = "To be"']),
    ],
)
def test_an_error_in_a_toml_file_names_the_file(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_toml(text, origin="my.toml")
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_round_trips_through_toml(name: str) -> None:
    config = recipe(name)
    assert TrainConfig.from_toml(config.to_toml()) == config
    assert config.name == name


def test_every_field_round_trips_through_toml() -> None:
    """No field has its default value, so the test fails if `to_toml` drops a field or changes its type."""
    config = TrainConfig(
        name="übung",
        model=ModelConfig(
            vocab_size=77,
            vocab_multiple=8,
            context_length=32,
            n_layer=3,
            n_head=4,
            n_kv_head=2,
            head_dim=6,
            n_embd=8,
            position="rope",
            rope_base=500.0,
            window=8,
            window_globals=2,
            window_pattern="SSL",
            norm="rmsnorm",
            norm_weight=False,
            norm_bias=False,
            norm_eps=1e-6,
            embedding_norm=True,
            qk_norm=True,
            n_inner=20,
            activation="relu",
            bias=False,
            residual_init="zero",
            tied_head=False,
            logit_softcap=15.0,
            dropout=0.1,
            attention="explicit",
        ),
        data=DataConfig(
            source='a "b".txt',
            column="content",
            tokenizer="bytes",
            validation="first_shard",
            validation_fraction=0.2,
            deduplicate=True,
            skip_bad=True,
            delimiter=";",
            split_on="<|endoftext|>",
            shard_tokens=1000,
            encoding="latin-1",
            errors="replace",
            mixture={"a = b": 0.5, "c.txt": 2.0},
            order="random",
        ),
        optim=OptimConfig(
            name="muon",
            lr=1e-5,
            schedule="linear",
            min_lr_ratio=0.3,
            warmup_steps=7,
            beta1=0.8,
            beta2=0.9,
            eps=1e-12,
            momentum=0.5,
            weight_decay=0.2,
            grad_clip=0.0,
            skip_outliers=3.5,
        ),
        sample=SampleConfig(
            prompt="\n\t'😀\\", count=3, max_new_tokens=9, temperature=0.0, top_k=4, top_p=0.5, min_p=0.1
        ),
        probe=ProbeConfig(prompts=["the", "\n'Да"], tokens=7, every=3),
        init_from="runs/x@best",
        epochs=1.5,
        batch_tokens=64,
        micro_batch_size=2,
        seed=2**40,
        device="cpu",
        precision="bfloat16",
        compile="off",
        compile_backend="eager",
        batch_warmup=0.75,
        context_start=4,
        context_warmup=0.25,
        strategy="fsdp",
        cpu_offload=True,
        fsdp_gradient_sync="update",
        activation_checkpointing="full",
        eval_every=3,
        eval_tokens=99,
        hellaswag_every=6,
        hellaswag_items=50,
        hellaswag_file="items.jsonl",
        checkpoint_every=4,
        keep_checkpoints=5,
        log="both",
    )
    default = TrainConfig(steps=1)
    for section in (None, "model", "data", "optim", "sample", "probe"):
        mine, plain = (getattr(c, section) if section else c for c in (config, default))
        at_default = [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) == getattr(plain, f.name)]
        assert set(at_default) <= {"validation_source", "batch_start"}, "a field at its default proves nothing here"
    assert TrainConfig.from_toml(config.to_toml()) == config
    # Fields that exclude a field above.
    other = config.override(data={"validation": "fraction", "validation_source": "other.txt", "mixture": {}})
    other = other.override(epochs=None, steps=7, batch_start=32)
    assert TrainConfig.from_toml(other.to_toml()) == other


# Derived settings are computed from the current fields, not once at class definition.
@pytest.mark.parametrize(
    ("derived", "before", "changes", "after"),
    [
        (lambda c: c.batch_size, 512, {"model": {"context_length": 2048}}, 256),
        (lambda c: c.batch_size, 512, {"batch_tokens": 2**18}, 256),
        (lambda c: c.model.resolved_head_dim, 64, {"model": {"n_embd": 384}}, 32),
        (lambda c: c.model.resolved_head_dim, 64, {"model": {"n_head": 6}}, 128),
        (lambda c: c.model.resolved_n_kv_head, 12, {"model": {"n_head": 6}}, 6),
        (lambda c: c.model.resolved_n_inner, 3072, {"model": {"n_embd": 384}}, 1536),
        (lambda c: c.model.resolved_n_inner, 3072, {"model": {"activation": "swiglu"}}, 2048),
        (lambda c: c.model.padded_vocab_size, 50304, {"model": {"vocab_size": 65}}, 128),
        (lambda c: c.model.padded_vocab_size, 50304, {"model": {"vocab_multiple": 1}}, 50257),
    ],
)
def test_derived_values_follow_an_override(
    derived: Callable[[TrainConfig], int], before: int, changes: dict[str, Any], after: int
) -> None:
    config = recipe("gpt2", model={"vocab_size": 50257})
    assert derived(config) == before
    assert derived(config.override(**changes)) == after
    assert derived(config) == before


def test_an_override_of_one_section_leaves_the_rest() -> None:
    config = recipe("shakespeare-char", optim={"lr": 5e-4}, seed=7)
    changed = dataclasses.replace(config, seed=1337, optim=dataclasses.replace(config.optim, lr=1e-3))
    assert changed == recipe("shakespeare-char")


def test_overriding_steps_clears_epochs_and_vice_versa() -> None:
    by_epochs = SMALL.override(epochs=2)
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)
    by_steps = by_epochs.override(steps=5)
    assert (by_steps.steps, by_steps.epochs) == (5, None)


def test_the_padded_vocabulary_requires_vocab_size() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        _ = ModelConfig().padded_vocab_size


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.steps = 3  # type: ignore[misc]


# The numbers are copied by hand from the papers and nanoGPT: a recipe with other numbers is another experiment.


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "peak"),
    [
        ("gpt2", 12, 12, 768, 6e-4),
        ("gpt2-medium", 24, 16, 1024, 3e-4),
        ("gpt2-large", 36, 20, 1280, 2.5e-4),
        ("gpt2-xl", 48, 25, 1600, 2e-4),
    ],
)
def test_gpt2_recipes(name: str, layers: int, heads: int, width: int, peak: float) -> None:
    config = recipe(name)
    model, optim = config.model, config.optim
    assert (model.n_layer, model.n_head, model.n_embd, model.context_length, model.resolved_head_dim) == (
        layers,
        heads,
        width,
        1024,
        64,
    )
    assert (model.position, model.activation, model.bias, model.tied_head, model.dropout) == (
        "learned",
        "gelu_tanh",
        True,
        True,
        0.0,
    )
    assert (model.qk_norm, model.logit_softcap, model.residual_init) == (False, None, "scaled")
    assert config.override(model={"vocab_size": 50257}).model.padded_vocab_size == 50304
    assert (config.steps, config.batch_tokens, config.seed, config.data.tokenizer) == (19073, 524288, 1337, "gpt2")
    assert (optim.name, optim.lr, optim.schedule, optim.warmup_steps) == ("adamw", peak, "cosine", 715)
    assert optim.lr * optim.min_lr_ratio == pytest.approx(peak / 10)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.grad_clip) == (0.9, 0.95, 1e-8, 0.1, 1.0)


@pytest.mark.parametrize(
    ("name", "layers", "width", "context", "batch", "steps", "dropout"),
    [("shakespeare-cpu", 4, 128, 64, 12, 2000, 0.0), ("shakespeare-char", 6, 384, 256, 64, 5000, 0.2)],
)
def test_nanogpts_shakespeare_recipes(
    name: str, layers: int, width: int, context: int, batch: int, steps: int, dropout: float
) -> None:
    config = recipe(name)
    model, optim = config.model, config.optim
    assert (model.n_layer, model.n_head, model.n_embd, model.context_length) == (layers, layers, width, context)
    assert (model.dropout, model.bias, model.tied_head, config.batch_size, config.steps) == (
        dropout,
        False,
        True,
        batch,
        steps,
    )
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.beta1, optim.beta2) == (1e-3, "cosine", 100, 0.9, 0.99)
    assert optim.lr * optim.min_lr_ratio == pytest.approx(1e-4)
    assert (config.data.source, config.data.tokenizer, config.data.validation_fraction) == (
        "shakespeare",
        "characters",
        0.1,
    )


def test_finetuning_has_a_constant_learning_rate() -> None:
    assert recipe("finetune-shakespeare").optim.schedule == "constant"


def test_the_default_recipe_needs_no_download() -> None:
    assert recipe("demo").data == DataConfig(source="python-docs", tokenizer="characters")


def test_an_error_about_an_unknown_recipe_suggests_the_nearest_name() -> None:
    with pytest.raises(UserError, match="shakespeare-cpu"):
        recipe("shakespear-cpu")


def test_a_recipe_can_be_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(UserError, match=r"mine\.toml"):
        recipe(str(path))
    path.write_text(SMALL.to_toml(), encoding="utf-8")
    assert recipe(str(path), seed=3) == SMALL.override(seed=3)
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.to_toml().replace("\n", "\r\n").encode())  # as editors of Windows write it
    assert recipe(str(path)) == SMALL
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(UserError, match="not valid UTF-8"):
        recipe(str(path))


def test_a_shorter_context_removes_windows_that_would_cover_it() -> None:
    config = ModelConfig(context_length=64, window=16, window_globals=4, window_pattern="SL")
    assert config.with_shorter_context(100) is config
    assert config.with_shorter_context(20) == dataclasses.replace(config, context_length=20)
    assert config.with_shorter_context(19) == ModelConfig(context_length=19)


@pytest.mark.parametrize("name", ["mine.tml", "mine", "mine.tomll"])
def test_a_recipe_of_ones_own_is_found_with_a_wrong_extension(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("steps = 3\n")
    with pytest.raises(UserError, match=r"did you mean mine\.toml\?"):
        recipe_text(name)

"""The recipes that come with the package: a table of their sizes, and each one's TOML with its comments."""

from markup import escaped, fence

from glassgpt.config.recipes import recipe, recipe_names, recipe_text


def _about(name: str) -> str:
    """The comment at the top of a recipe."""
    lines = recipe_text(name).splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("# ") for line in lines[:end])


def _toml(name: str) -> str:
    return "\n".join(line for line in recipe_text(name).splitlines() if not line.startswith("#"))


def _row(name: str) -> str:
    config = recipe(name)
    model, tokens = config.model, (config.steps or 0) * config.batch_tokens
    shape = [f"{size:,}" for size in (model.n_layer, model.n_head, model.n_embd)]
    if config.init_from is not None:  # the shape is that of another model
        shape = ["any"] * 3
    amount = f"{tokens / 1e9:.1f} billion" if tokens >= 1e9 else f"{tokens / 1e6:.1f} million"
    cells = [f"[`{name}`](#{name})", *shape, f"{model.context_length:,}", f"{config.steps or 0:,}", amount]
    return f"| {' | '.join([*cells, f'`{config.data.source}`'])} |"


def recipe_table() -> str:
    """Return the Markdown of a table of all recipes: sizes, steps, tokens of training, and the text."""
    head = ["| recipe | layers | heads | width | context | steps | tokens | text |", f"| --- |{6 * ' ---: |'} --- |"]
    return "\n".join([*head, *map(_row, recipe_names()), ""])


def recipes() -> str:
    """Return the Markdown of all recipes, a section each."""
    lines = list[str]()
    for name in recipe_names():
        lines += [f"## {name}", "", escaped(_about(name)), "", fence("toml", body=_toml(name))]
    return "\n".join(lines)

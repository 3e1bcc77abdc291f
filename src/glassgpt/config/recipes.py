"""The recipes that come with the package, and the user's own TOML files."""

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from glassgpt.config.schema import TrainConfig
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError, did_you_mean, shown
from glassgpt.utils.files import decoded, read_file, readable

RECIPES = resources.files(__package__) / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(p.name.removesuffix(".toml") for p in RECIPES.iterdir() if p.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML text of a recipe: a shipped name, or the path of a `.toml` file."""
    if name in recipe_names():
        return (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix == ".toml":
        with readable(name):
            return decoded(read_file(path), name)
    if (path / "config.toml").is_file():
        raise UserError(f"{name} is a run, not a recipe; its config is {path / 'config.toml'}")
    if name and path.exists():
        raise UserError(f"{name} is not a recipe; to train on its text: glassgpt train --data {shlex.quote(name)}")
    own = Path(f"{path.parent / path.stem}.toml")  # an extension left out or mistyped
    nearest = f"; did you mean {own}?" if path.stem and own.is_file() else did_you_mean(name, recipe_names())
    raise UserError(f"unknown recipe {shown(name)}{nearest} (recipes: {', '.join(recipe_names())}; or a .toml file)")


@check_arguments
def recipe(name: str | Path, **changes: Any) -> TrainConfig:
    """A recipe's config, with changes: `recipe("demo", steps=100, optim={"lr": 1e-3})`.

    Raises `UserError` for an unknown recipe, setting or value.
    """
    return TrainConfig.from_toml(recipe_text(str(name)), origin=f"recipe {name}").override(**changes)

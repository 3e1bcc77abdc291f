"""The command `play`: start the playground."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from glassgpt.cli.options import REFERENCE_HELP, parse
from glassgpt.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """Options of `glassgpt play`."""

    references: Annotated[Positional[tuple[str, ...]], arg(metavar="[REF ...]", help=REFERENCE_HELP)] = ()
    port: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 7860, or the next free one)")] = None
    """Port to listen on."""
    host: Annotated[str | None, arg(metavar="H", help_behavior_hint="(default: this machine only)")] = None
    """Name or address to listen on, so that other machines can connect with the token. 0.0.0.0 is any address."""
    no_browser: FlagCreatePairsOff[bool] = False
    """Do not open a browser."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def play(arguments: Sequence[str]) -> None:
    """Open a page that shows what models compute and how runs learn. Without REF, it shows all runs in ./runs."""
    options = parse(PlayOptions, "play", play, arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, got {options.port}")
    from glassgpt.playground import server
    from glassgpt.utils.device import find_device

    server.play(
        list(options.references),
        device=find_device(options.device),
        host=options.host,
        port=options.port,
        browser=not options.no_browser,
    )

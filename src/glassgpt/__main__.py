"""The command `glassgpt`, also as `python -m glassgpt`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is still being imported ends it without a traceback, too."""
    try:
        from glassgpt.cli.main import main as run_command_line

        return run_command_line()
    except KeyboardInterrupt:
        print("glassgpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

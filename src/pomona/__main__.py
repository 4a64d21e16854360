"""Entry point of ``pomona`` and of ``python -m pomona``."""

import warnings


def main() -> None:
    """Run the command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # typer imports a name that click deprecates
        from pomona.cli import app  # noqa: PLC0415 - under the filter
    app()


if __name__ == "__main__":
    main()

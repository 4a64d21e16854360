"""Import typer once where its own warning does not count."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer 0.20 imports a name that click 8.5 deprecates
    import typer  # noqa: F401

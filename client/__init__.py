"""A client: a model, local data, local training. Knows no database."""

"""Differential privacy: one plan, its mechanism, and the account of what was spent."""

"""The coordinator: rounds, cohorts, recovery, simulation. The only room that wires the others together."""

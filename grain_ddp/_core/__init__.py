"""The aggregation, where mathematics and wire meet: options, state, and a step's life."""

"""The deterministic N = ∞ side of a scenario: what its particles converge to, from the same definition."""

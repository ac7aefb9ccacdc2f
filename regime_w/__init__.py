"""Regime W: scores a set of answers to one question for coherence and correctness. Needs numpy only."""

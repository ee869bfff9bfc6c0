"""Averages of the weights, and what is made of them after a run."""

"""Averages of the weights (EMA), and their reconstruction after a run."""

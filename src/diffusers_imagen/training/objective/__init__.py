"""Objectives: noise levels, losses and their weights, and the random numbers of a step."""

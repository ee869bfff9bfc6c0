"""Validation on held-out rows during training: the loss, and metrics of generated images."""

"""What is measured on held-out rows while a stage is trained: the loss, and metrics of pictures."""

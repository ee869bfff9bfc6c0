"""What a network is trained for: noise levels, losses and their weights, and the draws of a step."""

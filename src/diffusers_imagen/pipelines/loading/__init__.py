"""Stages and pipelines from folders, the Hub and loaded pipelines: what is there is checked first, then loaded."""

"""Loading of stages and pipelines from folders, the Hub and loaded pipelines, after checks of their files."""

"""Utilities of all packages: atomic file writes, folder locks, argument checks, one-line errors."""

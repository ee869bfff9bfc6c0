"""Weights of imagen-emoji, the small cascade of diffusers-imagen, which finds them by this package's entry point."""

from pathlib import Path


FOLDER = Path(__file__).resolve().parent / "imagen-emoji"

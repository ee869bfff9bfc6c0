"""Imagen for diffusers: cascaded text-to-image diffusion in pixel space, to sample and to train."""

"""The commands of `diffusers-imagen`, a module each."""

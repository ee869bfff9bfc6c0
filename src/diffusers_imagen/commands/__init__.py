"""Commands of `diffusers-imagen`, one module each, listed in `main.COMMANDS`; quick to import."""

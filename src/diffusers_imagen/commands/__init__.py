"""One module a command of `diffusers-imagen`; each has `add_parser`."""

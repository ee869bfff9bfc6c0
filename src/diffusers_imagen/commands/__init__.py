"""One module a command of `diffusers-imagen`, in the table `main.COMMANDS`; each has `add_arguments`, and loads quickly."""

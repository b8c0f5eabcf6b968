from diffusion2gan.cli import entry

entry()

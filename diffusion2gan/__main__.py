import sys

from diffusion2gan.cli import main

sys.exit(main())

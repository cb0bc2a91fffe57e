"""`python -m lightning_itk`: the same command as `lightning-itk`."""

import sys

from lightning_itk.cli.main import main

sys.exit(main())

"""The command `lightning-itk`."""

from lightning_itk.cli.main import main

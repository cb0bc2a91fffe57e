"""From records to batches; what people use of it is `InstructionDataModule`."""

from lightning_itk.data.module import InstructionDataModule
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source, Sources, as_sources, read
from lightning_itk.data.subset import Subset
from lightning_itk.data.template import read_template

"""From records to batches; what people use of it is `InstructionDataModule`."""

from lightning_itk.data.module import InstructionDataModule, read_template
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source, Sources, as_sources, read
from lightning_itk.data.subset import Subset

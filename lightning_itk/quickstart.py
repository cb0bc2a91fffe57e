"""The quickstart lives in `toy`; this is the name it is imported by."""

from lightning_itk.toy.quickstart import answer, ask, quickstart, verdict

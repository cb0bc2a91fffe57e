"""The attention loss, from queries and keys; how a model hands those out: `capture`."""

from lightning_itk.attention.kl import Kind, attention_kl

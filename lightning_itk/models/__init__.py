"""Causal language models: load, run up to the head, save, export, answer."""

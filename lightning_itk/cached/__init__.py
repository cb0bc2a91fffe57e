"""A teacher that ran once: its folder on disk, the manifest and the shards."""

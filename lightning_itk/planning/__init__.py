"""What a run will need before it is started: memory, work and time of an optimizer step."""

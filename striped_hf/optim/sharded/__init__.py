"""The step of sharded parameters."""

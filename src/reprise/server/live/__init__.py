"""The live view: what the engine says of itself every second, for people who watch it."""

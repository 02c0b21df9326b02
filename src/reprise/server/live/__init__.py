"""The live view: what the engine says of itself every second, for people to watch."""

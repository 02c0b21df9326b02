"""Processes that one user's process starts: how they are started and watched, and what they say to
each other."""

"""A device that Reprise does not know."""

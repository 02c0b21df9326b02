"""Devices that Reprise should refuse."""

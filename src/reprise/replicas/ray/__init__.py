"""Replicas whose ranks are actors of a Ray cluster: the only package that names Ray."""

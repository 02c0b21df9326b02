"""Latency, throughput and start-up, measured the same way everywhere.

Importing this package is cheap; the measuring modules import torch.
"""

"""What can be found out about graphs and platforms by trying: the matrix, the conformance kit.

The commands ``reprise doctor graphs`` and ``reprise doctor conformance`` show what is measured
here.
"""

"""Tool calls: read from outputs, and asked for by grammars.

Options name the parsers without the server's packages, so nothing is imported here.
"""

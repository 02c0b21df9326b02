"""The command line. One file a command; nothing here imports torch before a command runs."""

from __future__ import annotations


def main() -> None:
    """Run ``reprise`` with the arguments of this process."""
    from reprise.cli.app import app
    from reprise.cli.failures import reported

    with reported(debug=False):
        app(prog_name="reprise")

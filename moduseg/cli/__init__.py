"""The command line: `moduseg <command> [key=value ...]`, and the scripts, which are one of its commands each."""

from moduseg.cli.main import entry, run_script

__all__ = ["entry", "run_script"]

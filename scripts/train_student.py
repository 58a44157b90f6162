"""Run the command `train_student`: `python scripts/train_student.py student=<file> [key=value ...]`."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("train_student")

"""Run the command `predict_student`: `python scripts/predict_student.py student=<file> [key=value ...]`."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("predict_student")

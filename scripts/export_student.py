"""Write a trained network as an ONNX file: `python scripts/export_student.py student=<folder> [out=<file>]`.

Keys: height=<pixels>, width=<pixels> (docs/students.md).
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("export_student")

"""Correct pictures in a browser: `python scripts/demo_app.py bank=<folder> [port=7860] [key=value ...]` (docs/app.md).

Drop a picture, click a region, see why it has its label, correct it, save what the bank learned. Needs gradio
(`pip install 'moduseg[app]'`).
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("demo_app")

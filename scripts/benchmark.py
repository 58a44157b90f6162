"""Measure this package against a plain implementation of the method: a Markdown table and a JSON file.

python scripts/benchmark.py [device=cpu] [only=steps,search] [repeats=7] [threads=1] [out=outputs/benchmark]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the plain implementation is the tests'

from benchmarks import FIGURES, measure
from benchmarks.common import Setting, as_json, describe_machine, make_markdown
from benchmarks.photographs_chart import draw_chart
from moduseg.cli.main import errors_as_exit_code
from moduseg.devices import resolve_device
from moduseg.errors import ConfigError


def main() -> int:
    """Exit code 0, whatever was found; 2 with one line where nothing could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--only", default="", help=f"some of {', '.join(FIGURES)}; all by default")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each figure")
    parser.add_argument("--threads", type=int, default=1, help="of torch and OpenCV, on both sides")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder of table and JSON")
    parser.add_argument("--small", action="store_true", help="hand-sized inputs: agreement alone")
    given = [a if a.startswith("-") or "=" not in a else f"--{a}" for a in sys.argv[1:]]
    arguments = parser.parse_args(given)

    with errors_as_exit_code() as status:
        names = [name for name in arguments.only.split(",") if name] or list(FIGURES)
        for name in names:
            if name not in FIGURES:
                raise ConfigError(f"only: got {name!r}, expected some of {', '.join(FIGURES)}")
        if arguments.repeats < 1 or arguments.threads < 1:
            raise ConfigError(f"repeats, threads: got {arguments.repeats}, {arguments.threads}, expected 1 or more")
        torch.set_num_threads(arguments.threads)
        cv2.setNumThreads(arguments.threads)
        device = resolve_device(arguments.device).torch_device
        setting, about = Setting(device, arguments.repeats, arguments.small), describe_machine(device)
        rows = [row for name in names for row in measure(name, setting)]
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "benchmark.json").write_text(json.dumps(as_json(rows, about), indent=1), encoding="utf-8")
        (arguments.out / "benchmark.md").write_text(make_markdown(rows, about), encoding="utf-8")
        if folders := [row.details for row in rows if "photographs" in row.details]:
            (arguments.out / "photographs.png").write_bytes(draw_chart(folders))
        print(make_markdown(rows, about))
    return status.code


if __name__ == "__main__":
    sys.exit(main())

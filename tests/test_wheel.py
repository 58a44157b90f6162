"""The built wheel, away from the clone, does the job: it carries the configuration and the miniature weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_the_demo_outside_the_clone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    where = [sys.executable, "-c", "import moduseg; print(moduseg.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).is_relative_to(site)

    small = ["dataset.train=8", "dataset.val=2", "runtime.device=cpu", "evaluation.bootstrap=20", "evaluation.panels=1"]
    for command in ("build_bank", "infer"):
        code = f"import sys; sys.argv.insert(1, '{command}'); from moduseg.cli.main import entry; entry()"
        run = subprocess.run(
            [sys.executable, "-c", code, *small],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    results = json.loads(next((elsewhere / "outputs").glob("miniature/infer/*/results.json")).read_text())
    assert results["images"] == 2
    assert next((elsewhere / "outputs").glob("miniature/infer/*/report/index.html")).read_text().startswith("<!doctype")

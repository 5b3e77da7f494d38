"""In which precision the aggregator computes."""

from __future__ import annotations

from typing import Literal

import torch


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """bf16 around the aggregator if so wanted; the heads turn it off for themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


Precision = Literal["bf16", "fp32"]

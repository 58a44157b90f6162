"""Estimate the time of model passes on GPUs that are not there: operators are counted on tensors without data.

python -m benchmarks.roofline

Each operator takes the longest of three times: its floating-point operations at the achieved share of the peak, its
bytes at the achieved share of the bandwidth, and the launch of a kernel. `docs/cuda.md` says what follows from the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LAUNCH = 5e-6
"""Seconds between two kernels that Python launches one after the other."""
ACHIEVED = 0.5
"""Share of peak operations and of peak bandwidth that large operators achieve."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at most, from its data sheet.

    Attributes:
        half: dense operations a second in float16 and bfloat16 on tensor cores.
        single: in float32 without TF32.
        bandwidth: of its memory, in bytes a second.
    """

    half: float
    single: float
    bandwidth: float


ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
"""One kernel on a GPU, which moves nothing but its arguments and result."""
GPUS = {"H200": Gpu(989e12, 67e12, 4.8e12), "RTX 4090": Gpu(165e12, 82e12, 1.0e12)}


class OperatorCounter(TorchDispatchMode):
    """Counts operators, floating-point operations and bytes, and adds up the seconds of each GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.flops, self.bytes = 0, 0, 0
        self.seconds = dict.fromkeys(GPUS, 0.0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not ATTENTION:
            # Linear layers and the like are parts of PyTorch that consist of operators.
            with self:
                composed = func.decompose(*args, **(kwargs or {}))
            if composed is not NotImplemented:
                return composed
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if func.is_view or not tensors:
            return result
        flops = count_flops(func, args, kwargs or {}, result)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        is_half = tensors[0].dtype in (torch.float16, torch.bfloat16)
        self.operators, self.flops, self.bytes = self.operators + 1, self.flops + flops, self.bytes + moved
        for name, gpu in GPUS.items():
            peak = gpu.half if is_half else gpu.single
            self.seconds[name] += max(flops / peak / ACHIEVED, moved / gpu.bandwidth / ACHIEVED, LAUNCH)
        return result


def count_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the operations of products, convolutions and fused attention; 0 for other operators."""
    if func is ATTENTION:
        query, key, value = args[:3]
        return int(2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * value.shape[-2:].numel())
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def count_operators(run: Callable[[], object]) -> OperatorCounter:
    """Count what a call does; its tensors are to be on the device `meta`."""
    with OperatorCounter() as counter, torch.inference_mode():
        run()
    return counter


def make_passes() -> dict[str, Callable[[], object]]:
    """Return the passes of `experiment=voc`, for an image of 375 x 500, by name; the models have no weights."""
    import timm
    from segment_anything import sam_model_registry

    from moduseg.proposers.sam_attention import RelativeAttention
    from moduseg.proposers.sam_decoder import _run_two_way

    with torch.device("meta"):
        sam = sam_model_registry["vit_h"]().eval()
        encoder, decoder = sam.image_encoder.to(torch.bfloat16), sam.mask_decoder
        pixels = torch.empty(1, 3, 1024, 1024, dtype=torch.bfloat16)
        image, tokens = torch.empty(1, 256, 64, 64), torch.empty(64, 7, 256)
        dino = timm.create_model("vit_base_patch8_224", dynamic_img_size=True).eval().half()
        clip = timm.create_model("vit_base_patch16_224", dynamic_img_size=True).eval().half()
        radio = timm.create_model("vit_so400m_patch14_siglip_224", img_size=448, num_classes=0).eval().bfloat16()
        windows = torch.empty(6, 3, 336, 336, dtype=torch.float16)
        backbone_input = torch.empty(1, 3, 448, 448, dtype=torch.bfloat16)
        many = torch.empty(64, 64 * 64, 256)

    def encode_with_new_attention() -> object:
        for block in encoder.blocks:
            if not isinstance(block.attn, RelativeAttention):
                block.attn = RelativeAttention(block.attn, block.attn.num_heads)
        return encoder(pixels)

    return {
        "SAM ViT-H encoder, published attention": lambda: encoder(pixels),
        "SAM ViT-H encoder": encode_with_new_attention,
        "SAM mask decoder, 64 points": lambda: _run_two_way(decoder.transformer, image, image, tokens),
        "SAM mask decoder, masks of 64 points": lambda: decoder.output_upscaling(
            many.transpose(1, 2).unflatten(2, (64, 64))
        ),
        "DINO ViT-B/8, 6 windows of 336": lambda: dino.forward_features(windows),
        "MetaCLIP ViT-B/16, 6 windows of 336": lambda: clip.forward_features(windows),
        "so400m, 1,024 tokens": lambda: radio.forward_features(backbone_input),
    }


def main() -> None:
    """Print the table."""
    print("| pass | operators | TFLOP | GB moved |", " | ".join(f"{name}, ms" for name in GPUS), "|")
    print("|---|---|---|---|" + "---|" * len(GPUS))
    for name, run in make_passes().items():
        counter = count_operators(run)
        times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in counter.seconds.values())
        print(f"| {name} | {counter.operators} | {counter.flops / 1e12:.2f} | {counter.bytes / 1e9:.1f} | {times} |")


if __name__ == "__main__":
    main()

"""SAM and SAM-HQ in two libraries on the same random weights: image embeddings, predicted IoUs, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.miniature.models.sam import build_miniature_sam
from moduseg.proposers.mask_generation import Promptable
from moduseg.proposers.mask_upsampling import enlarge
from moduseg.proposers.sam_decoder import PackagedSam
from moduseg.proposers.sam_transformers import SamTransformersOptions, SamTransformersProposer
from tests.support import tiny_models
from tests.support.agreement import Row, measure_relative_error, picture

CPU = Device(torch.device("cpu"))
SIZES = [(96, 128), (150, 90), (128, 128), (37, 53), (375, 500)]
LIBRARIES = "transformers, segment_anything"


def hub_model(state: dict[str, Tensor], family: str = "sam") -> Any:
    """A model of `transformers` with the weights of `segment_anything`'s SAM; what SAM lacks stays random."""
    model = tiny_models.build_sam(family)
    renamed = tiny_models.transformers_state(state)
    report = model.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert family != "sam" or set(model.state_dict()) == set(renamed)
    return model


def compare_sam(folder: Path) -> list[Row]:
    """SAM through `transformers`, loaded from a directory, beside the published code."""
    sam = tiny_models.randomise(build_miniature_sam())
    directory = tiny_models.save(hub_model(sam.state_dict()), folder)
    return _beside_predictor(
        "SAM", LIBRARIES, SamTransformersProposer(SamTransformersOptions(weights=directory), CPU).promptable, sam
    )


def compare_packaged(folder: Path) -> list[Row]:
    """The published modules as we run them, beside the published code."""
    sam, again = tiny_models.randomise(build_miniature_sam()), build_miniature_sam()
    again.load_state_dict(sam.state_dict())
    return _beside_predictor("SAM", "engine grid, segment_anything", PackagedSam(again, CPU), sam)


def compare_sam_hq(folder: Path) -> list[Row]:
    """SAM-HQ has one more token than SAM, whose mask it adds to SAM's masks.

    With that mask at 0, a SAM of `segment_anything` with five mask tokens instead of four decodes the same masks.
    `transformers` sorts the masks of a point by predicted IoU.
    """
    sam = build_miniature_sam()
    sam.mask_decoder = type(sam.mask_decoder)(
        num_multimask_outputs=4, transformer=sam.mask_decoder.transformer, transformer_dim=64, iou_head_hidden_dim=64
    )
    tiny_models.randomise(sam.eval())
    state = sam.state_dict()
    tokens = state["mask_decoder.mask_tokens.weight"]
    state["mask_decoder.mask_tokens.weight"] = tokens[:4]
    for kind in ("weight", "bias"):
        name = f"mask_decoder.iou_prediction_head.layers.2.{kind}"
        state[name] = state[name][:4]
    model = hub_model({name: tensor for name, tensor in state.items() if "mlps.4." not in name}, "sam_hq")
    model.mask_decoder.hq_token.weight.data.copy_(tokens[4:])
    for parameter in model.mask_decoder.hq_mask_mlp.proj_out.parameters():
        parameter.data.zero_()
    ours: Promptable = SamTransformersProposer(
        SamTransformersOptions(weights=tiny_models.save(model, folder)), CPU
    ).promptable
    plain = PackagedSam(sam, CPU)
    rows = []
    for height, width in SIZES:
        image = picture(height, width)
        with torch.no_grad():
            reference = plain.embed(image)
            points = _points(reference.input_size)
            expected = plain.decode(reference, points, 0.0)
            embedded = ours.embed(image)
            decoded = ours.decode(embedded, points, 0.0)
        scores, order = expected.predicted_iou.view(-1, 4)[:, :3].sort(1, descending=True)
        logits = expected.logits.unflatten(0, (-1, 4))[torch.arange(len(points))[:, None], order]
        size = f"{height} x {width}"
        rows += [
            Row("SAM-HQ", LIBRARIES, output, size, measure_relative_error(a, b))
            for output, a, b in (
                ("image embedding", embedded.features[0], reference.features),
                ("predicted IoU", decoded.predicted_iou, scores.flatten()),
                ("masks", decoded.logits, logits.flatten(0, 1)),
            )
        ]
    return rows


def _points(input_size: tuple[int, int]) -> Tensor:
    """`[20, 2]` x and y inside the input."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 2, generator=generator) * torch.tensor([input_size[1], input_size[0]])


@torch.no_grad()
def _beside_predictor(title: str, implementations: str, ours: Promptable, sam: Any) -> list[Row]:
    """Embeddings, predicted IoUs, and masks at the size of the image, beside those of `SamPredictor`."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    rows = []
    for height, width in SIZES:
        image = picture(height, width)
        predictor.set_image(image)
        points = _points(predictor.input_size)
        masks, scores, _ = predictor.predict_torch(points[:, None], torch.ones(len(points), 1), return_logits=True)
        embedded = ours.embed(image)
        assert embedded.input_size == predictor.input_size
        decoded = ours.decode(embedded, points, 0.0)
        enlarged = torch.cat(list(enlarge(decoded.logits, embedded)))
        pairs = (
            ("image embedding", embedded.features, predictor.features),
            ("predicted IoU", decoded.predicted_iou, scores.flatten()),
            ("masks", enlarged, masks.flatten(0, 1)),
        )
        size = f"{height} x {width}"
        rows += [Row(title, implementations, output, size, measure_relative_error(a, b)) for output, a, b in pairs]
    return rows

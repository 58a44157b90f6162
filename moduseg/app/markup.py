"""What the page shows of a session, as HTML. Names come from banks and pictures of strangers, and are escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from moduseg.app.changes import WhatChanged
from moduseg.app.picture import MAX_SIDE, ShownPicture
from moduseg.datasets.io import read_image
from moduseg.explanation import Explanation, Neighbour
from moduseg.masks.palette import format_colour
from moduseg.report.pictures import encode_data_url, encode_grey_png
from moduseg.result import ImagePrediction

NO_PICTURE = '<p class="ms-empty">Drop a picture above, or take one of the examples.</p>'
NO_REGION = '<p class="ms-quiet">Click a region to see which regions of the bank gave it its name.</p>'
NO_CHANGE = '<p class="ms-quiet">Name a region: what changes with it is said here.</p>'
_EXAMPLE_SIDE = 220
"""Longer side of the picture on the button of an example, in pixels."""
_NEIGHBOUR_SIDE = 160
"""Longer side of the picture of a neighbour, in pixels."""


def show_examples(files: Sequence[Path]) -> str:
    """Return a button for each example picture; static/app.js tells the page the name of the one that is clicked."""
    buttons = ""
    for file in files:
        name, address = escape(file.stem), encode_data_url(read_image(file), _EXAMPLE_SIDE)
        image = f'<img src="{address}" alt="{name.replace("_", " ")}">'
        buttons += f'<button type="button" class="ms-example" data-name="{name}">{image}</button>'
    return f'<p class="ms-quiet">Or one of these:</p><div class="ms-examples">{buttons}</div>'


def show_picture(shown: ShownPicture, prediction: ImagePrediction) -> str:
    """Return the picture; static/app.js says the class under the pointer, and tells clicks and boxes to the page."""
    png = base64.b64encode(encode_grey_png(shown.labels, (shown.labels.shape[0], shown.labels.shape[1]))).decode()
    height, width = shown.labels.shape
    names = escape(json.dumps(prediction.classes))
    classes = ", ".join(f"{name} {_percent(share)}" for name, share in prediction.shares.items())
    return (
        f'<div class="ms-picture" style="--ratio:{width / height:.4f}" data-names="{names}" tabindex="0" role="group" '
        'aria-label="Picture: arrow keys move a cross, Enter chooses the region below it">'
        f'<img class="ms-painted" draggable="false" width="{width}" height="{height}" '
        f'src="{encode_data_url(shown.painted, MAX_SIDE)}" alt="Labelled picture: {escape(classes)}">'
        f'<img class="ms-labels" src="data:image/png;base64,{png}" alt="" hidden>'
        '<div class="ms-box" hidden></div><div class="ms-cross" hidden></div>'
        '<div class="ms-tip" role="status" hidden></div></div>'
    )


def show_legend(prediction: ImagePrediction, colours: np.ndarray) -> str:
    """Return the classes in the picture with their colours and shares of its area, largest first."""
    entries = []
    for name, share in prediction.shares.items():
        label = prediction.classes.index(name)
        text = f"<span>{escape(name)}</span><b>{_percent(share)}</b>"
        entries.append(f'<li data-label="{label}">{_swatch(label, colours)}{text}</li>')
    return f'<ul class="ms-legend" aria-label="Classes and their shares of the picture">{"".join(entries)}</ul>'


def show_change(change: WhatChanged | None, message: str = "") -> str:
    """Return what the last step changed, in words."""
    lines = [f"<p>{escape(message)}</p>"] if message else []
    if change is None:
        return f'<div class="ms-change" role="status">{"".join(lines) or NO_CHANGE}</div>'
    if change.region is not None:
        before, after = escape(change.region.before), escape(change.region.after)
        text = f"{before} → <b>{after}</b>" if before != after else f"stays <b>{after}</b>"
        lines.append(f"<p>This region: {text}</p>")
    count = change.num_others
    lines.append(f"<p>{count or 'No'} other region{'' if count == 1 else 's'} changed{':' if count else '.'}</p>")
    rows = "".join(
        f"<li><span>{escape(before)} → <b>{escape(after)}</b></span><b>{number}</b></li>"
        for before, after, number in change.others
    )
    lines.append(f"<ul>{rows}</ul>" if rows else "")
    striped = ", striped in the picture" if change.mask.any() else ""
    lines.append(f"<p>{_percent(change.share)} of the area has another name{striped}.</p>")
    return f'<div class="ms-change" role="status">{"".join(lines)}</div>'


def show_explanation(explanation: Explanation | None) -> str:
    """Return why a region has its name: votes, and the nearest regions of the bank with full captions."""
    if explanation is None:
        return NO_REGION
    votes = escape(explanation.describe_votes())
    head = f"<p><b>{escape(explanation.label)}</b>, score {explanation.score:.2f}; votes: {votes}</p>"
    figures = "".join(_show_neighbour(neighbour) for neighbour in explanation.neighbours)
    return f'<div class="ms-why">{head}<ul>{figures}</ul></div>'


def _show_neighbour(neighbour: Neighbour) -> str:
    picture = '<span class="ms-gone">picture not at hand</span>'
    if neighbour.picture is not None:
        address = encode_data_url(neighbour.picture, _NEIGHBOUR_SIDE)
        picture = f'<img src="{address}" alt="{escape(neighbour.label)} in {escape(neighbour.image)}">'
    role = "decided" if neighbour.has_voted else "had no vote"
    return (
        f'<li class="{"ms-voted" if neighbour.has_voted else ""}">{picture}<b>{escape(neighbour.label)}</b>'
        f"<span>similarity {neighbour.similarity:.2f}, {role}</span><small>{escape(neighbour.image)}</small></li>"
    )


def show_reasons(reasons: dict[str, str], names: dict[str, str]) -> str:
    """Return why buttons are disabled, by the words on them; an empty line where none is."""
    texts = [f"{names[action]}: {reason}." for action, reason in reasons.items() if reason and action in names]
    return f'<p class="ms-quiet ms-reasons">{escape(" ".join(texts)) or "&nbsp;"}</p>'


def _swatch(label: int, colours: np.ndarray) -> str:
    red, green, blue = (int(part) for part in colours[label])
    if label == 0:
        return '<i class="ms-swatch ms-none"></i>'
    return f'<i class="ms-swatch" style="background:{format_colour((red, green, blue))}"></i>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

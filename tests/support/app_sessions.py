"""What tests of the app say of a session."""

from __future__ import annotations

from moduseg.app.session import Session
from moduseg.result import ImagePrediction

NAME = "purple blob"


def some_object(session: Session) -> int:
    """The first object that is seen."""
    prediction = session.prediction
    return next(int(i) for i in prediction.kept if int(prediction.labels[i]) > 0)


def label_of(session: Session, proposal: int) -> str:
    return name_of(session.prediction, proposal)


def name_of(prediction: ImagePrediction, proposal: int) -> str:
    return prediction.classes[int(prediction.labels[proposal])]

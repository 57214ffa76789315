from __future__ import annotations

import json

import numpy as np

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.smoothing.answers import Certified, Predicted
from densepure_rt.smoothing.certificate import Certificate, EpsOutcome
from densepure_rt.smoothing.scheduling import Cost

PIXELS = np.arange(784, dtype=np.int64).astype(np.uint8).reshape(1, 28, 28)
NAMED = LabelledImage(3, PIXELS, 1, "<b>\x1b[31m.png")
CERTIFICATE = Certificate(1, 0.25999, 0, 64, 63, 0.001, 0.8, (EpsOutcome(0.25, "certified", 64, 63),))
ABSTAINS = Certificate(None, None, 0, 10, 5, 0.001, 0.1, (EpsOutcome(0.0, "gave up", 10, 5),))
COST = Cost(64, 128, 320, 0, 1.5)


def predicted(label: int | None) -> Predicted:
    return Predicted(NAMED, label, 13, np.array([0, 13]), None if label is None else 0.00012, COST)


def test_a_repr_is_short_rounds_down_and_has_no_pixels() -> None:
    assert repr(CERTIFICATE) == "Certificate(certified class 1, radius 0.259, samples 63 of 64, alpha 0.001)"
    assert repr(ABSTAINS) == "Certificate(certificate abstains: gave up, samples 5 of 10, alpha 0.001)"
    certified = Certified(LabelledImage(3, PIXELS, 1, "a.png"), CERTIFICATE, COST)
    assert repr(certified).startswith("Certified(LabelledImage(idx=3, pixels=uint8 1x28x28, label=1, name='a.png'), ")
    for shown in (repr(certified), repr(predicted(1)), repr(predicted(None))):
        assert len(shown) < 250
        assert "[" not in shown.replace("[31m", "")


def test_a_dict_is_json_in_full_precision_without_pixels() -> None:
    for answer in (CERTIFICATE, ABSTAINS, Certified(NAMED, CERTIFICATE, COST), predicted(1), predicted(None)):
        assert json.loads(json.dumps(answer.to_dict())) == answer.to_dict()
    assert CERTIFICATE.to_dict()["radius"] == 0.25999
    assert CERTIFICATE.to_dict()["outcomes"] == [{"eps": 0.25, "result": "certified", "n": 64, "n_a": 63}]
    found = Certified(NAMED, CERTIFICATE, COST).to_dict()
    assert (found["idx"], found["name"], found["label"], found["correct"]) == (3, NAMED.name, 1, True)
    assert (found["samples"], found["seconds"]) == (64, 1.5)
    assert predicted(1).to_dict()["votes"] == [0, 13]


def test_what_has_no_label_is_neither_right_nor_wrong() -> None:
    unlabelled = LabelledImage(0, PIXELS, None)
    assert Certified(unlabelled, CERTIFICATE, COST).to_dict()["correct"] is None
    assert predicted(1)._replace(image=unlabelled).to_dict()["correct"] is None
    assert Certified(NAMED, ABSTAINS, COST).to_dict()["correct"] is False
    assert predicted(None).to_dict()["correct"] is False


def test_a_notebook_shows_the_picture_and_escapes_the_name() -> None:
    for answer in (Certified(NAMED, CERTIFICATE, COST), predicted(1), predicted(None)):
        page = answer._repr_html_()
        assert 'src="data:image/png;base64,' in page
        assert "&lt;b&gt;\\x1b[31m.png" in page
        assert "<b>" not in page
    assert "0.259" in Certified(NAMED, CERTIFICATE, COST)._repr_html_()
    assert "abstains: gave up" in ABSTAINS._repr_html_()

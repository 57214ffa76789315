from __future__ import annotations

from pathlib import Path
from typing import cast

from densepure_rt.export.models.check_images import made_up
from densepure_rt.runtime.device import Device
from densepure_rt.runtime.metered_device import MeteredDevice
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import make_chain
from densepure_rt.smoothing.voting import Ballot
from tests.support.toys import IMAGE, toy_bundle


def test_batches_and_their_items_are_counted_by_kind(tmp_path: Path) -> None:
    toy = toy_bundle(tmp_path)
    device = open_device(toy, 4, 1)
    metered = MeteredDevice(device)
    assert (metered.batch, metered.in_flight) == (4, 1)
    chain = make_chain(toy.unet.schedule, toy.unet.variance, 0.5, 1)
    handle = metered.open_image(made_up(IMAGE, 1)[0], (0, 0), 0.5, chain.scale)
    work = [(handle, sample) for sample in range(6)]
    outcomes = list(decide(cast(Device, metered), chain, work, lambda: Ballot(1)))
    metered.close()
    assert len(outcomes) == 6
    assert metered.items == {"smooth": 6, "step": 6, "classify": 6}
    assert metered.batches == {"smooth": 2, "step": 2, "classify": 2}
    assert metered.seconds > 0

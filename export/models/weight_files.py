"""Which file of a folder holds a model's weights, by the names that diffusers and transformers give them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from densepure_rt import files
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.transport import transfer_fault

# diffusers, utils/constants.py and model_loading_utils.py; transformers, utils/__init__.py. A variant stands before the
# last suffix: STEM.fp16.safetensors, STEM.safetensors.index.fp16.json.
NAME = re.compile(
    r"(?P<stem>[\w-]+)(\.(?P<before>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<after>\w+))?\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, or the index of several. variant: such as "fp16"; "" for the usual one."""

    path: Path
    variant: str
    safe: bool

    @property
    def parts(self) -> list[Path]:
        """List the file itself, or the index and every file that it names. Raises CheckFailed for a damaged index."""
        if not self.path.name.endswith(".json"):
            return [self.path]
        try:
            names = set(json.loads(files.text(self.path, "sidecar"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckFailed(f"{self.path} is not an index of weights: copy the folder again") from error
        if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise CheckFailed(f"{self.path} names {strange[0]!r}, outside its folder: copy the folder again")
        return [self.path, *(self.path.with_name(name) for name in sorted(names))]

    def sha256(self) -> str:
        """Hash the file, or the hashes of all that an index names."""
        digests = [sha256_of(path) for path in self.parts]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def weight_file(folder: Path, stems: dict[str, str]) -> WeightFile:
    """Find the weights a loader would take: safetensors before pickles, a variant where there is nothing else.

    stems: of the names, by kind: {"safetensors": "model"}. Raises UsageError where there are none, or several variants,
    CheckFailed where a transfer left something else.
    """
    found: list[WeightFile] = []
    for path in sorted(folder.iterdir()):
        name = NAME.fullmatch(path.name)
        if name and not SHARD.search(path.name) and stems.get(name["kind"]) == name["stem"]:
            found.append(WeightFile(path, name["before"] or name["after"] or "", name["kind"] == "safetensors"))
    variants = sorted({file.variant for file in found})
    usual = [file for file in found if not file.variant]
    if not usual and len(variants) != 1:
        wanted = " or ".join(f"{stem}.{kind}" for kind, stem in stems.items())
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        if variants:
            raise UsageError(
                f"{folder} holds the weights as variants alone, {', '.join(variants)}: leave one of them there, or "
                f"save it with save_pretrained without a variant"
            )
        raise UsageError(
            f"{folder} holds no {wanted} (it holds {there}): download or copy that too, or save the model there with "
            f"save_pretrained"
        )
    chosen = min(usual or found, key=lambda file: (not file.safe, len(file.path.name)))
    for path in chosen.parts:
        if not path.is_file():
            raise UsageError(f"{chosen.path} names {path.name}, which is not there: download or copy it too")
        if fault := transfer_fault(path):
            raise CheckFailed(f"{path} holds no weights: {fault}")
    return chosen


def variant_note(file: WeightFile) -> tuple[str, ...]:
    """Say that a variant was taken, if it was one."""
    if not file.variant:
        return ()
    return (f"{file.path.name} is the only one there: its {file.variant} weights are computed with in float32",)

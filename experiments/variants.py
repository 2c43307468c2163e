"""What a sweep trains: ReSpike and what may change in it, and the networks to compare it with.

Edit here. A variant of your own is also a word on the command line: `--only cross "narrow=--fusion cross --stride 2"`.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import UserError

BASE = "-T 16"  # flags of every run; the flags behind `--` come after them
RESPIKE = "--stride 4 --residual key --branches both --fusion cross --downsample"  # after BASE, of ReSpike alone

# Name -> what it changes; these flags come last.
VARIANTS = {
    "ann": "--branches ann",
    "snn": "--branches snn",
    "concat": "--fusion concat",
    "lean": "--fusion lean",
    "film": "--fusion film",
    "cross": "--fusion cross",
    "stride2": "--stride 2",
    "previous": "--residual previous",
    "none": "--residual none",
    "T8": "-T 8",
    "T32": "-T 32",
}
# They refuse the flags of ReSpike.
BASELINES = {
    "frames": "--branches frames",
    "r3d_18": "--model r3d_18",
    "mc3_18": "--model mc3_18",
    "r2plus1d_18": "--model r2plus1d_18",
}


@dataclass(frozen=True)
class Variant:
    changed: str  # its own flags
    flags: tuple[str, ...]  # all flags of its runs, but for seed and data of a run


def choose(words: Sequence[str], flags: Sequence[str]) -> dict[str, Variant]:
    """Variants by name. words: names above, or `name=flags`; no word stands for all names above. RESPIKE comes
    before the flags of a variant, unless they name a network of BASELINES. flags: of every run. Raises UserError for an
    unknown name."""
    chosen = {}
    for word in words or (*VARIANTS, *BASELINES):
        name, is_own, changed = word.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not (is_own or name in VARIANTS or name in BASELINES):
            raise UserError(
                f"--only {word}: expected one of {', '.join((*VARIANTS, *BASELINES))}, or a variant of your own as "
                '"name=flags", its name of letters, digits and ._+-'
            )
        changed = changed if is_own else {**VARIANTS, **BASELINES}[name]
        is_baseline = any(baseline in changed.replace("=", " ") for baseline in BASELINES.values())
        own = "" if is_baseline else RESPIKE
        try:
            changes = shlex.split(changed)
        except ValueError as error:
            raise UserError(f"--only {word}: cannot be cut into flags ({error})") from error
        chosen[name] = Variant(changed, (*shlex.split(f"{BASE} {own}"), *flags, *changes))
    return chosen

"""Parts of a job for several machines."""

from __future__ import annotations

import re

from .errors import UserError


def parse_shard(text: str) -> tuple[int, int]:
    """``k/n`` -> (k, n) with 0 <= k < n; ``UserError`` otherwise."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or int(found[1]) >= int(found[2]):
        fix = "number the machines from 0: shard=0/4, shard=1/4, ..."
        raise UserError("shard", got=text, wanted="k/n with 0 <= k < n", fix=fix)
    return int(found[1]), int(found[2])

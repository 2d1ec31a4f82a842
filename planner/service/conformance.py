"""``physis check service URL``: whether anyone's server keeps the v1 contract, check by check, in words."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from physisforcing.core.connection import TOKEN_VARIABLE
from physisforcing.core.errors import UserError, check_at_least, unknown_name

HELP = """usage: physis check service URL [options]

Ask a world-model server everything that the v1 contract promises, and say what it keeps. The server need not be ours.

  physis check service http://127.0.0.1:8080
  physis check service https://wm.example.org --token SECRET --only determinism --only idempotency

options:
  --token SECRET     Bearer token (default: the variable PHYSIS_TOKEN, over https or to this machine)
  --timeout S        after which an answer counts as missing (what the server recommends)
  --clients N        clients at the same time (8), --rounds N requests each (2)
  --examples N       of schema-based and of random-byte fuzzing, each (100)
  --batch N          at most so many samples in one request (8)
  --seed N           of pictures, actions and fuzzing (0)
  --only NAME        this check alone (and the capabilities); can be repeated. --list names them
  --json             the result as one JSON document

Exit code 0: nothing failed (what was skipped is told), 1: something failed, 2: a mistake in the command."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Check:
    """``status``: ``pass``, ``fail`` or ``skipped``; ``words``: what was seen, or why not."""

    name: str
    status: str
    words: str
    seconds: float


def checks() -> dict[str, Callable[..., str]]:
    """All checks by name, in the order in which they are made."""
    from . import checks_answers as answers
    from . import checks_load as load
    from . import checks_refusals as refusals
    from . import fuzz

    return {
        "health": answers.health,
        "capabilities": answers.capabilities,
        "authentication": answers.authentication,
        "single sample": answers.single_sample,
        "largest batch": answers.largest_batch,
        "determinism": answers.determinism,
        "no session": answers.no_session,
        "seeds": answers.seeds,
        "idempotency": answers.idempotency,
        "twins": answers.twins,
        "unknown fields": answers.unknown_fields,
        "wrong fields": refusals.wrong_fields,
        "wrong lengths": refusals.wrong_lengths,
        "wrong pictures": refusals.wrong_pictures,
        "decompression bombs": refusals.decompression_bombs,
        "wrong versions": refusals.wrong_versions,
        "bad documents": refusals.bad_documents,
        "wrong routes": refusals.wrong_routes,
        "too large": refusals.too_large,
        "needs actions": refusals.needs_actions,
        "schema fuzzing": fuzz.schema_fuzzing,
        "byte fuzzing": fuzz.byte_fuzzing,
        "no HTTP": load.no_http,
        "leaving clients": load.leaving_clients,
        "many clients": load.many_clients,
        "declared concurrency": load.declared_concurrency,
        "overload": load.overload,
        "stable manifest": answers.stable_manifest,
        "no leaks": answers.no_leaks,
    }


def run_suite(url: str, *, token: str = "", only: Sequence[str] = (), **options: object) -> Iterator[Check]:
    """Make the checks one after the other. ``options`` as in ``SuiteOptions``; ``only``: names (empty: all).

    ``UserError`` for a URL or a name that is none. A server that cannot be reached fails its checks.
    """
    from .http import Address
    from .probe import FailedError, Probe, SkippedError, SuiteOptions

    settings = SuiteOptions(**options)  # type: ignore[arg-type]
    check_at_least(settings, clients=1, rounds=1, examples=1, largest_batch=1, timeout_s=0, seed=0)
    probe, known = Probe(address=Address.of(url), token=token, options=settings), checks()
    for name in only:
        if name not in known:
            raise unknown_name("--only", name, known, see="physis check service --list")
    for name, check in known.items():
        if only and name not in (*only, "capabilities"):
            continue
        begun = time.monotonic()
        try:
            status, words = "pass", check(probe)
        except SkippedError as error:
            status, words = "skipped", str(error)
        except FailedError as error:
            status, words = "fail", str(error)
        yield Check(name=name, status=status, words=words, seconds=time.monotonic() - begun)


def main(argv: Sequence[str]) -> int:
    """See ``HELP``."""
    parser = argparse.ArgumentParser(prog="physis check service", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--token", default=None)
    parser.add_argument("--timeout", type=float, default=0.0)
    for name, default in (("clients", 8), ("rounds", 2), ("examples", 100), ("batch", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", action="append", default=[])
    for name in ("list", "json", "help"):
        parser.add_argument(f"--{name}", *(["-h"] if name == "help" else []), action="store_true")
    options = parser.parse_args(list(argv))
    if options.help or options.list:
        print(HELP if options.help else "\n".join(checks()))
        return 0
    if options.url is None:
        raise UserError(
            "URL", got=None, wanted="the address of a server", fix="physis check service http://127.0.0.1:8080"
        )
    from .http import Address, token_for

    token, found = token_for(Address.of(options.url), options.token, TOKEN_VARIABLE), []
    for check in run_suite(
        options.url, token=token, only=options.only, timeout_s=options.timeout, clients=options.clients,
        rounds=options.rounds, examples=options.examples, largest_batch=options.batch, seed=options.seed,
    ):  # fmt: skip
        found.append(check)
        if not options.json:
            print(f"{check.status:8}{check.name:22}{check.seconds:7.1f} s  {check.words}", flush=True)
    counts = {status: sum(check.status == status for check in found) for status in ("pass", "fail", "skipped")}
    if options.json:
        print(json.dumps({"url": options.url, **counts, "checks": [asdict(check) for check in found]}, indent=2))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

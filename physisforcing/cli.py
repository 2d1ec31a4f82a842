"""The command ``physis <verb>``. Each verb is a module with ``main(argv) -> int`` that is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from physisforcing import __version__
from physisforcing.core.errors import (
    IncompleteCoverageError,
    ServerLostError,
    UserError,
    VulkanUnavailableError,
    unknown_name,
)


@dataclass(slots=True, frozen=True)
class Verb:
    """Where a verb lives and what ``physis --help`` says about it."""

    module: str
    summary: str


VERBS: dict[str, Verb] = {
    "doctor": Verb("physisforcing.doctor", "what this machine has, and the fix for what it lacks"),
    "demo": Verb("physisforcing.demo", "the whole way once: collect, fine-tune, plan, report"),
    "tasks": Verb("physisforcing.envs.robotwin.tasks", "list the tasks, or describe one"),
    "data collect": Verb("physisforcing.envs.collect", "record demonstrations with exact ground truth"),
    "data nano": Verb("physisforcing.envs.nano", "record the nano dataset of eight tasks and pack it"),
    "data manifest": Verb("physisforcing.envs.freeze", "freeze the scenes of an evaluation"),
    "data prepare": Verb(
        "physisforcing.data_prepare", "convert demonstrations, or choose clips: motion, copies, captions"
    ),
    "data merge": Verb("physisforcing.core.merge", "make one dataset of several, such as the shards of a collection"),
    "data pack": Verb("physisforcing.core.archive", "datasets as one small file: pictures, joints, poses, contacts"),
    "data unpack": Verb("physisforcing.core.archive", "the datasets of an archive"),
    "data inspect": Verb("physisforcing.data_inspect", "check a dataset, summarise it, draw tracks and masks"),
    "data export": Verb("physisforcing.data_export", "demonstrations or imagined episodes in WorldArena's layouts"),
    "data targets": Verb("physisforcing.worldmodel.data.targets", "compute and cache teacher targets"),
    "data latents": Verb("physisforcing.worldmodel.data.latents", "encode windows for the large backbones"),
    "train vae": Verb("physisforcing.worldmodel.training.command", "train the video autoencoder"),
    "train worldmodel": Verb(
        "physisforcing.worldmodel.training.command", "train the video model with the physics losses"
    ),
    "train policy": Verb("physisforcing.policy.train", "train a policy with the video model as its backbone"),
    "train idm": Verb("physisforcing.planner.train", "train the inverse dynamics model"),
    "train success": Verb("physisforcing.planner.train_success", "train the judge of whether a task is done"),
    "convert": Verb("physisforcing.convert", "released checkpoints to plain diffusers folders, or check one"),
    "generate": Verb("physisforcing.generate", "imagine a video from a first frame and an instruction"),
    "check worldmodel": Verb("physisforcing.check", "whether anyone's world model keeps the contract"),
    "eval plan": Verb("physisforcing.eval_plan", "plan in closed loop and count successes, with baselines"),
    "eval policy": Verb("physisforcing.eval_policy", "policies in closed loop, counted and compared, with baselines"),
    "eval evaluator": Verb(
        "physisforcing.eval_evaluator", "policies inside a world model, judged, against the simulator"
    ),
    "compare": Verb("physisforcing.compare", "world models under one planner in the same scenes, with controls"),
    "serve env": Verb("physisforcing.envs.serve", "serve one environment to another process or machine"),
    "serve model": Verb("physisforcing.serve_model", "hold one world model for many simulators"),
    "serve policy": Verb("physisforcing.serve_policy", "hold one policy for many simulators or a robot"),
    "serve worldmodel": Verb("physisforcing.serve_worldmodel", "serve a world model by WorldArena 2.0's v1 contract"),
    "check service": Verb(
        "physisforcing.planner.service.conformance", "whether a world-model server keeps the contract"
    ),
    "pack track1": Verb(
        "physisforcing.planner.track1_pack", "pack generated videos as a WorldArena Track 1 submission"
    ),
    "check track1": Verb("physisforcing.planner.track1", "check a WorldArena Track 1 submission"),
    "report": Verb("physisforcing.core.report.command", "write the HTML report of a run"),
}

#: Verbs whose module serves several verbs: the last word of the verb is passed on as the first argument.
SHARED_MODULES = frozenset({"train vae", "train worldmodel", "data pack", "data unpack"})

EXAMPLES = """examples:
  physis doctor
  physis tasks
  physis data collect tasks=[click_bell] episodes=20 output=runs/bell
  physis data inspect runs/bell
  physis train worldmodel experiment=pico codec=runs/vae/codec data.roots=[runs/bell]
  physis eval plan tasks=[click_bell] episodes=50 output=runs/plan
  physis eval plan planner.oracle=video demos=runs/heldout
  physis <verb> --help

Settings are Hydra overrides after the verb: field=value.
Exit codes: 0 done, 1 a failure of the program or machine, 2 a mistake in the command, 3 done in part."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; a user's mistake becomes one message on stderr, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except UserError as error:
        print(f"physis: {error}", file=sys.stderr)
        return error.exit_code
    except IncompleteCoverageError as error:
        print(f"physis: incomplete: {error}", file=sys.stderr)
        return error.exit_code
    except VulkanUnavailableError as error:
        print(f"physis: {error}", file=sys.stderr)
        return 1
    except ServerLostError as error:
        print(f"physis: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, for instance `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("physis: interrupted", file=sys.stderr)
        return 130


def find_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the verb and its arguments; raises ``UserError`` with the nearest verb."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in VERBS:
            return name, list(words[count:])
    family = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    if family:
        got = words[1] if len(words) > 1 else ""
        options = [name.split()[1] for name in family]
        if not got or got in ("-h", "--help"):
            raise UserError(
                f"physis {words[0]}", got=got, wanted=f"one of {', '.join(options)}", fix=f"physis {family[0]}"
            )
        raise unknown_name(f"physis {words[0]}", got, options, see="physis --help")
    raise unknown_name("verb", words[0], {name.split()[0] for name in VERBS}, see="physis --help")


def help_text() -> str:
    """What ``physis --help`` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(["usage: physis <verb> [field=value ...] [--help]", "", "verbs:", *lines, "", EXAMPLES])


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"physisforcing {__version__}")
        return 0
    name, rest = find_verb(words)
    module = importlib.import_module(VERBS[name].module)
    code = module.main([name.split()[-1], *rest] if name in SHARED_MODULES else rest)
    assert isinstance(code, int), f"{VERBS[name].module}.main returns an exit code"
    return code


if __name__ == "__main__":
    sys.exit(main())

"""``python -m moe_a2a bench | plan | doctor | merge-traces``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from moe_a2a.bench.cases import PRESETS, Geometry, UsageError
from moe_a2a.bench.layer import SMALL
from moe_a2a.bench.routing import DISTRIBUTIONS
from moe_a2a.errors import GeometryError, MoeA2AError
from moe_a2a.experts import EXPERTS, WEIGHT_FORMATS
from moe_a2a.formats import FORMATS
from moe_a2a.spec import COMBINE_WIRES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PRESET = "deepseek-v3"
_INTERRUPTED, _USAGE, _FAILED = 130, 2, 1


class _Parser(argparse.ArgumentParser):
    """One sentence on stderr, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (something failed), 2 (a wrong argument), 130 (Ctrl-C)."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments = parser.parse_args(given)
    if arguments.command is None:
        parser.print_help()
        return 0
    prog = f"{parser.prog} {arguments.command}"
    try:
        return _run(arguments, given)
    except (UsageError, GeometryError) as error:
        return _fail(prog, str(error), _USAGE)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", _INTERRUPTED)
    except BrokenPipeError:
        return _FAILED  # the reader of our output went away
    except (MoeA2AError, OSError) as error:
        return _fail(prog, str(error), _FAILED)


def _fail(prog: str, text: str, code: int) -> int:
    print(f"{prog}: {text}", file=sys.stderr, flush=True)
    return code


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    if arguments.command == "doctor":
        from moe_a2a.bench.doctor import print_diagnosis

        return 0 if print_diagnosis() else _FAILED
    if arguments.command == "merge-traces":
        return _merge_traces(arguments.out, arguments.files)
    if arguments.command == "bench" and arguments.replot is not None:
        from moe_a2a.bench.command import replot

        replot(arguments.replot)
        return 0
    geometry = _geometry(arguments)
    if arguments.command == "plan":
        from moe_a2a.bench.plan import print_plan

        print_plan(
            geometry,
            ep_size=arguments.ranks,
            tokens=arguments.tokens,
            wire=arguments.wire,
            combine_wire=arguments.combine_wire,
            per_host=arguments.ranks_per_host or arguments.ranks,
        )
        return 0
    from moe_a2a.bench.command import bench
    from moe_a2a.bench.launch import RankFailed

    try:
        bench(arguments, geometry, given)
    except RankFailed as error:
        return _fail("python -m moe_a2a bench", str(error), _FAILED)
    return 0


def _merge_traces(out: str, files: Sequence[str]) -> int:
    from moe_a2a.timeline import merge

    try:
        events = merge(out, files)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"{events:,} events of {len(files)} traces in {out}: open it in ui.perfetto.dev")
    return 0


def _geometry(arguments: argparse.Namespace) -> Geometry:
    """The preset with what was given besides; another name where it is no longer the model's."""
    small = arguments.command == "bench" and arguments.layer and arguments.preset is None
    chosen = SMALL if small else PRESETS[arguments.preset or _PRESET]
    given = {
        "hidden_size": arguments.hidden,
        "num_experts": arguments.experts,
        "top_k": arguments.top_k,
    }
    changed = chosen._replace(**{key: n for key, n in given.items() if n is not None})
    return chosen if changed == chosen else changed._replace(name="custom")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m moe_a2a",
        description="Benchmark, plan and diagnose Mixture-of-Experts dispatch and combine.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_bench(commands.add_parser("bench", help="check, then time, on ranks of this host"))
    _add_plan(commands.add_parser("plan", help="memory and link bytes of a geometry"))
    commands.add_parser("doctor", help="versions, backends and a test round")
    traces = commands.add_parser("merge-traces", help="one trace of what several ranks wrote")
    traces.add_argument("out", metavar="OUT", help="the file to write")
    traces.add_argument("files", metavar="FILE", nargs="+", help="of MOE_A2A_TRACE, or save_trace")
    return parser


def _add_geometry(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PRESETS)
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"{names} ({_PRESET})")
    parser.add_argument("--hidden", type=_positive, metavar="H", help="overrides the preset's")
    parser.add_argument("--experts", type=_positive, metavar="E", help="over all ranks")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="choices per token")
    parser.add_argument(
        "--combine-wire", choices=COMBINE_WIRES, default="bf16", metavar="WIRE",
        help=f"of the rows that come back: {', '.join(COMBINE_WIRES)}",
    )  # fmt: skip


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: where the backends asked for work, cpu")
    add("--ranks", type=_positive, metavar="W",
        help="processes to start (2; as many as GPUs); torchrun's beat it")  # fmt: skip
    _add_geometry(parser)
    add("--tokens", type=_numbers, metavar="T,T", help="tokens per rank (1,8,32,128,512)")
    add("--wire", type=_names, default=["bf16"], metavar="WIRE,WIRE",
        help=f"all, or some of {', '.join(FORMATS)} (bf16)")  # fmt: skip
    add("--backend", type=_names, metavar="NAME,NAME", help="default: every usable one")
    add("--routing", default="uniform", metavar="KIND",
        help=f"{', '.join(DISTRIBUTIONS)}, or an .npz with topk_ids and topk_weights")  # fmt: skip
    add("--seed", type=_number, default=0, metavar="N", help="of tokens and routing (0)")
    add("--iters", type=_positive, metavar="N",
        help="at least so many rounds a point (30), or replays of CUDA graphs (100)")  # fmt: skip
    add("--seconds", type=_seconds, metavar="S", help="and at least so long (0.5); not on GPUs")
    add("--pairs", type=_positive, default=20, metavar="N",
        help="dispatch and combine pairs in a CUDA graph (20)")  # fmt: skip
    add("--max-blocks", type=_positive, metavar="N", help="most blocks of a CUDA kernel")
    add("--out", default=".bench", metavar="DIR", help="for JSON and PNG (.bench)")
    add("--quick", action="store_true", help="a short sweep: 1,16 tokens, few rounds")
    add("--pin", action="store_true", help="keep each rank to a core of its own while it is timed")
    add("--no-rivals", action="store_true", help="leave out torch.distributed and FlashInfer")
    add("--no-plot", action="store_true", help="write no PNG")
    add("--host-overhead", action="store_true",
        help="only: host time of a one-rank round of one token, in clone()s")  # fmt: skip
    add(
        "--layer",
        action="store_true",
        help="whole layers with experts, each phase by itself; a small geometry without --preset",
    )
    add("--intermediate", type=_positive, metavar="I", help="with --layer: of the experts")
    add(
        "--weights",
        metavar="FORMAT",
        help=f"with --layer: {', '.join(WEIGHT_FORMATS)} (mxfp4)",
    )
    add("--expert-backend", type=_names, metavar="NAME,NAME",
        help=f"with --layer: of {', '.join(EXPERTS)}; default: every usable one")  # fmt: skip
    add("--replot", metavar="FILE.json", help="only: draw the figure of an earlier run again")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_geometry(parser)
    add = parser.add_argument
    add("--ranks", "--ep-size", type=_positive, default=8, metavar="W", help="EP size (8)")
    add("--ranks-per-host", type=_positive, metavar="N", help="default: all")
    add("--tokens", type=_positive, default=512, metavar="T", help="most tokens per rank (512)")
    add("--wire", choices=FORMATS, default="bf16", metavar="WIRE", help="of the workspace")


def _number(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected an integer >= {least}")
    return value


def _positive(text: str) -> int:
    return _number(text, 1)


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(part) for part in text.split(",")))


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected names with commas between")
    return list(dict.fromkeys(names))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected seconds >= 0")
    return value


if __name__ == "__main__":
    code = main()
    if code == _INTERRUPTED:
        # The ranks have ended; unloading torch would keep the terminal for another second.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

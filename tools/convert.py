"""Convert a checkpoint: python -m tools.convert SOURCE -o OUT.trit --quant trit4"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from formats import FormatError, SourceError
from formats.codecs.trit_codec import Encode
from formats.conversion.convert import PLAIN, QUANTS, Summary, check_outputs, convert_several, several_paths
from formats.conversion.plan import KEEP, MIXED, TRITS
from formats.conversion.report import report_of
from formats.sources.source import Source, open_source
from formats.unfinished import naming, unfinished
from runtime.cli import ArgumentParser, UserError, run
from runtime.config import ModelConfig
from runtime.encoder import ENCODERS, fast_encoder
from runtime.kernels import get_kernels
from runtime.kernels.cores import usable_cores
from runtime.options import defaults_of_file
from runtime.progress import Bar
from runtime.sizes import kv_bytes_per_token
from runtime.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from runtime.calibration.state import StateFolder

from tools.arguments import path_name, positive
from tools.perplexity import read_text
from tools.tables import by_kind, table

CONTEXTS = (8192, 32768, 131072)
TOKENS = 49152
CALIBRATED = (*TRITS, MIXED, "nf4")
HELP = "convert a Hugging Face folder or a GGUF file to a .trit file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    codecs = ", ".join(QUANTS)
    parser.add_argument("source", type=path_name, metavar="SOURCE", help="Hugging Face folder, or GGUF file")
    out_help = "the file to write; with several codecs the folder"
    parser.add_argument("-o", "--out", type=path_name, metavar="OUT.trit", help=out_help)
    quant_help = f"one of {codecs}; or several codecs with commas between them, for one file each"
    quant = parser.add_mutually_exclusive_group(required=True)
    quant.add_argument("--quant", type=quants, metavar="CODEC", help=quant_help)
    recover_help = "the same as --quant keep: NF4 stays NF4, and matrices of dequantised trits become trits again"
    quant.add_argument("--recover", dest="quant", action="store_const", const=[KEEP], help=recover_help)
    parser.add_argument("--bpw", type=float, metavar="F", help=f"with {MIXED}: bits per weight, at most")
    embed_help = "for embeddings and lm_head (default f16; with --quant keep: keep)"
    parser.add_argument("--embed", choices=(*PLAIN, KEEP), metavar="CODEC", help=embed_help)
    encoder_help = "how trits are found: as tritllm v2 does (default), or the best of units fitted to each matrix"
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--encoder", choices=tuple(ENCODERS), default="v2", help=encoder_help)
    calibrate_help = "quantise for what the matrices do with this text (UTF-8; give it again for more texts)"
    how.add_argument("--calibrate", type=path_name, action="append", metavar="TEXT", help=calibrate_help)
    tokens_help = f"with --calibrate: use at most so many tokens of it ({TOKENS})"
    parser.add_argument("--calibrate-tokens", type=positive, default=TOKENS, metavar="N", help=tokens_help)
    state_help = "with --calibrate: where an interrupted run goes on from (default OUT.trit.state)"
    parser.add_argument("--state", type=path_name, metavar="FOLDER", help=state_help)
    kv_map_help = "a JSON file that names the tensors of learned KV modules (see README.md)"
    parser.add_argument("--kv-map", type=path_name, metavar="MAP.json", help=kv_map_help)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.trit if it is there")
    report_help = "write what became of every tensor, and its error"
    parser.add_argument("--report", type=path_name, metavar="OUT.json", help=report_help)
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")


def quants(text: str) -> list[str]:
    """Read one codec, or several plain ones with commas between them, for argparse."""
    names = text.split(",")
    allowed = QUANTS if len(names) == 1 else PLAIN
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a codec twice")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m tools.convert", description=HELP)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("the following arguments are required: -o/--out")
    if (args.bpw is None) == (args.quant == [MIXED]):
        parser.error(f"--quant {MIXED} goes with --bpw, and nothing else does")
    if args.calibrate and (len(args.quant) > 1 or args.quant[0] not in CALIBRATED):
        parser.error(f"--calibrate goes with one codec of {', '.join(CALIBRATED)}")
    if not args.calibrate and (args.state or args.calibrate_tokens != TOKENS):
        parser.error("--state and --calibrate-tokens go with --calibrate")
    if args.encoder != "v2" and not {*args.quant, args.embed} & {*TRITS, MIXED}:
        parser.error(f"--encoder finds trits: it goes with --quant or --embed of {', '.join((*TRITS, MIXED))}")
    texts = [read_text(path) for path in args.calibrate or ()]
    started = time.perf_counter()
    source = open_source(args.source, args.kv_map)
    check_runs(source)
    out, several = Path("OUT.trit" if args.out is None else args.out), len(args.quant) > 1
    paths = several_paths(source, out, args.quant) if several else {args.quant[0]: out}
    if args.report is not None:
        check_report(Path(args.report), [*paths.values(), *source.files], args.overwrite)
    encoder, codecs = fast_encoder(name=args.encoder), None
    record = "" if args.encoder == "v2" else f"--encoder {args.encoder}"
    state: StateFolder | None = None
    with encoder as encode, _folder(out, several and not args.dry_run):
        if args.calibrate and not args.dry_run:
            source, codecs, record, state = calibrated(source, out, args, texts, encode)
        with Bar("convert") as bar:
            summaries = convert_several(
                source, paths, args.embed, args.overwrite, args.dry_run, bar, encode, args.bpw,
                args.report is not None, codecs, record,
            )  # fmt: skip
    if state:
        state.clear()
    for note in dict.fromkeys(note for summary in summaries for note in summary.notes):
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run and args.calibrate and args.bpw is not None:
        print("note: the depths come from what the text does, once it is read: they may differ", file=sys.stderr)
    for summary in summaries:
        if args.dry_run:
            print_plan(summary)
            print_memory(summary, source)
        else:
            print_summary(summary, time.perf_counter() - started)
    if args.report is not None:
        reports = [report_of(summary) for summary in summaries]
        write_report(Path(args.report), reports if several else reports[0])
    return 0


def calibrated(
    source: Source, out: Path, args: argparse.Namespace, texts: Sequence[str], encode: Encode
) -> tuple[Source, dict[str, str], str, StateFolder]:
    """Quantise the layers for what they do with `texts`, those of --calibrate.

    returns: the source with its matrices quantised, their codecs, what the header should say about it, and the folder
    that the matrices are in
    """
    from runtime.calibration.effects import choose_depths
    from runtime.calibration.run import Calibration
    from runtime.calibration.windows import cut_windows

    tokenizer = make_tokenizer(source.tokenizer, source.blobs.__getitem__, str(source.path))
    windows = cut_windows(tokenizer, texts, args.calibrate_tokens)
    kernels, threads = get_kernels("auto", int8=False), ThreadPoolExecutor(usable_cores(), "calibrate")
    with closing(kernels), threads as pool:
        codecs = None
        if args.bpw is not None:
            with Bar("measure", unit="step", lines=True) as bar:
                depths = choose_depths(source, windows, args.bpw, kernels, encode, bar)
            codecs = {name: f"trit{depth}" for name, depth in depths.items()}
        summary = convert_several(source, {args.quant[0]: out}, args.embed, dry_run=True, bpw=args.bpw, codecs=codecs)[
            0
        ]
        check_outputs(source, [summary], args.overwrite)
        codecs = {item.name: item.codec for item in summary.plan if item.is_matrix}
        print_codecs(codecs, summary.matrix_bpw)
        with Bar("calibrate", unit="step", lines=True) as bar:
            folder = Path(args.state or f"{out}.state")
            with naming(folder, "the layers that are done are kept: make room and repeat the command"):
                work = Calibration(source, windows, codecs, folder, kernels, pool, bar)
                found = work.run()
    record = " ".join(f"--calibrate {Path(path).name}" for path in args.calibrate)
    return found, codecs, f"{record} --calibrate-tokens {windows.size}", work.state


def check_report(path: Path, others: Sequence[Path], overwrite: bool) -> None:
    """Refuse a place where the report cannot go, before any work. Raises UserError."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no such folder for the report")
    if any(path.resolve() == other.resolve() for other in others):
        raise UserError(f"{path}: is a file of the conversion itself; name another one for the report")
    if path.exists() and not (path.is_file() and overwrite):
        raise UserError(f"{path}: exists already" + (" (--overwrite replaces it)" if path.is_file() else ""))


def write_report(path: Path, report: object) -> None:
    """Write JSON that appears whole or not at all. Raises OSError that names the file."""
    with unfinished(path) as temporary:
        Path(temporary).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def check_runs(source: Source) -> None:
    """Refuse what the runtime would refuse in the file: configuration, recommended sampling, tokenizer.

    Raises ConfigError, SourceError.
    """
    path = str(source.path)
    ModelConfig.from_dict(source.config, path)
    try:
        defaults_of_file(source.generation, path)
        make_tokenizer(source.tokenizer, source.blobs.__getitem__, path, source.config["vocab_size"])
    except FormatError as exc:
        raise SourceError(path, f"cannot be run: {exc.message.partition('; convert')[0]}", exc.tensor) from exc


@contextmanager
def _folder(path: Path, wanted: bool) -> Iterator[None]:
    """Make the folder for several files, and take it away again if they do not come to be."""
    if not wanted or path.is_dir():
        yield
        return
    if path.exists():
        raise UserError(f"{path}: is a file; several codecs need a folder")
    path.mkdir()
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def print_plan(summary: Summary) -> None:
    """Print a line for each kind of tensor, then the sum."""
    items = []
    for item in summary.plan:
        dtype = item.source.dtype if item.source else "-"
        items.append((item.name, (dtype, item.codec, " x ".join(map(str, item.shape))), item.nbytes))
    rows = [(name, count, dtype, codec, shape, f"{n:,}") for name, count, (dtype, codec, shape), n in by_kind(items)]
    print("\n".join(table([("tensor", "count", "from", "to", "shape", "bytes"), *rows], (1, 5))))
    print(
        f"total {len(summary.plan)} tensors, {summary.nbytes:,} bytes, {summary.bpw:.2f} bits per weight, "
        f"{summary.matrix_bpw:.2f} in the layers' matrices"
    )


def print_codecs(codecs: Mapping[str, str], bpw: float) -> None:
    """Say on stderr which matrices get which codec."""
    print(f"plan: {bpw:.2f} bits per weight in the layers' matrices", file=sys.stderr)
    for codec, count in sorted(Counter(codecs.values()).items()):
        roles = Counter(name.rsplit(".", 1)[-1] for name, found in codecs.items() if found == codec)
        which = ", ".join(f"{n} {role}" for role, n in sorted(roles.items()))
        print(f"  {count} matrices in {codec}: {which}", file=sys.stderr)


def print_memory(summary: Summary, source: Source) -> None:
    """Print what running the model will take: its weights, and keys and values of contexts that it can have."""
    config = ModelConfig.from_dict(source.config, str(source.path))
    weights = sum(item.nbytes for item in summary.plan if item.source)
    per_token = kv_bytes_per_token(config, modules=source.kv_modules)
    contexts = sorted({min(n, config.max_seq_len) for n in CONTEXTS})
    totals = ", ".join(f"{(weights + per_token * n) / 1e9:.2f} GB with {n} tokens" for n in contexts)
    print(f"memory to run: {weights / 1e9:.2f} GB of weights; {totals} of context (keys and values in f16)")


def print_summary(summary: Summary, seconds: float) -> None:
    """Say on stderr what was written."""
    for codec, row in summary.by_codec().items():
        print(
            f"  {codec:6} {row['tensors']:5} tensors {row['bytes'] / 1e6:10.1f} MB {row['bpw']:6.2f} bpw",
            file=sys.stderr,
        )
    size = summary.path.stat().st_size
    print(
        f"{summary.path}: {len(summary.plan)} tensors, {size / 1e6:.1f} MB, {summary.bpw:.2f} bits per weight "
        f"({summary.matrix_bpw:.2f} in the layers' matrices), {seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())

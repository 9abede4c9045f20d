"""python -m tools.inspect: show what is in a .trit file, verify it, or print its chat template."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from formats import open_trit
from formats.container import TritFile
from formats.kv_modules import KVModule, describe_modules, read_kv_modules
from runtime.budget import BY_QUALITY
from runtime.budget import plans as plan_memory
from runtime.cli import ArgumentParser, UserError, one_line, run
from runtime.config import ModelConfig
from runtime.messages.recognise import recognise
from runtime.options import DEFAULT_N_BATCH
from runtime.progress import Bar
from runtime.sizes import kv_bytes_per_token, weight_bytes
from tools.arguments import require_matplotlib
from tools.layers_plot import draw_layers, read_errors
from tools.tables import by_kind, table

CONTEXTS = (8192, 32768, 131072)
SHORT_TEXT = 200
SHORT_HASH = 16  # digits; --json has all of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    parser.add_argument("model", metavar="FILE.trit", help="the file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not one line per kind")
    parser.add_argument("--verify", action="store_true", help="read and check everything; exit code 2 on damage")
    parser.add_argument("--plot", metavar="OUT.png", help="draw bits per weight by layer, and errors with --report")
    parser.add_argument("--report", metavar="FILE.json", help="what tools.convert --report wrote of this file, to draw")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--template", action="store_true", help="print the chat template and nothing else")


def codec_totals(file: TritFile) -> dict[str, dict[str, Any]]:
    """Sum up the model's tensors by codec; the tokenizer's byte tensors have no weights."""
    totals: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        entry = totals.setdefault(tensor.codec, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += 0 if tensor.name.startswith("tokenizer.") else math.prod(tensor.shape)
        entry["bytes"] += tensor.nbytes
    for entry in totals.values():
        entry["bpw"] = 8 * entry["bytes"] / entry["weights"] if entry["weights"] else None
    return totals


def memory(file: TritFile) -> dict[str, Any]:
    """Tell what running the model takes, in bytes, with f16 and, under "kv", each codec of the cache."""
    config = ModelConfig.from_dict(file.config, file.path)
    modules, length = read_kv_modules(file), config.max_seq_len
    plans = plan_memory(file, config, length, DEFAULT_N_BATCH, BY_QUALITY, modules)
    contexts = sorted({min(n, length) for n in CONTEXTS})
    by_context = {n: plan_memory(file, config, n, DEFAULT_N_BATCH, BY_QUALITY, modules) for n in contexts}
    kv = {
        codec: {
            "bytes_per_token": kv_bytes_per_token(config, codec, modules),
            "total_full_context": memory.total,
            "totals": {str(n): found[codec].total for n, found in by_context.items()},
        }
        for codec, memory in plans.items()
    }
    weights, per_token = weight_bytes(file), kv_bytes_per_token(config, modules=modules)
    return {
        "weights": weights, "scratch": plans["f16"].scratch, "kv_bytes_per_token": per_token,
        "kv_full_context": per_token * length, "total_full_context": weights + per_token * length, "kv": kv,
    }  # fmt: skip


def about_tokenizer(file: TritFile) -> dict[str, Any]:
    """Give the tokenizer's entry without its tables."""
    known = {key: file.tokenizer.get(key) for key in ("type", "bos_id", "eos_ids", "add_bos")}
    data = sum(t.nbytes for t in file.tensors.values() if t.name.startswith("tokenizer."))
    special = file.tokenizer.get("special")
    return known | {"special": len(special) if isinstance(special, dict) else 0, "bytes": data}


def section(file: TritFile, name: str) -> dict[str, Any]:
    """Give a section of the header that may be missing; the reader has seen to it that it is an object."""
    found: dict[str, Any] = file.header.get(name, {})
    return found


def template_of(file: TritFile) -> str:
    """Give the chat template, or nothing where there is none."""
    template = section(file, "chat").get("template")
    return template if isinstance(template, str) else ""


def about_chat(file: TritFile) -> dict[str, Any]:
    """Give the chat format, as the file says or as its template shows, and the template's length."""
    chat = section(file, "chat")
    template = template_of(file)
    known = chat if chat.get("format") else recognise(template)
    return {"format": known.get("format"), "system": known.get("system"), "template_chars": len(template)}


def describe(file: TritFile) -> dict[str, Any]:
    """Give the object that --json prints."""
    return {
        "file": file.path, "bytes": file.size, "fingerprint": file.fingerprint,
        "config": file.config, "tokenizer": about_tokenizer(file), "chat": about_chat(file),
        "generation": section(file, "generation"), "licence": section(file, "licence"),
        "source": section(file, "source"),
        "codecs": codec_totals(file), "memory": memory(file),
        "kv_modules": [module.to_dict() for module in read_kv_modules(file)],
        "tensors": [
            {"name": t.name, "codec": t.codec, "shape": list(t.shape), "nbytes": t.nbytes,
             "params": dict(t.params)}
            for t in file.tensors.values()
        ],
    }  # fmt: skip


def kinds(file: TritFile, every: bool = False) -> list[tuple[str, int, str, str, int]]:
    """Group tensors that differ only in their layer, unless `every`: (name, count, codec, shape, bytes)."""
    tensors = [(t.name, (t.codec, " x ".join(map(str, t.shape))), t.nbytes) for t in file.tensors.values()]
    rows = [(name, 1, details, nbytes) for name, details, nbytes in tensors] if every else by_kind(tensors)
    return [(name, count, codec, shape, nbytes) for name, count, (codec, shape), nbytes in rows]


def size(n: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if n < 100 or unit == "B" else f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def fact(name: str, value: object) -> str:
    """Write one line of facts: text from the file must neither drive the terminal nor flood it."""
    text = one_line(str(value))
    return f"{name:<12} {text if len(text) <= SHORT_TEXT else text[:SHORT_TEXT] + ' ...'}"


def facts(found: dict[str, Any]) -> list[str]:
    """Write the lines above the tables."""
    c, tokenizer, chat, source = found["config"], found["tokenizer"], found["chat"], found["source"]
    rope = c["rope_scaling"]["type"] if c.get("rope_scaling") else "none"
    lines = [
        fact("file", f"{found['file']}  {size(found['bytes'])}  fingerprint {found['fingerprint'][:SHORT_HASH]}"),
        fact("model", f"{c['architecture']}, {c['n_layers']} layers, dim {c['dim']}, "
                      f"hidden {c['hidden_dim']}, {c['n_heads']}/{c['n_kv_heads']} heads of {c['head_dim']}, "
                      f"vocabulary {c['vocab_size']}"),
        fact("context", f"{c['max_seq_len']} tokens, rope theta {c['rope_theta']:g}, scaling {rope}"),
        fact("tokenizer", f"{tokenizer['type']}, bos {tokenizer['bos_id']}, end {tokenizer['eos_ids']}"),
        fact("chat", f"format {chat['format']}, template of {chat['template_chars']} characters"),
        *(fact("kv modules", line) for line in describe_modules(KVModule(**entry) for entry in found["kv_modules"])),
        fact("licence", found["licence"].get("name")),
        fact("source", f"{source.get('name')}, {source.get('converter')}, {source.get('options')}"),
    ]  # fmt: skip
    files = source.get("files")
    for entry in files if isinstance(files, list) else []:
        if not isinstance(entry, dict):
            continue
        name, n, digest = entry.get("name"), entry.get("bytes"), entry.get("sha256")
        lines.append(fact("", f"{name}  {n} bytes  sha256 {str(digest)[:SHORT_HASH]}"))
    return lines


def show(found: dict[str, Any], rows: Sequence[tuple[str, int, str, str, int]]) -> None:
    """Print a file for people."""
    print("\n".join(facts(found)), end="\n\n")
    heads: list[Sequence[object]] = [("codec", "tensors", "weights", "bytes", "bits/weight")]
    for name, entry in found["codecs"].items():
        bpw = "-" if entry["bpw"] is None else f"{entry['bpw']:.2f}"
        heads.append((name, entry["tensors"], entry["weights"], size(entry["bytes"]), bpw))
    print("\n".join(table(heads, (1, 2, 3, 4))), end="\n\n")
    lines: list[Sequence[object]] = [("tensor", "count", "codec", "shape", "bytes", "bits/weight")]
    for name, count, codec, shape, n in rows:
        weights = count * math.prod(map(int, shape.split(" x ")))
        lines.append((name, count, codec, shape, size(n), "-" if codec == "u8" else f"{8 * n / weights:.2f}"))
    print("\n".join(table(lines, (1, 4, 5))), end="\n\n")
    memory = found["memory"]
    print(fact("memory", f"weights {size(memory['weights'])}, scratch {size(memory['scratch'])}; with a cache:"))
    contexts = next(iter(memory["kv"].values()))["totals"]
    caches: list[Sequence[object]] = [("codec", "a token", *(f"all with {n} tokens" for n in contexts))]
    caches += [
        (codec, f"{m['bytes_per_token']} B", *map(size, m["totals"].values())) for codec, m in memory["kv"].items()
    ]
    print("\n".join(table(caches, range(1, 2 + len(contexts)))))


def verify(file: TritFile) -> None:
    """Check every byte of a file. Raises UserError naming the first problem and how many there are."""
    with Bar("verify") as bar:
        problems = list(file.problems(bar))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, open the file, print."""
    parser = ArgumentParser(prog="python -m tools.inspect", description="Show or verify what is in a .trit file.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.report is not None and not args.plot:
        parser.error("--report goes with --plot")
    if args.plot:
        require_matplotlib()
    with open_trit(args.model) as file:
        if args.template:
            template = template_of(file)
            if not template:
                raise UserError(f"{args.model}: the file has no chat template")
            print("\n".join(one_line_keeping_spaces(line) for line in template.split("\n")))
            return 0
        if args.plot:
            draw_layers(file, args.plot, None if args.report is None else read_errors(args.report, file))
        if args.verify:
            verify(file)
        found = describe(file)
        if args.json:
            print(json.dumps(found | ({"verified": True} if args.verify else {})))
        elif args.verify:
            print(f"{args.model}: {len(file.tensors)} tensors, {found['bytes']} bytes, no damage found")
        elif args.tensors:
            show(found, kinds(file, every=True))
        else:
            show(found, kinds(file))
    return 0


def one_line_keeping_spaces(line: str) -> str:
    """Make control characters visible and leave the rest as it is."""
    return "\t".join(one_line(part) if not part.isprintable() else part for part in line.split("\t"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())

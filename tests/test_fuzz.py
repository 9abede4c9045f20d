"""Structure-aware fuzzing: whatever a file holds, it is refused in one line that names it, or it runs alike everywhere.

One seed is one case. `pytest -m slow -s tests/test_fuzz.py` tries many more and tells the most memory and time that
one of them took; TRITLLAMA_FUZZ_SEED moves them to seeds that were not tried before.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.conversion.convert import convert
from formats.errors import FormatError
from formats.sources.source import open_source
from runtime import Llama
from runtime.errors import CacheError, ConfigError, LogitsError
from runtime.messages.chat_pieces import ChatFormatError
from runtime.ring.state import MAGIC
from runtime.tokenizer import TokenizerError
from tests import tiny
from tests.checkpoints import LLAMA3, write_gguf, write_hf
from tests.mutations import Mutator, TritParts, gguf_fields, mutated_gguf, mutated_safetensors
from tests.native_library import ensure_native_library
from tests.test_kv_modules import module_weights, modules_of, write
from tools import convert as convert_tool
from tools import inspect as inspect_tool

FEW = {"trit": 150, "folder": 80, "gguf": 80, "state": 200}
MANY = {"trit": 3_500, "folder": 1_200, "gguf": 1_200, "state": 3_500}
FIRST = int(os.environ.get("TRITLLAMA_FUZZ_SEED", "1000000"))
MOST_MEMORY = 64 << 20
HANG = 60  # seconds of CPU time, after which a case counts as one that never ends
# Largest difference of logits in shares of the largest: float32 sums in another order, int8 rounded elsewhere
BOUNDS = {"f32": 2e-3, "int8": 5e-2}
TEXT = "Hello, wor1d!  \n\n don't <|eot_id|> é\U0001f600\0"
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals"),
    pytest.mark.filterwarnings("ignore"),
]
Case = Callable[[Mutator], str]


class Hang(BaseException):
    """A case that does not end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Case]:
    """What to do with a seed, by kind; each tells what became of it."""
    warm_up(folder)
    return {"trit": trit_case(folder), "folder": folder_case(folder), "gguf": gguf_case(folder),
            "state": state_case(folder)}  # fmt: skip


@pytest.mark.parametrize("kind", FEW)
def test_hostile_input(kind: str, cases: dict[str, Case]) -> None:
    outcomes, failures, _ = run(cases[kind], range(FEW[kind]))
    assert not failures, "\n".join(failures)
    assert min(outcomes["refused"], outcomes["runs"]) >= FEW[kind] // 20, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_much_hostile_input(kind: str, cases: dict[str, Case]) -> None:
    outcomes, failures, most = run(cases[kind], range(FIRST, FIRST + MANY[kind]))
    print(f"\n{kind}: {MANY[kind]} cases, {dict(outcomes)}, at most {most[0] / 1e6:.1f} MB and {most[1]:.2f} s each")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])
    assert most[0] < MOST_MEMORY


def run(case: Case, seeds: range) -> tuple[Counter[str], list[str], tuple[int, float]]:
    """Try the seeds. returns: how often what happened, what must not, the most bytes and CPU seconds of a case"""
    outcomes: Counter[str] = Counter()
    failures, most, slowest = [], 0, 0.0
    for seed in seeds:
        m = Mutator(seed)
        before, started = resident(reset=True), time.process_time()
        try:
            with time_limit(), np.errstate(all="ignore"):
                outcomes[case(m)] += 1
        except (Exception, Hang) as e:
            failures.append(f"seed {seed}: {type(e).__name__}: {e!s:.300} after {m.log}")
        if seed > seeds[0]:  # the first loads libraries
            most, slowest = max(most, resident() - before), max(slowest, time.process_time() - started)
    return outcomes, failures, (most, slowest)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no end after {HANG} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def resident(reset: bool = False) -> int:
    """Bytes of memory now (after `reset`), or the most since then; 0 where Linux does not say."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0]) * 1024
    return 0


def warm_up(folder: Path) -> None:
    """Load every kernel, so that no case pays for its compilation."""
    ensure_native_library()
    for codec in set(CODECS) - {"u8"}:
        path = tiny.write_trit(folder / f"warm-{codec}.trit", codec=codec)
        assert all(model_outcome(path, activations) == "runs" for activations in BOUNDS)


# ======== .trit


def trit_case(folder: Path) -> Case:
    """Models of several codecs, one with projections of keys and values."""
    bases = []
    for quant, changes in (("trit3", {}), ("nf4", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}})):
        write_hf(folder / f"of-{quant}", changes)
        bases.append(convert(open_source(folder / f"of-{quant}"), folder / f"{quant}.trit", quant).path)
    modules = modules_of({"rank": 6}, "before")
    bases.append(write(folder / "modules.trit", modules, module_weights(modules)))
    data = [Path(path).read_bytes() for path in bases]
    path = folder / "case.trit"

    def case(m: Mutator) -> str:
        path.write_bytes(TritParts(m.random.choice(data)).mutated(m))
        outcome = model_outcome(path, m.random.choice(list(BOUNDS)))
        check_command(lambda: inspect_tool.main([str(path), "--verify", "--json"]), path, m)
        return outcome

    return case


def model_outcome(path: Path, activations: str) -> str:
    """Load a file on every backend: all refuse it with the same words, or all give the same logits."""
    found = {backend: logits_or_refusal(path, backend, activations) for backend in ("numpy", "numba", "native")}
    expected = found["numpy"]
    for backend, other in found.items():
        if isinstance(expected, str) or isinstance(other, str):
            assert str(expected) == str(other), f"{backend}: {other!s:.200}; numpy: {expected!s:.200}"
            continue
        finite = np.isfinite(expected) & np.isfinite(other)
        # Sums in another order may pass float32's largest number in one place and not in the other
        apart = np.where(np.isfinite(expected), expected, other)[np.isfinite(expected) != np.isfinite(other)]
        assert (np.abs(apart) > 1e37).all(), f"{backend} is not finite elsewhere"
        size = np.abs(expected[finite]).max(initial=1e-6)
        off = np.abs(expected[finite] - other[finite]).max(initial=0) / size
        assert off <= BOUNDS[activations], f"{backend} is {off:.2g} away, {activations}"
    return "refused" if isinstance(expected, str) else "runs"


def logits_or_refusal(path: Path, backend: str, activations: str) -> np.ndarray | str:
    """Read a few ids, and with the compiled kernels a text; returns logits, or why the file cannot be loaded."""
    try:
        llm = Llama(path, backend=backend, activations=activations, n_ctx=32, n_threads=1)
    except (FormatError, ConfigError) as e:
        return refusal(e, path)
    with llm:
        if backend == "numba":
            read_text(llm)
        return llm.logits([i % llm.config.vocab_size for i in range(8)]).astype(np.float64)


def refusal(error: Exception, path: Path) -> str:
    """Give an error's text, after a look at its form."""
    text = str(error)
    assert str(path) in text and "\n" not in text and len(text) < 1000 + len(str(path)), f"{error!r:.400}"
    return f"{type(error).__name__}: {text}"


def read_text(llm: Llama) -> None:
    """Tokenise and answer, unless the file has no tokenizer, no chat format, or scores that are no numbers."""
    with contextlib.suppress(TokenizerError):
        for special in (False, True):
            ids = llm.tokenize(TEXT, special=special)
            assert all(0 <= i < llm.config.vocab_size for i in ids)
            llm.detokenize(ids, special=special)
    with contextlib.suppress(TokenizerError, ChatFormatError, LogitsError):
        llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=2, seed=1)


def check_command(main: Callable[[], int], path: Path, m: Mutator) -> tuple[int, str]:
    """Run a command: it ends well, or with 2 and one line about the file. returns: its code and what it said"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    said = err.getvalue()
    assert code in (0, 2), f"code {code}: {said[-300:]}"
    if code == 2 and "error: " in said:
        line = said[said.index("error: ") :]
        assert line.count("\n") == 1 and str(path) in line and len(line) < 1000 + 2 * len(str(path)), line
        assert line.rstrip("\n").isprintable(), line
    return code, said


# ======== sources


def converted(source: Path, m: Mutator) -> str:
    """Convert and run what came out; a refusal leaves nothing behind."""
    out = source.parent / "out" / "made.trit"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    quant = m.random.choice(("f16", "keep", "trit3", "nf4"))
    code, _ = check_command(lambda: convert_tool.main([str(source), "-o", str(out), "--quant", quant]), source, m)
    if code:
        assert not list(out.parent.iterdir())
        return "refused"
    assert model_outcome(out, "f32") == "runs"
    return "runs"


def folder_case(folder: Path) -> Case:
    """A checkpoint in two shards, one in a single file, and one packed by bitsandbytes."""
    bases = [folder / "shards", folder / "single", tiny.fixture_folder("tiny-llama-tied-nf4")]
    write_hf(bases[0], {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, shards=2)
    write_hf(bases[1], dtype="bfloat16")
    target = folder / "source"

    def case(m: Mutator) -> str:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(m.random.choice(bases), target, copy_function=shutil.copyfile)
        files = sorted(target.iterdir())
        for path in m.random.sample(files, m.random.choice((1, 1, 2))):
            spoil(path, m)
        return converted(target, m)

    return case


def spoil(path: Path, m: Mutator) -> None:
    """Change one file of a checkpoint, whatever it is."""
    m.note(path.name)
    data = path.read_bytes()
    kind = m.random.choice(("tree", "tree", "tree", "text", "raw", "cut", "gone"))
    if kind == "gone":
        path.unlink()
        if m.random.random() < 0.5:
            path.mkdir()
    elif path.suffix == ".safetensors":
        path.write_bytes(mutated_safetensors(data, m))
    elif kind == "tree" and path.suffix == ".json":
        path.write_text(json.dumps(m.tree(json.loads(data))))
    elif kind == "text":
        path.write_bytes(m.text(data))
    else:
        path.write_bytes((m.raw if kind == "raw" else m.cut)(data) if data else b"x")


def gguf_case(folder: Path) -> Case:
    bases = []
    for kind in ("F32", "Q8_0"):
        write_gguf(folder / f"{kind}.gguf", kind=kind)
        data = (folder / f"{kind}.gguf").read_bytes()
        bases.append((data, gguf_fields(data)))
    path = folder / "case.gguf"

    def case(m: Mutator) -> str:
        path.write_bytes(mutated_gguf(*m.random.choice(bases), m))
        return converted(path, m)

    return case


# ======== saved states


def state_case(folder: Path) -> Case:
    """A context that keeps its contents when it refuses a state, and goes on when it takes one."""
    llm = Llama(tiny.write_trit(folder / "state.trit"), backend="numba", n_ctx=24, n_batch=8, activations="f32")
    llm.create_completion(list(range(40, 60)), max_tokens=20, seed=1, temperature=0)
    full = llm.save_state()
    llm.create_completion([1, 2, 3], max_tokens=2, seed=1)
    before = llm.save_state()
    path = folder / "case.session"

    def case(m: Mutator) -> str:
        llm.load_state(before)
        path.write_bytes(mutated_state(m.random.choice((full, before)), m))
        try:
            llm.load_session(path, lambda conversation: None)
        except CacheError as e:
            refusal(e, path)
            assert llm.save_state() == before
            return "refused"
        with contextlib.suppress(LogitsError):
            llm.create_completion([*range(40, 44)], max_tokens=3, seed=1)
        return "runs"

    return case


def mutated_state(data: bytes, m: Mutator) -> bytes:
    """Change header, ids, geometry, arrays or length of a saved state; its checksums are right but for the last."""
    length = struct.unpack_from("<I", data, 12)[0]
    ring_at = data.index(MAGIC)
    arrays_at = data.index(b"\n", ring_at + 8) + 1
    header, ids = data[16 : 16 + length], data[16 + length : ring_at - 4]
    geometry, arrays = data[ring_at + 8 : arrays_at - 1], data[arrays_at:-4]
    kind = m.random.choice(("header", "ids", "geometry", "geometry", "arrays", "arrays", "text", "file"))
    m.note(kind)
    if kind == "header":
        header = json.dumps(m.tree(json.loads(header))).encode()
    elif kind == "ids":
        ids = m.raw(ids)
    elif kind == "geometry":
        geometry = json.dumps(m.tree(json.loads(geometry))).encode()
    elif kind == "arrays":
        arrays = m.raw(arrays)
    elif kind == "text":
        geometry = m.text(geometry).replace(b"\n", b" ")
    head = data[:12] + struct.pack("<I", len(header)) + header + ids
    ring = MAGIC + geometry + b"\n" + arrays
    made = b"".join(part + struct.pack("<I", zlib.crc32(part)) for part in (head, ring))
    return m.cut(made) if kind == "file" else made

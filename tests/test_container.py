"""The container: what the writer writes, the reader reads; nothing half-written ever has the final name."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import formats
from formats import CODECS, ChecksumError, HeaderError, TensorError, TritWriter, dequantize, open_trit
from formats.container import dequantize_rows
from tests.trit_bytes import write_all_codecs

NORM = np.array([1, -2], np.float32)


def write_norm(path: Path, metadata=None, **options) -> Path:
    metadata = {"config": {"dim": 2}} if metadata is None else metadata
    with TritWriter(path, metadata, ["norm"], **options) as writer:
        add_norm(writer)
    return path


def add_norm(writer: TritWriter) -> None:
    writer.add("norm", "f32", (2,), {}, {"values": NORM})


# ======== writing and reading


def test_every_codec_comes_back(tmp_path):
    values = write_all_codecs(tmp_path / "m.trit")
    with open_trit(tmp_path / "m.trit") as file:
        assert list(file.tensors) == list(values)
        assert file.config == {"dim": 20} and file.tokenizer == {}
        assert file.header["extra"] == [1, 2.5, None, "é"]
        for name, w in values.items():
            tensor = file.tensors[name]
            codec = CODECS[tensor.codec]
            params, parts = codec.quantize(w)
            assert (tensor.name, tensor.shape, dict(tensor.params)) == (name, w.shape, params)
            expected = codec.dequantize(parts, w.shape, params)
            assert dequantize(tensor).tobytes() == expected.tobytes()
            assert dequantize_rows(tensor, np.array([2, 0])).tobytes() == expected[[2, 0]].tobytes()
        assert file.blob("a.u8") == "tokenizer Ā".encode()
        file.verify()
        assert list(file.problems()) == []


def test_blob_is_particular(tmp_path):
    write_all_codecs(tmp_path / "m.trit")
    with open_trit(tmp_path / "m.trit") as file:
        with pytest.raises(TensorError, match=r"tensor tokenizer\.model: is missing"):
            file.blob("tokenizer.model")
        with pytest.raises(TensorError, match="has codec f16; expected u8"):
            file.blob("a.f16")


def test_the_example_in_the_specification(tmp_path):
    """A whole file as literal bytes, both ways, and the specification's own copy of them."""
    text = (Path(formats.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
    dump = re.search(r"```hexdump\n(.*?)```", text, re.S).group(1)
    expected = undump(dump)
    assert write_norm(tmp_path / "m.trit").read_bytes() == expected
    (tmp_path / "copy.trit").write_bytes(expected)
    with open_trit(tmp_path / "copy.trit") as file:
        assert dequantize(file.tensors["norm"]).tolist() == [1, -2]
        file.verify()
    assert expected[:16].hex() == "54524954010000006c01000000000000"
    assert expected[384:].hex() == "0000803f000000c0" + "00" * 56


def undump(dump: str) -> bytes:
    """Read the output of `hexdump -C`, where * repeats the line above up to the next offset."""
    data, repeat = b"", False
    for line in dump.splitlines():
        if line == "*":
            repeat = True
            continue
        offset, _, rest = line.partition("  ")
        while repeat and len(data) < int(offset, 16):
            data += data[-16:]
        repeat = False
        data += bytes.fromhex(rest.partition("|")[0])
    return data


def test_same_input_same_bytes(tmp_path):
    write_all_codecs(tmp_path / "a.trit")
    write_all_codecs(tmp_path / "b.trit")
    assert (tmp_path / "a.trit").read_bytes() == (tmp_path / "b.trit").read_bytes()
    # The order in which metadata was put together does not matter either.
    write_norm(tmp_path / "c.trit", {"config": {"a": 1, "b": 2}, "chat": {}})
    write_norm(tmp_path / "d.trit", {"chat": {}, "config": {"b": 2, "a": 1}})
    assert (tmp_path / "c.trit").read_bytes() == (tmp_path / "d.trit").read_bytes()


def test_parts_are_aligned_read_only_views(tmp_path):
    write_all_codecs(tmp_path / "m.trit")
    with open_trit(tmp_path / "m.trit") as file:
        for tensor in file.tensors.values():
            assert tensor.offset % 64 == 0
            for part in tensor.parts.values():
                assert part.ctypes.data % 64 == 0 and part.flags.c_contiguous
                assert not part.flags.owndata and not part.flags.writeable
                with pytest.raises(ValueError, match="read-only"):
                    part[...] = 0
        with pytest.raises(AttributeError):
            tensor.name = "other"
        with pytest.raises(TypeError):
            tensor.params["dtype"] = "float16"
        del tensor, part


def test_closing_with_and_without_live_views(tmp_path):
    file = open_trit(write_norm(tmp_path / "m.trit"))
    values = file.tensors["norm"].parts["values"]
    file.close()
    file.close()
    assert values.tolist() == [1, -2]
    with pytest.raises(ValueError, match=r"m\.trit is closed"):
        _ = file.tensors


def test_fingerprint_tells_files_apart(tmp_path):
    write_norm(tmp_path / "a.trit")
    write_norm(tmp_path / "b.trit")
    with TritWriter(tmp_path / "c.trit", {"config": {"dim": 2}}, ["norm"]) as writer:
        writer.add("norm", "f32", (2,), {}, {"values": NORM + 1})
    prints = [open_trit(tmp_path / f"{x}.trit").fingerprint for x in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert re.fullmatch("[0-9a-f]{64}", prints[0])


def test_progress_reaches_the_end(tmp_path):
    write_all_codecs(tmp_path / "m.trit")
    seen: list[tuple[int, int]] = []
    with open_trit(tmp_path / "m.trit") as file:
        file.verify(lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1] == (file.size, file.size)
        assert len(seen) == len(file.tensors) + 1


def test_file_without_tensors(tmp_path):
    TritWriter(tmp_path / "m.trit", {}, []).close()
    with open_trit(tmp_path / "m.trit") as file:
        assert not file.tensors
        file.verify()


def test_an_open_file_survives_its_replacement(tmp_path):
    path = write_norm(tmp_path / "m.trit")
    with open_trit(path) as old:
        with TritWriter(path, {}, ["big"], overwrite=True) as writer:
            writer.add("big", "f32", (9,), {}, {"values": np.zeros(9, np.float32)})
        old.verify()
    with open_trit(path) as new:
        assert list(new.tensors) == ["big"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "m.trit")
    with pytest.raises(FileExistsError, match="device or a pipe"):
        TritWriter(tmp_path / "m.trit", {}, [], overwrite=True)
    assert (tmp_path / "m.trit").is_fifo() and len(list(tmp_path.iterdir())) == 1


# ======== the writer leaves a whole file or none


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_writer_leaves_nothing(tmp_path, error):
    with pytest.raises(error), TritWriter(tmp_path / "m.trit", {}, ["norm", "more"]) as writer:
        add_norm(writer)
        raise error
    assert os.listdir(tmp_path) == []


def test_forgotten_tensor_is_named_and_nothing_is_left(tmp_path):
    writer = TritWriter(tmp_path / "m.trit", {}, ["norm", "b", "c"])
    add_norm(writer)
    with pytest.raises(TensorError, match="announced but not written: b, c"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_norm(tmp_path / "m.trit")
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_no_file_under_the_name(tmp_path):
    code = (
        "import os, sys, numpy as np\n"
        "from formats import TritWriter\n"
        "w = TritWriter(sys.argv[1], {}, ['norm'])\n"
        "w.add('norm', 'f32', (2,), {}, {'values': np.zeros(2, np.float32)})\n"
        "os._exit(9)\n"
    )
    root = Path(formats.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.trit")], cwd=root, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "m.trit").exists()
    assert all(name.startswith(".tritllama-") and name.endswith(".tmp") for name in os.listdir(tmp_path))


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / "m.trit"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"exists already; .*--overwrite"):
        write_norm(path)
    assert path.read_text() == "precious"
    write_norm(path, overwrite=True)
    open_trit(path).close()
    assert os.listdir(tmp_path) == ["m.trit"]


def test_second_of_two_writers_does_not_replace_the_first(tmp_path):
    one, two = (TritWriter(tmp_path / "m.trit", {"source": {"name": n}}, []) for n in "12")
    one.close()
    with pytest.raises(FileExistsError):
        two.close()
    with open_trit(tmp_path / "m.trit") as file:
        assert file.header["source"] == {"name": "1"}
    assert os.listdir(tmp_path) == ["m.trit"]


def test_target_must_be_a_file_in_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_norm(tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no such folder to write to"):
        write_norm(tmp_path / "nowhere" / "m.trit")


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_mode_and_links_are_respected(tmp_path):
    old = os.umask(0o027)
    try:
        path = write_norm(tmp_path / "m.trit")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.trit"
    link.symlink_to("m.trit")
    write_norm(link, {"config": {"dim": 3}}, overwrite=True)
    assert link.is_symlink()
    with open_trit(path) as file:
        assert file.config == {"dim": 3}


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_norm(Path("m.trit"))
    open_trit("m.trit").close()


# ======== the writer holds to the reader's rules


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tensors": []}, "cannot be metadata"),
        ({"config": []}, "'config' is a list"),
        ({"config": {"eps": float("nan")}}, "cannot be written as JSON"),
        ({"config": {"eps": b"x"}}, "cannot be written as JSON"),
        ({"config": {1: 2, "1": 3}}, "cannot be written as JSON|stands twice"),
        ({"chat": {"template": "\ud800"}}, "cannot be written as JSON"),
        ({"source": {"n": 1 << 64}}, "does not fit 64 bits"),
        ({"x": "y" * (17 << 20)}, "the limit is 16777216"),
    ],
)
def test_metadata_that_could_not_be_read_back(tmp_path, metadata, message):
    with pytest.raises(HeaderError, match=message):
        TritWriter(tmp_path / "m.trit", metadata, [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names", [["a", "a"], [""], ["a\n"], ["../a"], ["x" * 257]])
def test_names_that_could_not_be_read_back(tmp_path, names):
    with pytest.raises(TensorError, match="name"):
        TritWriter(tmp_path / "m.trit", {}, names)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "codec", "shape", "params", "parts", "message"),
    [
        ("other", "f32", (2,), {}, {"values": NORM}, "not announced"),
        ("norm", "f31", (2,), {}, {"values": NORM}, "codec 'f31' is not known"),
        ("norm", "f32", (3,), {}, {"values": NORM}, r"is float32 \(2,\); expected float32 \(3,\)"),
        ("norm", "f16", (2,), {}, {"values": NORM}, "part values is float32"),
        ("norm", "f32", (2,), {}, {"value": NORM}, "has parts"),
        ("norm", "f32", (2,), {"x": 1}, {"values": NORM}, "'x' is not known"),
        ("norm", "q8", (2,), {}, {"values": NORM}, "takes 2 dimensions"),
        ("norm", "f32", (0,), {}, {"values": NORM[:0]}, "positive integers"),
    ],
)
def test_tensors_that_could_not_be_read_back(tmp_path, name, codec, shape, params, parts, message):
    with (
        pytest.raises(formats.FormatError, match=message),
        TritWriter(tmp_path / "m.trit", {}, ["norm"]) as writer,
    ):
        writer.add(name, codec, shape, params, parts)
    assert os.listdir(tmp_path) == []


def test_tensor_twice_and_writer_after_closing(tmp_path):
    writer = TritWriter(tmp_path / "m.trit", {}, ["norm"])
    add_norm(writer)
    with pytest.raises(TensorError, match="written already"):
        add_norm(writer)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        add_norm(writer)


def test_room_for_the_header_suffices(tmp_path):
    """The longest lines there can be: long names, all parameters, large numbers."""
    names = [("ä" * 250 + str(i)) for i in range(20)]
    with TritWriter(tmp_path / "m.trit", {}, names) as writer:
        for name in names:
            w = np.zeros((1000, 3), np.float32)
            params, parts = CODECS["nf4"].quantize(w, block=4096, dtype="bfloat16")
            writer.add(name, "nf4", w.shape, params, parts)
    with open_trit(tmp_path / "m.trit") as file:
        assert list(file.tensors) == names
        file.verify()
    longest = {
        "name": "", "codec": "trit4", "shape": [1 << 47, 1 << 47], "offset": 1 << 62, "nbytes": 1 << 62,
        "crc32": 1 << 32, "params": {"block": 4096, "nested_block": 256, "dtype": "bfloat16"},
    }  # fmt: skip
    assert len(json.dumps(longest)) < formats.writer._LINE_ROOM


def test_flipped_payload_bit_is_found_and_named(tmp_path):
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    good = path.read_bytes()
    with open_trit(path) as file:
        places = {name: t.offset + t.nbytes - 1 for name, t in file.tensors.items()}
    for name, place in places.items():
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with open_trit(path) as file:
            with pytest.raises(ChecksumError, match="crc32") as caught:
                file.verify()
            assert caught.value.tensor == name and caught.value.path == str(path)

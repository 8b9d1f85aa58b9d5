"""GGUF headers: what they claim is checked against the file before anything is read or allocated."""

from __future__ import annotations

import random
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_sft.weights import gguf as module
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from kt_sft.weights.gguf import GgufCheckpoint, read_gguf_header

from . import published
from .checkpoints import write

E, D, F = 2, 256, 256
LAYER = "model.layers.0.mlp.experts"


def weights() -> published.Weights:
    g = torch.Generator().manual_seed(0)
    return {LAYER: tuple(0.02 * torch.randn(E, D, F, generator=g) for _ in range(3))}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return published.write_gguf(tmp_path / "model.gguf", weights(), {"gate": "Q4_K", "up": "Q8_0", "down": "F16"})


def test_the_header_is_the_gguf_packages(file):
    entries, metadata = read_gguf_header(file)
    theirs = gguf.GGUFReader(file)
    assert {n: (e.dtype, e.shape, e.start, e.nbytes) for n, e in entries.items()} == {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }
    assert metadata["general.architecture"] == "qwen3moe" and metadata["tokenizer.ggml.tokens"] is None


def test_types_and_sizes_are_the_gguf_packages():
    ours = {name: (block, nbytes) for name, block, nbytes in module._TYPES.values()}
    assert {i: name for i, (name, _, _) in module._TYPES.items()} == {
        i: gguf.GGMLQuantizationType(i).name for i in module._TYPES
    }
    assert ours == {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in ours}


def header(*, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF", rest: bytes = b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


MANY = 1 << 60
MALFORMED = [
    (b"", "expected 4 more bytes"),
    (b"GG", "expected 4 more bytes"),
    (header(magic=b"PK\3\4"), "expected a GGUF file of version 2 or 3"),
    (header(version=1), "version 1"),
    (header(tensors=MANY), rf"{MANY} tensors and 0 keys: expected"),
    (header(keys=MANY), rf"0 tensors and {MANY} keys: expected"),
    (header(keys=1, rest=b"\0" * 8), "1 keys: expected 13 more bytes"),
    (header(keys=1, rest=struct.pack("<Q", MANY) + b"x" * 20), rf"length of name of a key \({MANY}\): expected"),
    (header(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 20), "name of a key: expected UTF-8"),
    (header(keys=1, rest=text("k") + struct.pack("<I", 99) + b"\0" * 8), "key 'k': expected a GGUF value type, got 99"),
    (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 4, MANY)), rf"elements of key 'k' \({MANY}\): expected"),
    (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, MANY)), rf"elements of key 'k' \({MANY}\): expected"),
    (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", MANY)), "length in key 'k'"),
    (header(keys=1, rest=text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "at depth 4"),
    (header(keys=2, rest=2 * (text("k") + struct.pack("<IB", 0, 1)) + b"\0" * 9), "key 'k': expected once"),
    (header(tensors=1, rest=tensor(shape=()) + b"\0" * 9), "expected 1 to 4 dimensions, got 0"),
    (header(tensors=1, rest=tensor(shape=(32,) * 5)), "expected 1 to 4 dimensions, got 5"),
    (header(tensors=1, rest=tensor(shape=(0,))), r"expected a shape, got \[0\]"),
    (header(tensors=1, rest=tensor(shape=(1 << 40, 1 << 40))), "expected a shape, got"),
    (header(tensors=1, rest=tensor(shape=(33,))), "Q8_0 expected rows of a multiple of 32"),
    (header(tensors=1, rest=tensor(kind=77)), "tensor 'a': expected a type of ggml, got 77"),
    (header(tensors=1, rest=tensor(offset=7) + b"\0" * 99), "an offset from 0, a multiple of 32, got 7"),
    (header(tensors=1, rest=tensor(offset=MANY) + b"\0" * 99), "expected data up to byte"),
    (header(tensors=1, rest=tensor()), "expected data up to byte"),
    (header(tensors=2, rest=2 * tensor() + b"\0" * 99), "tensor 'a': expected once, got it twice"),
    (header(tensors=2, rest=tensor() + tensor("b") + b"\0" * 99), "an offset from 34, a multiple of 32, got 0"),
    (
        header(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment: expected a power of two, got 3",
    ),
]


@pytest.mark.parametrize(("data", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_header(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf_header(path)
    assert str(path) in str(error.value)


def test_absurd_counts_in_a_long_file_cost_nothing(tmp_path):
    """The counts fit a sparse file of 4 TB, but no header is that long."""
    path = tmp_path / "sparse.gguf"
    for data in (header(tensors=1 << 37), header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 1 << 38))):
        with open(path, "wb") as f:
            f.write(data)
            f.truncate(1 << 42)
        with pytest.raises(ValueError, match="expected a header below 256 MiB"):
            read_gguf_header(path)


@pytest.mark.parametrize("kept", [0.0001, 0.001, 0.5, 0.9999])
def test_a_file_that_is_cut_off(file, kept):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"model\.gguf: .*cut off or damaged"):
        GgufCheckpoint(file)


def mutated(data: bytes, rng: random.Random, length: int) -> bytes:
    """One to four edits in the first ``length`` bytes: flipped, overwritten, inserted or cut out."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(min(length, len(out))), rng.randrange(4)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, struct.pack("<Q", len(data))])
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            del out[at : at + rng.randint(1, 16)]
    return bytes(out)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_mutated_files_are_refused_or_read(tmp_path, kind):
    """No crash, no other exception, no allocation beyond the file: 3000 rounds, always the same."""
    if kind == "gguf":
        path = published.write_gguf(tmp_path / "m.gguf", {LAYER: tuple(torch.ones(1, 2, 32) for _ in range(3))}, "Q8_0")
        length = read_gguf_header(path)[0]["blk.0.ffn_gate_exps.weight"].start
    else:
        path = write(tmp_path, {f"t{i}": torch.ones(2, i) for i in range(4)}) / "model.safetensors"
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    original = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3000):
        with open(path, "r+b") as f:  # in place: some file systems sync a file that is opened to be replaced
            f.write(mutated(original, rng, length))
            f.truncate()
        try:
            checkpoint = open_checkpoint(tmp_path)
            for name in checkpoint.names():
                assert checkpoint.read_bytes(name).numel() <= path.stat().st_size
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert 2000 < refused < 3000  # most edits break it, and not all do
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.integers(0, 3),
    keys=st.integers(0, 3),
    lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)), min_size=1, max_size=6),
    kinds=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 14), min_size=1, max_size=6),
    filling=st.binary(max_size=200),
)
def test_any_header(tmp_path, tensors, keys, lengths, kinds, filling):
    """Headers of plausible structure with arbitrary lengths, types and contents."""
    parts = [struct.pack("<Q", n) + filling[: min(n, 40)] + struct.pack("<I", k) for n in lengths for k in kinds]
    path = tmp_path / "any.gguf"
    path.write_bytes(header(tensors=tensors, keys=keys, rest=b"".join(parts)))
    try:
        entries, _ = read_gguf_header(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(e.start + e.nbytes <= path.stat().st_size for e in entries.values())


def split(file: Path, parts: int) -> list[Path]:
    """Each tensor in a part of its own, as llama-gguf-split names them."""
    out = []
    for i, tensor in enumerate(gguf.GGUFReader(file).tensors):
        path = file.parent / "split" / f"m-{i + 1:05}-of-{parts:05}.gguf"
        path.parent.mkdir(exist_ok=True)
        writer = gguf.GGUFWriter(path, "qwen3moe")
        writer.add_uint16("split.count", parts)
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.append(path)
    return out


def test_split_files(file):
    parts = split(file, 3)
    layout = published.gguf_layers(weights())[LAYER]
    whole = ExpertReader(open_checkpoint(file), layout, E, D, F).read(1)
    for path in (parts[0], parts[0].parent):
        layer = ExpertReader(open_checkpoint(path), layout, E, D, F)
        layer.require()
        for got, expected in zip(layer.read(1).dequantize(), whole.dequantize(), strict=True):
            assert torch.equal(got, expected)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"part 'm-00002-of-00003\.gguf' is not there"):
        open_checkpoint(parts[0])


def test_parts_that_do_not_belong_together(file):
    parts = split(file, 3)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: tensor .* is also in m-00001-of-00003\.gguf"):
        open_checkpoint(parts[0])
    parts[0].rename(file.parent / "alone.gguf")
    with pytest.raises(ValueError, match="expected 3 parts beside it by its header, got 1"):
        open_checkpoint(file.parent / "alone.gguf")


def test_which_file_is_meant(file, tmp_path):
    with pytest.raises(ValueError, match="expected a GGUF file or a folder"):
        GgufCheckpoint(tmp_path / "absent.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected \*\.gguf, found none"):
        GgufCheckpoint(tmp_path / "empty")
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"expected one GGUF model, found model\.gguf and other\.gguf"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(file).names()


def test_experts_that_do_not_fit_the_model(file):
    layout = published.gguf_layers(weights())[LAYER]
    for sizes, message in (
        ((E, D, F + 32), r"expected shape \[288, 256\] for each"),
        ((3, D, F), "expected 3 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertReader(open_checkpoint(file), layout, *sizes).require()


def test_a_type_without_a_decoder(tmp_path):
    stacks = {LAYER: tuple(torch.ones(E, D, F) for _ in range(3))}
    file = published.write_gguf(tmp_path / "m.gguf", stacks, "TQ1_0")
    with pytest.raises(ValueError, match=r"ffn_gate_exps.*expected dtype F32 or .*Q6_K.*, got TQ1_0"):
        ExpertReader(open_checkpoint(file), published.gguf_layers(stacks)[LAYER], E, D, F).require()


@pytest.mark.parametrize("kind", [k for k in published.GGUF_KINDS if k not in ("F32", "F16", "BF16")])
def test_scales_that_are_not_finite(tmp_path, kind):
    file = published.write_gguf(tmp_path / "m.gguf", weights(), kind)
    entry = read_gguf_header(file)[0]["blk.0.ffn_up_exps.weight"]
    where = {"Q2_K": 82, "Q3_K": 108, "Q4_1": 2, "Q4_K": 2, "Q5_1": 2, "Q5_K": 2, "Q6_K": 208}.get(kind, 0)
    damaged = b"\xff" if kind == "MXFP4" else struct.pack("<e", float("nan"))
    data = bytearray(file.read_bytes())
    start = entry.start + entry.nbytes // 2 + where  # the first block of expert 1
    data[start : start + len(damaged)] = damaged
    file.write_bytes(data)
    layer = ExpertReader(open_checkpoint(file), published.gguf_layers(weights())[LAYER], E, D, F)
    layer.read(0)
    with pytest.raises(ValueError, match=r"ffn_up_exps\.weight', expert 1: expected finite scales, got NaN"):
        layer.read(1)

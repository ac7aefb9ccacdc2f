"""LoRA adapters: saved with a card that names their base, loaded only onto that base, merged for generation."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looper.base_model import base_digest, check_files, load_base, named_digest
from looper.files import read_json, replacing, sha256, write_json
from looper.params import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CARD = "card.json"
WEIGHTS = "adapter_model.safetensors"  # as PEFT names it


def save_adapter(model: "PeftModel", folder: Path, base: Path, card: dict[str, Any],
                 beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Writes adapter_model.safetensors, its config and card.json into `folder`, whole or not at all.

    card: what the adapter was made from (data hash, params); the base's digest and the files' hashes are added here.
    beside: files to copy into the folder, such as the value head.
    Returns the whole card.
    """
    with replacing(folder) as temporary:
        for config in model.peft_config.values():
            config.target_modules = sorted(config.target_modules)  # a set: PEFT would write it in another order each time
        model.save_pretrained(temporary, safe_serialization=True)
        for file in beside:
            shutil.copyfile(file, temporary / file.name)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ours is card.json
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        whole = {"base_digest": base_digest(base), "files": files, **card}
        write_json(temporary / CARD, whole)
    return whole


def load_trainable(base: Path, adapter: Path, settings: Model) -> "PeftModel":
    """The base with `adapter` on it, the adapter's weights trainable in float32."""
    from peft import PeftModel

    check_adapter(base, adapter)
    return PeftModel.from_pretrained(load_base(base, settings), adapter, is_trainable=True, local_files_only=True)


def load_for_generation(base: Path, adapter: Path | None, settings: Model) -> "PreTrainedModel":
    """The base, with `adapter` merged into its weights where one is given, ready to generate.

    An NF4 base is dequantised first: merging into four bits would round the adapter away. In bfloat16 the merged weights
    are the trained policy's up to their rounding.
    """
    if adapter:
        check_adapter(base, adapter)
    model = load_base(base, settings)
    if settings.quantization != "none":
        model = model.dequantize()
    if adapter:
        from peft import PeftModel  # seconds to import: not for the base alone

        model = PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload()
    return model.eval()


def check_adapter(base: Path, adapter: Path) -> None:
    """Raises ValueError if `adapter` is damaged, or was made for another base than the one that `base` names."""
    if not (adapter / CARD).exists():
        raise ValueError(f"{adapter}/{CARD} is missing; make the adapter: dvc repro, or bring it back: dvc pull {adapter}")
    check_files(adapter, CARD, f"bring it back: dvc checkout {adapter}")
    made_for, digest = read_json(adapter / CARD)["base_digest"], named_digest(base)
    if made_for != digest:
        raise ValueError(f"{adapter} was made for the base {made_for}, {base} is {digest}; nothing loaded; "
                         f"make the adapter again (dvc repro sft), or bring its base back (dvc checkout {base})")

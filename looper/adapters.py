"""LoRA adapters: saved with a card that names their base, loaded only onto that base, merged for generation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from looper.base_model import base_digest, load_base
from looper.files import read_json, replacing, sha256, write_json
from looper.params import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CARD = "card.json"


def save_adapter(model: "PeftModel", folder: Path, base: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Writes adapter_model.safetensors, its config and card.json into `folder`, whole or not at all.

    card: what the adapter was made from (data hash, params); the base's digest and the weights' hash are added here.
    Returns the whole card.
    """
    with replacing(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ours is card.json
        weights = sha256(temporary / "adapter_model.safetensors")
        whole = {"base_digest": base_digest(base), "adapter_sha256": weights, **card}
        write_json(temporary / CARD, whole)
    return whole


def load_trainable(base: Path, adapter: Path, settings: Model) -> "PeftModel":
    """The base with `adapter` on it, the adapter's weights trainable in float32."""
    from peft import PeftModel

    check_adapter(base, adapter)
    return PeftModel.from_pretrained(load_base(base, settings), adapter, is_trainable=True, local_files_only=True)


def load_for_generation(base: Path, adapter: Path | None, settings: Model) -> "PreTrainedModel":
    """The base, with `adapter` merged into its weights where one is given, ready to generate.

    An NF4 base is dequantised first: merging into four bits would round the adapter away, and the sampled policy would not
    be the trained one.
    """
    from peft import PeftModel

    if adapter:
        check_adapter(base, adapter)
    model = load_base(base, settings)
    if settings.quantization != "none":
        model = model.dequantize()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload()
    return model.eval()


def check_adapter(base: Path, adapter: Path) -> None:
    """Raises ValueError if `adapter` is damaged, or was made for another base than the one in `base`."""
    if not (adapter / CARD).exists():
        raise ValueError(f"{adapter}/{CARD} is missing; make the adapter: dvc repro, or bring it back: dvc pull {adapter}")
    card = read_json(adapter / CARD)
    found = sha256(adapter / "adapter_model.safetensors")
    if found != card["adapter_sha256"]:
        raise ValueError(f"{adapter}/adapter_model.safetensors: sha256 {found}, its card says {card['adapter_sha256']}; "
                         f"nothing loaded; bring it back: dvc checkout {adapter}")
    digest = base_digest(base)
    if card["base_digest"] != digest:
        raise ValueError(f"{adapter} was made for the base {card['base_digest']}, {base} is {digest}; nothing loaded; "
                         f"make the adapter again (dvc repro sft), or bring its base back (dvc checkout {base})")

"""Adapters: saved with a card, loaded only onto their own base, and merged into what they are unmerged."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CPU, tiny_base

from looper.adapters import check_adapter, load_for_generation, load_trainable, save_adapter
from looper.base_model import base_digest, load_base
from looper.files import read_json, write_json

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear")
IDS = torch.tensor([[1, 9, 30, 31, 50, 2, 7]])


def trained(base, seed=0):
    """An adapter that does something: PEFT begins with B = 0."""
    model = get_peft_model(load_base(base, CPU), LORA)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(base):
    return trained(base)


@pytest.fixture
def adapter(model, base, tmp_path):
    save_adapter(model, tmp_path / "models" / "sft_lora", base, {"data_sha256": "d", "sft": {"seed": 0}})
    return tmp_path / "models" / "sft_lora"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_folder_holds_safetensors_their_config_and_the_card(adapter, base):
    names = sorted(path.name for path in adapter.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "card.json"]
    card = read_json(adapter / "card.json")
    hashes = {name: hashlib.sha256((adapter / name).read_bytes()).hexdigest()
              for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert card == {"base_digest": base_digest(base), "files": hashes, "data_sha256": "d", "sft": {"seed": 0}}
    assert list(adapter.parent.iterdir()) == [adapter]


def test_the_same_adapter_is_the_same_bytes(model, base, adapter, tmp_path):
    """PEFT writes target_modules, a set, in an order that differs from process to process."""
    modules = read_json(adapter / "adapter_config.json")["target_modules"]
    assert modules == sorted(modules) and len(modules) == 14
    model.peft_config["default"].target_modules = set(modules)
    save_adapter(model, tmp_path / "again", base, {"data_sha256": "d", "sft": {"seed": 0}})
    for name in ("adapter_config.json", "adapter_model.safetensors", "card.json"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_files_beside_the_adapter_are_in_the_folder_and_on_the_card(model, base, tmp_path):
    (tmp_path / "value_head.safetensors").write_bytes(b"head")
    card = save_adapter(model, tmp_path / "ppo", base, {}, beside=[tmp_path / "value_head.safetensors"])
    assert (tmp_path / "ppo" / "value_head.safetensors").read_bytes() == b"head"
    assert card["files"]["value_head.safetensors"] == hashlib.sha256(b"head").hexdigest()
    check_adapter(base, tmp_path / "ppo")


def test_after_an_error_the_old_adapter_stays(model, base, adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(FileNotFoundError):
        save_adapter(trained(base, seed=1), adapter, base, {}, beside=[tmp_path / "nowhere"])
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert list(adapter.parent.iterdir()) == [adapter]


def test_a_saved_adapter_is_loaded_trainable_in_float32(model, base, adapter):
    loaded = load_trainable(base, adapter, CPU)
    trainable = {name: parameter for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    saved = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert trainable.keys() == saved.keys() and len(saved) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    for name, parameter in trainable.items():
        assert parameter.dtype is torch.float32 and torch.equal(parameter, saved[name])
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_merged_logits_are_the_unmerged_ones(model, base, adapter):
    merged = load_for_generation(base, adapter, CPU)
    assert not merged.training and not [name for name, _ in merged.named_parameters() if "lora" in name]
    # Of the 0.1 and more that the adapter changes; two orders of float32 sums differ by 1.03e-5 on some processors
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=5e-5)
    plain = load_for_generation(base, None, CPU)
    assert (logits(merged) - logits(plain)).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(logits(plain), logits(load_base(base, CPU)), rtol=0, atol=0)


LOADERS = [check_adapter, lambda base, adapter: load_trainable(base, adapter, CPU),
           lambda base, adapter: load_for_generation(base, adapter, CPU)]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("name", "old", "new"), [
    ("adapter_model.safetensors", None, None), ("adapter_config.json", b'"lora_alpha": 8', b'"lora_alpha": 80'),
])
def test_a_damaged_adapter_is_refused_with_both_hashes(base, adapter, load, name, old, new):
    content = (adapter / name).read_bytes()
    expected = hashlib.sha256(content).hexdigest()
    damaged = content.replace(old, new) if old else content[:-1] + bytes([content[-1] ^ 1])
    assert damaged != content
    (adapter / name).write_bytes(damaged)
    message = (f"{adapter}/{name}: sha256 {hashlib.sha256(damaged).hexdigest()}, card.json says {expected}; "
               f"it is not used; bring it back: dvc checkout {adapter}")
    with pytest.raises(ValueError, match=re.escape(message)):
        load(base, adapter)


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_of_another_base_is_refused_with_both_hashes(base, adapter, load, tmp_path):
    other = tiny_base(tmp_path / "other" / "base", seed=1)
    message = (f"{adapter} was made for the base {base_digest(base)}, {other} is {base_digest(other)}; nothing loaded; "
               f"make the adapter again (dvc repro sft), or bring its base back (dvc checkout {other})")
    with pytest.raises(ValueError, match=re.escape(message)):
        load(other, adapter)


def test_a_missing_file_or_card_says_how_to_get_it(base, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: sha256 no file, card\.json says .*dvc checkout"):
        check_adapter(base, adapter)
    (adapter / "card.json").unlink()
    with pytest.raises(ValueError, match=r"card\.json is missing; make the adapter: dvc repro, or .* dvc pull"):
        check_adapter(base, adapter)


def test_a_damaged_base_is_refused_under_its_own_adapter(base, adapter, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    manifest = read_json(copy / "manifest.json")
    write_json(copy / "manifest.json", manifest | {"digest": "0"})  # the files decide, not what it says of itself
    check_adapter(copy, adapter)
    (copy / "config.json").write_text("{}")
    for load in (load_trainable, load_for_generation):
        with pytest.raises(ValueError, match=r"config\.json: sha256 .*, manifest\.json says"):
            load(copy, adapter, CPU)

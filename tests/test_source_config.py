"""config.json and the other small files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from formats.errors import SourceError, UnsupportedError
from formats.sources.hf_config import config_from_hf
from formats.sources.licence import front_matter, licence_record
from formats.sources.source import open_source
from tests import tiny
from tests.checkpoints import LLAMA3, LLAMA3_OURS, config_of, edit_json, refused, write_hf

# ---- config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": "absent"}, 10000.0, None),
        ({"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 500000.0, LLAMA3_OURS),
        (
            {"rope_theta": "absent", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            LLAMA3_OURS,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}, 20000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, {"type": "linear", "factor": 2.0}),
    ],
)
def test_rope_of_transformers_4_and_5(changes: dict[str, Any], theta: float, scaling: object) -> None:
    config = config_of(**changes)
    assert config["rope_theta"] == theta and config["rope_scaling"] == scaling


def test_both_forms_of_the_fixture_agree() -> None:
    folder = tiny.fixture_folder("tiny-llama-tied-bf16")
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    old = config_from_hf({**raw, "rope_theta": theta, "rope_scaling": None}, folder)
    assert old == open_source(folder).config


def test_defaults_are_those_of_transformers() -> None:
    config = config_of(num_key_value_heads="absent", rms_norm_eps="absent", tie_word_embeddings="absent")
    assert config["n_kv_heads"] == 4 and config["norm_eps"] == 1e-6 and config["tied_embeddings"] is False


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"model_type": "absent", "architectures": "absent"}, "supported are"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer to layer"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        config_of(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *(
            ({"hidden_size": bad}, '"hidden_size"')
            for bad in (0, -1, 1.5, "64", True, 1 << 40, [64], "absent")
        ),
        *(({"rms_norm_eps": bad}, '"rms_norm_eps"') for bad in (0, -1.0, "x", float("nan"), 10**400, True)),
        ({"num_hidden_layers": 10**9}, '"num_hidden_layers"'),
        ({"tie_word_embeddings": 1}, '"tie_word_embeddings"'),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "odd"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SourceError, match=text):
        config_of(**changes)


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {"quant_method": "fp8"}, "odd"])
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, quantization: object) -> None:
    write_hf(tmp_path, {"quantization_config": quantization})
    name = quantization["quant_method"] if isinstance(quantization, dict) else "quantised"
    refused(tmp_path, "config.json", name, kind=UnsupportedError)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, '"x"', "\xff"])
def test_config_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json")


# ---- tokenizer, generation, template, licence -----


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    write_hf(tmp_path, {"bos_token_id": 1, "eos_token_id": [2, 3]}, tokenizer=False)
    source = open_source(tmp_path)
    expected = {"type": "none", "bos_id": 1, "eos_ids": [2, 3], "add_bos": False, "special": {}}
    assert source.tokenizer == expected and not source.blobs
    assert "no tokenizer" in source.notes[0]


def test_generation_config(tmp_path: Path) -> None:
    write_hf(tmp_path)
    path = tmp_path / "generation_config.json"
    numbers = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    path.write_text(json.dumps({**numbers, "do_sample": True, "eos_token_id": 2, "use_cache": True}))
    assert open_source(tmp_path).generation == {**numbers, "do_sample": True, "eos_token_id": [2]}
    for key, value in (("temperature", "hot"), ("top_k", -1), ("top_p", True), ("eos_token_id", ["x"])):
        path.write_text(json.dumps({key: value}))
        refused(tmp_path, "generation_config.json", key)


def test_chat_template_places(tmp_path: Path) -> None:
    write_hf(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    edit_json(
        config, chat_template=[{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    )
    assert open_source(tmp_path).chat == {"template": "D"}
    (tmp_path / "chat_template.jinja").write_text("J")
    assert open_source(tmp_path).chat == {"template": "J"}
    (tmp_path / "chat_template.jinja").unlink()
    edit_json(config, chat_template={"default": "D"})
    refused(tmp_path, "chat_template", "tokenizer_config.json")


def test_licence_places(tmp_path: Path) -> None:
    write_hf(tmp_path)
    assert open_source(tmp_path).licence == {"name": None, "llama": False}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n# Hi\n")
    assert open_source(tmp_path).licence == {"name": "llama3.1", "llama": True}
    (tmp_path / "README.md").write_text("---\nlicense: 'apache-2.0'\n---\n")
    (tmp_path / "LICENSE").write_text("LLAMA 3.1\nCOMMUNITY LICENSE AGREEMENT\n")
    assert open_source(tmp_path).licence["llama"] is True


def test_licence_rules() -> None:
    assert licence_record("llama2")["llama"] and not licence_record("apache-2.0", "Apache License")["llama"]
    assert front_matter("no front matter\n---\nlicense: mit\n---") == {}

import dataclasses
import hashlib
import json

import pytest

from step1x_edit.model.config import V1_0, V1_1, V1_2, ModelConfig, TransformerConfig
from tiny import TINY


@pytest.mark.parametrize("config", [V1_0, V1_1, V1_2, TINY], ids=lambda config: config.version)
def test_config_survives_json(config: ModelConfig) -> None:
    text = json.dumps(config.to_json())

    assert ModelConfig.from_json(json.loads(text)) == config


@pytest.mark.parametrize("part", [None, "transformer", "conditioner"])
def test_an_unknown_field_is_refused(part: str | None) -> None:
    data = TINY.to_json()
    (data[part] if part else data)["colour"] = "red"

    with pytest.raises(ValueError, match="colour"):
        ModelConfig.from_json(data)


def test_a_missing_field_is_refused() -> None:
    data = TINY.to_json()
    del data["version"]

    with pytest.raises(ValueError, match="version"):
        ModelConfig.from_json(data)


@pytest.mark.parametrize(
    ("config", "length", "digest"),
    [(V1_0, 1058, "40882ddca94ca697"), (V1_1, 1058, "40882ddca94ca697"),
     (V1_2, 449, "2d7e7837b2aacef8")],
)  # fmt: skip
def test_prompt_prefixes_are_byte_exact(config: ModelConfig, length: int, digest: str) -> None:
    prefix = config.conditioner.prompt_prefix

    assert len(prefix) == length
    assert hashlib.sha256(prefix.encode()).hexdigest().startswith(digest)


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="5 latent channels"):
        dataclasses.replace(TINY, latent_channels=5)
    with pytest.raises(ValueError, match="axes_dim"):
        TransformerConfig(axes_dim=(16, 56, 58))
    with pytest.raises(ValueError, match="num_heads"):
        TransformerConfig(num_heads=23)


def test_one_token_covers_the_size_multiple() -> None:
    assert V1_1.size_multiple == 16
    assert dataclasses.replace(V1_1, vae_scale=16).size_multiple == 32

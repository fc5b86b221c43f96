"""Settings: presets, overrides, one-line errors."""

import json

import pytest

from metagmvae.configs.load import (
    SettingsError,
    differences,
    fingerprint,
    load_settings,
    presets,
    settings_from_json,
    to_json,
    to_toml,
)


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_equals_its_json_and_toml_forms(name, tmp_path):
    settings = load_settings(name)
    assert settings.name == name
    assert settings_from_json(to_json(settings)) == settings
    (tmp_path / "same.toml").write_text(to_toml(settings))
    assert load_settings(tmp_path / "same.toml") == settings


def changed_keys(ours, theirs):
    return {line.split(":")[0] for line in differences(load_settings(ours), load_settings(theirs))}


def test_mini_imagenet_paper_and_published_code_differ_in_the_documented_rows():
    assert changed_keys("mini-imagenet-simclr-paper", "mini-imagenet-simclr-published-code") == {
        "model.normalise",
        "pretrain.learning_rate",
        "pretrain.schedule",
    }
    assert changed_keys("mini-imagenet-paper", "mini-imagenet-published-code") == {
        "adapt.e_step",
        "model.attention_scale",
        "model.attention_block",
        "model.latent",
        "model.variance",
        "train.weight_decay",
        "train.objective_scale",
        "train.selection",
        "validation.episodes",
        "validation.shots",
    }


@pytest.mark.parametrize("way", [5, 20])
def test_omniglot_paper_and_published_code_differ_in_the_documented_rows(way):
    assert changed_keys(f"omniglot-{way}way-paper", f"omniglot-{way}way-published-code") == {
        "adapt.e_step",
        "model.attention_scale",
        "model.attention_block",
        "model.attention_activation",
        "train.weight_decay",
        "train.objective_scale",
        "train.selection",
        "validation.episodes",
    }


@pytest.mark.parametrize("name", [name for name in presets() if name.endswith(("-paper", "-published-code"))])
def test_paper_and_published_code_share_what_tables_3_6_and_7_say(name):
    """64 x 2 outputs of the posterior (one variance per dimension), and the crops of torchvision."""
    settings = load_settings(name)
    assert settings.model.posterior == "diagonal"
    assert settings.pretrain.crops == ("torchvision" if settings.pretrain.steps else "clipped")
    assert (settings.model.rectified, settings.model.average, settings.adapt.temperature) == (True, "none", 1.0)


def test_published_code_selects_its_models_as_the_authors_do():
    for way in (5, 20):
        omniglot = load_settings(f"omniglot-{way}way-published-code")
        assert (omniglot.train.selection, omniglot.validation.shots) == ("best", (1, 5))
        assert (omniglot.train.steps // omniglot.validation.every, omniglot.validation.episodes) == (60, 1000)
    mini = load_settings("mini-imagenet-published-code")
    assert (mini.train.selection, mini.validation.shots) == ("best-first-shot", (1,))
    assert (mini.train.steps // mini.validation.every, mini.validation.episodes) == (15, 1000)


def test_overrides_apply_in_order_and_the_fingerprint_ignores_run_and_tracking():
    plain = load_settings("omniglot-cpu")
    moved = load_settings("omniglot-cpu", ["run.out=elsewhere", "tracking.enabled=false", "name=other"])
    assert (moved.run.out, moved.tracking.enabled) == ("elsewhere", False)
    assert fingerprint(moved) == fingerprint(plain)
    other = load_settings("omniglot-cpu", ["train.seed=1", "train.seed=2"])
    assert other.train.seed == 2
    assert fingerprint(other) != fingerprint(plain)


def test_fingerprints_of_recorded_results_stay_valid_when_settings_are_added():
    """Recorded under the settings of 2026-11; a new key must be in `LATER_KEYS`."""
    assert fingerprint(load_settings("omniglot-best-5way")).startswith("3df5de1fdc6c")
    former = ["pretrain.objective=nt-xent", "pretrain.steps=6400", "pretrain.batch=128", "pretrain.views=auto"]
    former += ["adapt.temperature=32", "adapt.proportions=equal", "adapt.inductive=latents", "adapt.diffusion=0"]
    former += ["adapt.whitening=0"]
    assert fingerprint(load_settings("mini-imagenet-cpu", former)).startswith("23b107664aba")
    changed = load_settings("mini-imagenet-cpu", ["model.normalise=imagenet"])
    assert fingerprint(changed) != fingerprint(load_settings("mini-imagenet-cpu"))
    changed = load_settings("mini-imagenet-cpu", ["pretrain.crops=torchvision"])
    assert fingerprint(changed) != fingerprint(load_settings("mini-imagenet-cpu"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "train.step: no such key; did you mean 'train.steps'?"),
        ("trian.steps=3", "trian.steps: no such key; did you mean 'train.steps'?"),
        ("train.steps=many", 'train.steps = "many"'),
        ("train.steps=-1", "train.steps = -1"),
        ("train.components=301", "components K (301) exceeds set_size M (300)"),
        ("train.decode_samples=33", "decode_samples (33) exceeds samples (32)"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("model.heads=3", "width (256) must be a multiple of heads (3)"),
        ("train.denoise=true", "train.denoise (true) augments images"),
        ("adapt.diffusion=1", "adapt.diffusion = 1: input should be less than or equal to 0.99"),
        ("train", "write it as section.key=value"),
        ("train={steps=5}", "--set train={steps=5}: would replace all of train; set one key: train.KEY=VALUE"),
        ("run.out=", "run.out: '' is no folder; give its path"),
        ('run.out="a\\u0000b"', "run.out: 'a\\x00b' is no folder; give its path"),
        ("name=2024", 'name = 2024: input should be a valid string; write it in quotes: "2024"'),
        ("validation.shots=1", "validation.shots = 1: input should be a valid array; write a list: [1]"),
        ("validation.shots=1,5", 'validation.shots = "1,5": input should be a valid array; write a list: [1,5]'),
        ("train.compile=True", 'train.compile = "True": input should be a valid boolean; write true or false'),
        ("train.steps=3 # note", 'train.steps = "3 # note": input should be a valid integer'),
        ("train.steps=3\nfoo=4", 'train.steps = "3\\nfoo=4": input should be a valid integer'),
        ("train.steps=3, 0]\nfoo=[4", "input should be a valid integer"),
        ("train.steps=3,", 'train.steps = "3,": input should be a valid integer'),
    ],
)
def test_mistakes_give_one_error_line(override, message):
    with pytest.raises(SettingsError) as error:
        load_settings("omniglot-cpu", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [["model.reconstruct=pixels", "train.start=random"], ["model.features=raw"]])
@pytest.mark.parametrize("key", ["diffusion", "whitening"])
def test_diffusion_and_whitening_need_scaled_features(key, overrides):
    assert getattr(load_settings("omniglot-cpu", [f"adapt.{key}=0.5"]).adapt, key) == 0.5
    with pytest.raises(SettingsError, match=rf"adapt.{key} \(0.5\) is for scaled features, and the model has none"):
        load_settings("omniglot-cpu", [f"adapt.{key}=0.5", *overrides])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ('""', ""),
        ("runs/a#b", "runs/a#b"),
        ("'a\"b'", 'a"b'),
        ("日本 語", "日本 語"),
        ("2024-01-02T10:00", "2024-01-02T10:00"),
        ("10:30", "10:30"),
        ("a=b", "a=b"),
        ("1, 2", "1, 2"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_text_that_is_no_value_of_toml_is_taken_as_it_is(text, value):
    if text == "[1, 2]":
        assert load_settings("omniglot-cpu", [f"validation.shots={text}"]).validation.shots == (1, 2)
    else:
        assert load_settings("omniglot-cpu", [f"name={text}"]).name == value


def test_files_of_windows_editors_are_read(tmp_path):
    """With a byte order mark, and lines that end with a carriage return."""
    (tmp_path / "mine.toml").write_bytes(b'\xef\xbb\xbfname = "mine"\r\n[train]\r\nsteps = 7\r\n')
    settings = load_settings(tmp_path / "mine.toml")
    assert (settings.name, settings.train.steps) == ("mine", 7)


def test_unknown_presets_and_invalid_toml(tmp_path):
    with pytest.raises(SettingsError, match="did you mean 'omniglot-cpu'"):
        load_settings("omniglot-cpv")
    (tmp_path / "broken.toml").write_text("steps = ")
    with pytest.raises(SettingsError, match=r"broken.toml: not valid TOML"):
        load_settings(tmp_path / "broken.toml")


@pytest.mark.parametrize("preset", presets())
def test_registered_names_come_from_the_dataset(preset):
    def name(uri, *overrides):
        return load_settings(preset, [f"data.uri={json.dumps(uri)}", *overrides]).tracking.register_as

    assert name("data/birds") == name("s3://bucket/birds/") == "birds"
    assert name("data/my: 'birds' @home") == "my- -birds- -home"
    assert name("/") == name("..") == preset
    assert name("data/birds", "tracking.register_as=mine") == "mine"
    assert name("data/birds", 'tracking.register_as="{data}-small"') == "birds-small"
    assert name("data/birds", 'tracking.register_as=""') == ""

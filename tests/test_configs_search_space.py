"""Search spaces: reading TOML files, one-line errors, settings with values of a space."""

import json
import math

import pytest

from metagmvae.configs.dimensions import parse_dimension
from metagmvae.configs.load import SettingsError, load_settings
from metagmvae.configs.schema import Settings
from metagmvae.configs.search_space import load_space, spaces, with_values


def space_file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_bundled_spaces_contain_the_documented_settings():
    assert spaces() == ["core", "wide"]
    core, wide = (load_space(name).to_dict() for name in spaces())
    em_m_n_r_rate = {"em_iterations", "set_size", "samples", "decode_samples", "learning_rate"}
    assert set(core) == {f"train.{name}" for name in em_m_n_r_rate}
    assert set(wide) - set(core) == {"train.components", "model.latent", "train.weight_decay"}
    assert core == {name: wide[name] for name in core}
    assert core["train.learning_rate"] == {"kind": "loguniform", "low": 1e-4, "high": 1e-2}
    assert core["train.set_size"] == {"kind": "int", "low": 50, "high": 400, "step": 50}


def test_all_kinds_with_dotted_keys_and_as_tables(tmp_path):
    text = """
    train.set_size = { range = [10, 18], step = 4 }
    "train.learning_rate" = { loguniform = [1e-4, 1e-2] }
    [model]
    posterior = { choice = ["isotropic", "diagonal"] }
    [train.clip_norm]
    uniform = [0, 5]
    """
    space = load_space(space_file(tmp_path, text))
    assert space.name == "mine"
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    assert [d.kind for d in by_name.values()] == ["int", "uniform", "loguniform", "choice"]
    assert by_name["train.set_size"].levels == range(10, 21, 4)
    assert by_name["model.posterior"].levels == ("isotropic", "diagonal")
    assert by_name["train.clip_norm"].levels == ()
    for name, description in json.loads(json.dumps(space.to_dict())).items():
        assert parse_dimension(name, description) == by_name[name]


FORMS = "write it as { choice"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "train.em_iteration = {choice=[1]}",
            "train.em_iteration: no such setting; did you mean 'train.em_iterations'?",
        ),
        ("[trian]\nem_iterations = {choice=[1]}", "trian.em_iterations: no such setting; did you mean 'train.em_iter"),
        ("em_iterations = {choice=[1]}", "did you mean 'train.em_iterations'?"),
        ("nonsense = {choice=[1]}", "nonsense: no such setting; known: data, method, model"),
        ("train = {choice=[1]}", "train: no such setting"),
        ("train.set_size = {range=[5,5]}", "train.set_size: low (5) must be less than high (5)"),
        ("train.set_size = {range=[9,5]}", "low (9) must be less than high (5)"),
        ("train.set_size = {choice=[]}", "has no values"),
        ("train.learning_rate = {loguniform=[0,1]}", "must be greater than 0; or use uniform"),
        ("train.learning_rate = {loguniform=[-1,1]}", "must be greater than 0; or use uniform"),
        ("train.learning_rate = {uniform=[1,inf]}", "high = Infinity: input should be a finite number"),
        ("train.learning_rate = {uniform=[1e-3]}", "give two numbers"),
        ("train.set_size = {uniform=[5,9]}", "input should be a valid integer"),
        ("train.set_size = {range=[1,2.5]}", "high = 2.5: input should be a valid integer"),
        ("train.set_size = {range=[1,9],step=0}", "step = 0: input should be greater than 0"),
        ("model.heads = {range=[4,8],step=3}", "range = [4, 8] with step = 3 ends at 7; write [4, 7] or [4, 10]"),
        ("train.set_size = {uniform=[1,9],step=2}", "step = 2: extra inputs are not permitted"),
        ('train.set_size = {choice=["a"]}', 'train.set_size: "a": input should be a valid integer'),
        ("train.set_size = {choice=[0, 5]}", "train.set_size: 0: input should be greater than 0"),
        ("train.learning_rate = {uniform=[-1,1]}", "input should be greater than 0"),
        ('train.schedule = {choice=["constant","cosin"]}', "\"cosin\": input should be 'constant' or 'cosine'"),
        ("train.set_size = {choice=[5, 5]}", "contains a value twice"),
        ("train.clip_norm = {choice=[5, 5.0]}", "contains a value twice"),
        ("train.set_size = {range=[1,9],step=true}", "step = true: input should be a valid integer"),
        ("pretrain.projector = {choice=[[1]]}", "[1] is not a number, string or boolean"),
        ("train.steps = 3", FORMS),
        ("train.steps = {range=[1,2],uniform=[1,2]}", FORMS),
        ("run.workers = {choice=[1,2]}", "it only sets where a run takes place"),
        ('data.uri = {choice=["a"]}', "trials on different data cannot be compared"),
        ("validation.way = {choice=[5,20]}", "trials evaluated on different episodes cannot be compared"),
        ("", "has no settings"),
        ("x", "not valid TOML"),
    ],
)
def test_mistakes_give_one_error_line(tmp_path, text, reason):
    with pytest.raises(SettingsError) as error:
        load_space(space_file(tmp_path, text))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_space():
    with pytest.raises(SettingsError, match="corr: no such TOML file and no bundled space of that name; did you mean"):
        load_space("corr")


def test_with_values_replaces_settings_and_refuses_impossible_combinations():
    base = load_settings("omniglot-5way")
    changed = with_values(base, {"train.set_size": 60, "model.latent": 16, "train.learning_rate": 2e-3})
    assert (changed.train.set_size, changed.model.latent, changed.train.learning_rate) == (60, 16, 2e-3)
    assert changed.train.samples == base.train.samples
    for values, reason in [
        ({"train.components": 300}, "exceeds set_size"),
        ({"train.decode_samples": 64, "train.samples": 32}, "exceeds samples"),
        ({"model.heads": 3}, "multiple of heads"),
    ]:
        with pytest.raises(SettingsError, match=reason):
            with_values(base, values)


def test_values_of_returns_values_as_the_settings_store_them(tmp_path):
    space = load_space(space_file(tmp_path, "train.learning_rate = {choice=[1, 2]}\nmodel.latent = {choice=[8]}"))
    values = space.values_of(with_values(Settings(), {"train.learning_rate": 1, "model.latent": 8}))
    assert values == {"train.learning_rate": 1.0, "model.latent": 8}
    assert math.isclose(values["train.learning_rate"], 1)
